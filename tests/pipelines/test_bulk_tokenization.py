"""Reading ahead and tokenizing many batches."""

import threading
import time

import pytest
import torch

from flextok_hf.pipelines.bulk_tokenization import read_ahead, tokenize_batches


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_items_arrive_in_order(depth):
    assert list(read_ahead(range(20), depth)) == list(range(20))
    assert list(read_ahead([], depth)) == []


def test_the_next_items_are_prepared_while_one_is_in_use():
    made = []
    items = read_ahead((made.append(number) or number for number in range(10)), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 4  # one in use, two in the queue, one that does not fit


def test_an_error_arrives_after_what_came_before_it():
    def items():
        yield 1
        raise OSError("disk gone")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(ahead)


def test_a_reader_ends_with_its_consumer():
    before = threading.active_count()
    ahead = read_ahead(iter(range(10**9)))
    assert next(ahead) == 0
    ahead.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("max_tokens", [None, 2])
def test_batches_give_the_ids_of_single_calls(tiny_tokenizer_pipeline, max_tokens):
    pixels = [
        torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        for size in (3, 1, 4)
    ]
    as_values = [batch.float() / 255 * 2 - 1 for batch in pixels]
    expected = [tiny_tokenizer_pipeline.tokenize(batch, max_tokens) for batch in pixels]
    for batches in (pixels, as_values):
        token_ids = list(tokenize_batches(tiny_tokenizer_pipeline, batches, max_tokens))
        assert [ids.shape for ids in token_ids] == [ids.shape for ids in expected]
        assert all(ids.equal(same) for ids, same in zip(token_ids, expected, strict=True))
    assert list(tokenize_batches(tiny_tokenizer_pipeline, [])) == []
