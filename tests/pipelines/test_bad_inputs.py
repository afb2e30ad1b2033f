"""Invalid arguments raise errors that name the argument and say how to fix it."""

import numpy as np
import pytest
import torch
from tiny_models import NUM_REGISTERS


IDS = torch.zeros(1, 4, dtype=torch.int64)
IMAGE = torch.zeros(3, 16, 16)

CALLS = {
    "no prompts": (lambda pipe: pipe([]), ValueError, "`prompt`", "at least one"),
    "a prompt that is not text": (lambda pipe: pipe(3), TypeError, "`prompt`", "a string or a list"),
    "neither prompt nor classes": (lambda pipe: pipe(), ValueError, "`prompt`", "Pass either"),
    "classes for a text prior": (lambda pipe: pipe(class_labels=1), ValueError, "`class_labels`", "Pass a `prompt`"),
    "no tokens": (lambda pipe: pipe("a", max_tokens=0), ValueError, "`max_tokens`", "1 or more"),
    "half a token": (lambda pipe: pipe("a", max_tokens=1.5), ValueError, "`max_tokens`", "whole number"),
    "too few lengths": (lambda pipe: pipe(["a", "b"], max_tokens=[1]), ValueError, "`max_tokens`", "one each"),
    "no images of a prompt": (
        lambda pipe: pipe("a", num_images_per_prompt=0), ValueError, "`num_images_per_prompt`", "1 or more"
    ),
    "no steps": (lambda pipe: pipe("a", num_inference_steps=0), ValueError, "`num_inference_steps`", "from 1 to 1000"),
    "a misspelled guidance": (lambda pipe: pipe("a", guidance="agp"), ValueError, "`guidance`", "apg, cfg"),
    "a guidance scale in words": (
        lambda pipe: pipe("a", guidance_scale="high"), TypeError, "`guidance_scale`", "a finite number"
    ),
    "a misspelled output": (lambda pipe: pipe("a", output_type="pill"), ValueError, "`output_type`", "one of pil"),
    "too few generators": (
        lambda pipe: pipe(["a", "b"], generator=[torch.Generator()]), ValueError, "`generator`", "one per"
    ),
    "a seed for a generator": (lambda pipe: pipe("a", generator=0), TypeError, "`generator`", "manual_seed"),
    "ids beyond the codebook": (lambda pipe: pipe.detokenize(IDS + 15), ValueError, "`token_ids", r"\[0, 15\)"),
    "negative ids": (lambda pipe: pipe.detokenize(IDS - 1), ValueError, "`token_ids", r"\[0, 15\)"),
    "ids that are floats": (lambda pipe: pipe.detokenize(IDS.float()), TypeError, "`token_ids", "`tokenize`"),
    "ids without a batch": (lambda pipe: pipe.detokenize(IDS[0]), ValueError, "`token_ids`", r"token_ids\[None\]"),
    "no ids": (lambda pipe: pipe.detokenize(IDS[:, :0]), ValueError, "`token_ids", f"1 to {NUM_REGISTERS}"),
    "no sequences": (lambda pipe: pipe.detokenize([]), ValueError, "`token_ids`", "at least one"),
    "too many ids": (lambda pipe: pipe.detokenize(IDS.repeat(1, 3)), ValueError, "`token_ids", "Truncate"),
    "noise of another shape": (
        lambda pipe: pipe.detokenize(IDS, latents=torch.zeros(2, 3, 16, 16)), ValueError, "`latents`", r"\(1, 3,"
    ),
    "noise of whole numbers": (
        lambda pipe: pipe.detokenize(IDS, latents=torch.zeros(1, 3, 16, 16).long()), TypeError, "`latents`", "noise"
    ),
    "noise that does not fit the patches": (
        lambda pipe: pipe.detokenize(IDS, latents=torch.zeros(1, 3, 15, 16)), ValueError, "`latents`", "multiple"
    ),
    "pixels that are not numbers": (
        lambda pipe: pipe.tokenize(IMAGE.log() * 0), ValueError, "`images", "nan_to_num"
    ),
    "pixels beyond one": (lambda pipe: pipe.tokenize(IMAGE + 9), ValueError, "`images", "255"),
    "no images": (lambda pipe: pipe.tokenize([]), ValueError, "`images`", ""),
    "no lengths": (lambda pipe: pipe.reconstruct(IMAGE, []), ValueError, "`max_tokens`", "at least one"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_the_error_names_a_bad_argument_and_its_remedy(tiny_pipeline, name):
    call, error, argument, remedy = CALLS[name]
    with pytest.raises(error, match=f"(?s)^{argument}.*{remedy}|{remedy}.*{argument}"):
        call(tiny_pipeline)


def test_bad_sampling_options_are_found_before_the_prior_runs(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(tiny_pipeline.prior, "generate", lambda **options: pytest.fail("the prior has already run"))
    with pytest.raises(ValueError, match="`guidance`"):
        tiny_pipeline("a", guidance="agp")
    with pytest.raises(ValueError, match="`latents`"):
        tiny_pipeline("a", latents=torch.zeros(2, 3, 16, 16))


def test_a_text_file_is_not_an_image(tiny_pipeline, tmp_path):
    path = tmp_path / "image.png"
    path.write_text("not an image")
    with pytest.raises(ValueError, match="image.png"):
        tiny_pipeline.tokenize(path)


def test_a_missing_file_is_named(tiny_pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.png"):
        tiny_pipeline.tokenize(tmp_path / "absent.png")


def test_a_prompt_needs_a_prior(tiny_tokenizer_pipeline):
    with pytest.raises(ValueError, match="no prior.*`tokenize`.*prior="):
        tiny_tokenizer_pipeline("a cat")


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("temperature", 0, ValueError),
        ("temperature", -1.0, ValueError),
        ("temperature", float("nan"), TypeError),
        ("temperature", float("inf"), TypeError),
        ("temperature", "1", TypeError),
        ("temperature", True, TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, ValueError),
        ("top_k", None, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.5, ValueError),
        ("top_p", 2.0, ValueError),
        ("top_p", float("nan"), TypeError),
        ("top_p", True, TypeError),
        ("prior_guidance_scale", float("nan"), TypeError),
        ("prior_guidance_scale", "3", TypeError),
        ("prior_guidance_scale", True, TypeError),
    ],
)
def test_options_of_the_prior_are_checked_before_it_runs(tiny_pipeline, name, value, error):
    for call in (tiny_pipeline, tiny_pipeline.generate_tokens, tiny_pipeline.stream):
        with pytest.raises(error, match=f"`{name}` must be"):
            call("a red circle", **{name: value})


@pytest.mark.parametrize("numbers", [(2, 3), (np.float32(2.0), np.int64(3)), (np.float64(2.0), np.int32(3))])
def test_options_of_the_prior_may_be_any_kind_of_number(tiny_pipeline, numbers):
    def ids(temperature, top_k):
        options = {"temperature": temperature, "top_k": top_k, "top_p": 1, "prior_guidance_scale": 2}
        return tiny_pipeline.generate_tokens("a red circle", generator=torch.Generator().manual_seed(0), **options)

    assert ids(*numbers).equal(ids(2.0, 3))


def test_tokens_alone_are_those_of_the_call(tiny_pipeline):
    options = {"max_tokens": [2, 5], "num_images_per_prompt": 2}
    prompts = ["a red circle", "a blue square on white"]
    alone = tiny_pipeline.generate_tokens(prompts, generator=torch.Generator().manual_seed(1), **options)
    drawn = tiny_pipeline(prompts, generator=torch.Generator().manual_seed(1), num_inference_steps=1, **options)
    assert [row.tolist() for row in alone] == [row.tolist() for row in drawn.token_ids]
