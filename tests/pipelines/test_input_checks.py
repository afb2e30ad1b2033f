import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset

from flextok_hf.pipelines.token_checks import pad_token_ids


CODEBOOK_SIZE = 64_000
NUM_REGISTERS = 8
# The largest ids of each data type, so that a cast to a smaller one would change them.
ROWS = [
    torch.tensor([0, 7, 255], dtype=torch.uint8),
    torch.tensor([900, 32_767], dtype=torch.int16),
    torch.tensor([63_999], dtype=torch.int32),
    torch.tensor([63_998, 256, 40_000, 132]),
]


def assert_padding_keeps(rows):
    padded, lengths = pad_token_ids(rows, CODEBOOK_SIZE, NUM_REGISTERS)
    assert padded.dtype == torch.int64 and padded.shape == (len(rows), max(map(len, rows)))
    assert lengths == [len(row) for row in rows]
    for row, padded_row in zip(rows, padded, strict=True):
        assert padded_row.tolist() == row.tolist() + [0] * (padded.shape[1] - len(row))
        assert pad_token_ids([row], CODEBOOK_SIZE, NUM_REGISTERS)[0].tolist() == [row.tolist()]


def test_large_ids_after_a_row_of_bytes_are_kept():
    rows = [torch.tensor([1, 2, 3], dtype=torch.uint8), torch.tensor([900, 7])]
    assert pad_token_ids(rows, CODEBOOK_SIZE, NUM_REGISTERS)[0].tolist() == [[1, 2, 3], [900, 7, 0]]


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_rows_of_different_data_types_keep_their_ids_in_any_order(order):
    assert_padding_keeps([ROWS[index] for index in order])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.dtype))
def test_rows_of_one_data_type_and_batches_keep_their_ids(row):
    assert_padding_keeps([row, row[:1]])
    assert pad_token_ids(torch.stack([row, row]), CODEBOOK_SIZE, NUM_REGISTERS)[0].tolist() == [row.tolist()] * 2


def test_the_rows_passed_in_are_left_unchanged():
    rows = [row.clone() for row in ROWS]
    pad_token_ids(rows, CODEBOOK_SIZE, NUM_REGISTERS)[0].add_(1)
    pad_token_ids(rows[3:], CODEBOOK_SIZE, NUM_REGISTERS)[0].add_(1)
    assert all(torch.equal(row, before) and row.dtype == before.dtype for row, before in zip(rows, ROWS, strict=True))


EQUAL, RAGGED = [[1, 2], [3, 63_999]], [[1, 2], [63_999]]
FORMS = {
    "lists": lambda rows: rows,
    "tuples": lambda rows: tuple(map(tuple, rows)),
    "arrays": lambda rows: [np.array(row, dtype=np.uint16) for row in rows],
    "lists of NumPy numbers": lambda rows: [list(np.array(row)) for row in rows],
    "lists of tensors without dimensions": lambda rows: [list(torch.tensor(row)) for row in rows],
    "an array of arrays": lambda rows: np.array([np.array(row) for row in rows] + [None], dtype=object)[:-1],
    "a column of a dataset": lambda rows: Dataset.from_dict({"token_ids": rows})["token_ids"],
    "a column in NumPy format": lambda rows: Dataset.from_dict({"token_ids": rows}).with_format("numpy")["token_ids"],
    "rows of a dataset in PyTorch format": lambda rows: Dataset.from_dict({"a": rows}).with_format("torch")[:]["a"],
}


@pytest.mark.parametrize("rows", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("form", FORMS)
def test_ids_are_the_same_in_every_form(form, rows):
    padded_ids, lengths = pad_token_ids(FORMS[form](rows), CODEBOOK_SIZE, NUM_REGISTERS)
    assert [row[:length].tolist() for row, length in zip(padded_ids, lengths, strict=True)] == rows


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint64])
def test_arrays_of_any_integer_type_are_ids(dtype):
    assert pad_token_ids(np.array([[1, 2]], dtype=dtype), CODEBOOK_SIZE, NUM_REGISTERS)[0].tolist() == [[1, 2]]
