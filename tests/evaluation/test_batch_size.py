"""`--batch_size auto` of the evaluation."""

import pytest
import torch
from tiny_models import make_pipeline

from flextok_hf.evaluation import measurement
from flextok_hf.evaluation.options import ReconstructionOptions


def test_a_cpu_takes_a_small_batch():
    assert measurement.choose_batch_size(make_pipeline()) == 16


def test_the_largest_batch_that_fits_is_found(monkeypatch):
    pipe = make_pipeline()
    decode, limit = pipe.detokenize, 100

    def decode_up_to_the_limit(token_ids, *arguments, **options):
        if len(token_ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return decode(token_ids, *arguments, **options)

    monkeypatch.setattr(pipe, "detokenize", decode_up_to_the_limit)
    assert limit // 2 < measurement.largest_batch_size(pipe, 512) <= limit


@pytest.mark.parametrize("size", ["0", "-1", "many", "1.5"])
def test_other_batch_sizes_are_refused(size):
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, or `auto`"):
        ReconstructionOptions(data="x", output="y", batch_size=size)


@pytest.mark.parametrize("size", ["auto", "1", "64", 8])
def test_numbers_and_auto_are_accepted(size):
    assert ReconstructionOptions(data="x", output="y", batch_size=size).batch_size == size
