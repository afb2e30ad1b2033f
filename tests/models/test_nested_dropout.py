import pytest
import torch

from flextok_hf.models.nested_dropout import mask_tail, sample_num_tokens


def draw(mode, num_registers):
    return sample_num_tokens(4000, num_registers, mode, torch.Generator().manual_seed(0))


def test_uniform_counts_cover_every_length():
    assert draw("uniform", 12).unique().tolist() == list(range(1, 13))


@pytest.mark.parametrize("num_registers", [1, 6, 16])
def test_powers_of_two_include_one_and_all_registers(num_registers):
    counts = draw("powers_of_two", num_registers).unique().tolist()

    assert counts == sorted({1, num_registers, *(power for power in (1, 2, 4, 8, 16) if power < num_registers)})


def test_rounding_up_gives_half_of_the_samples_all_tokens():
    counts = draw("uniform_rounded_up", 16)

    assert counts.unique().tolist() == [1, 2, 4, 8, 16]
    assert (counts == 16).float().mean() == pytest.approx(0.5, abs=0.03)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="powers_of_two.*'pow3'"):
        sample_num_tokens(4, 16, "pow3")


def test_only_the_tail_is_replaced_and_the_input_is_unchanged():
    registers = torch.randn(3, 5, 4)
    before, mask_token = registers.clone(), torch.randn(4)

    masked = mask_tail(registers, torch.tensor([5, 2, 0]), mask_token)

    assert torch.equal(masked[0], registers[0])
    assert torch.equal(masked[1, :2], registers[1, :2]) and (masked[1, 2:] == mask_token).all()
    assert (masked[2] == mask_token).all()
    assert torch.equal(registers, before)
