import itertools

import pytest
import torch

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
