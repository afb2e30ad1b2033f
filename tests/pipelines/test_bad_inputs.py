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
        lambda pipe: pipe("a", num_images_per_prompt=0), ValueError, "`num_images_per_prompt`", "from 1 to"
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


NAN, INF = float("nan"), float("inf")
HUGE = 10**400


def noise(*shape):
    return torch.zeros(shape or (1, 3, 16, 16))


def returns(value):
    return lambda pipe, step, timestep, tensors: value


OPTIONS = {  # of every call that decodes
    "guidance_scale": [
        lambda s: None, lambda s: "3", lambda s: NAN, lambda s: True, lambda s: HUGE, lambda s: torch.tensor(1.0),
        lambda s: 1e9, HUGE, -HUGE, 1e30, INF, NAN, "7", True, [7], (), object(),
    ],
    "num_inference_steps": [10**11, HUGE, 1001, 0, -1, 2.0, "5", True, NAN, [5], np.float64(3), object()],
    "guidance": ["agp", 3, ["apg"], True, ""],
    "output_type": ["jpg", 3, ["pil"], np.array(["pil", "pt"]), ""],
    "generator": [0, "seed", [0], np.random.default_rng()],
    "max_tokens": [
        0, -1, 1.5, NAN, "4", True, torch.tensor(0), torch.tensor([[1, 2]]), torch.tensor(2.0), torch.tensor([True]),
        np.array([1.5]), np.array(0), [0], ["4"], [torch.tensor(1.0)], {}, {4}, -HUGE, torch.tensor([]), [],
    ],
}  # fmt: skip
LATENTS = [
    3, [0.0], "noise", np.zeros((1, 3, 16, 16)), noise(1, 3, 0, 0), noise(1, 3, 0, 16), noise(3, 16, 16), noise(1),
    noise(0, 3, 16, 16), noise(1, 3, 20, 16), noise(1, 3, 32, 32), noise(1, 3, 15, 16), noise(1, 4, 16, 16),
    noise() * NAN, noise() + INF, noise().long(), noise().bool(), noise().to(torch.complex64),
]  # fmt: skip
CALLBACKS = [returns(3), returns("latents"), returns([noise()]), returns(noise()), returns({"latents": None})]
CALLBACKS += [returns({"latents": noise(1)}), returns({"latent": noise()}), returns({3: noise()}), 3, "watch"]
CASES = [(name, value) for name, values in OPTIONS.items() for value in values]


def names_the_argument(call, name, **arguments):
    with pytest.raises((ValueError, TypeError), match=f"`{name}") as caught:
        call(**arguments)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name, value", CASES, ids=lambda value: None if isinstance(value, str) else repr(value)[:20])
def test_every_call_that_decodes_names_a_wrong_option(tiny_pipeline, name, value):
    names_the_argument(tiny_pipeline, name, **{"prompt": "a star", "num_inference_steps": 1, name: value})
    if name == "max_tokens":
        names_the_argument(tiny_pipeline.tokenize, name, images=IMAGE, max_tokens=value)
        names_the_argument(tiny_pipeline.generate_tokens, name, prompt="a", max_tokens=value)
    else:
        names_the_argument(tiny_pipeline.detokenize, name, **{"token_ids": IDS, "num_inference_steps": 1, name: value})
        shown = {"prompt": "a", "token_counts": [1], "num_inference_steps": 1, name: value}
        names_the_argument(lambda **given: list(tiny_pipeline.stream(**given)), name, **shown)
    given = {"images": IMAGE, "max_tokens": 1, "num_inference_steps": 1, name: value}
    names_the_argument(tiny_pipeline.reconstruct, name, **given)


@pytest.mark.parametrize("latents", LATENTS, ids=range(len(LATENTS)))
def test_latents_that_are_not_noise_are_refused_before_the_prior_runs(tiny_pipeline, latents, monkeypatch):
    monkeypatch.setattr(tiny_pipeline.prior, "generate", lambda **options: pytest.fail("the prior has already run"))
    names_the_argument(tiny_pipeline, "latents", prompt="a star", latents=latents)
    names_the_argument(tiny_pipeline.stream, "latents", prompt="a star", latents=latents)
    names_the_argument(tiny_pipeline.detokenize, "latents", token_ids=IDS, latents=latents)


@pytest.mark.parametrize("latents", [noise().double(), noise().half(), noise(1, 3, 8, 16), noise(1, 3, 4, 4)])
def test_noise_of_any_precision_and_size_that_fits_is_accepted(tiny_pipeline, latents):
    output = tiny_pipeline.detokenize(IDS, 1, latents=latents, output_type="latent").images
    assert output.shape == latents.shape and output.dtype == torch.float32


@pytest.mark.parametrize("callback", CALLBACKS, ids=range(len(CALLBACKS)))
def test_a_callback_that_returns_no_dictionary_of_latents_is_refused(tiny_pipeline, callback):
    options = {"num_inference_steps": 1, "callback_on_step_end": callback}
    names_the_argument(tiny_pipeline.detokenize, "callback_on_step_end", token_ids=IDS, **options)
    names_the_argument(tiny_pipeline, "callback_on_step_end", prompt="a star", **options)


@pytest.mark.parametrize("names", ["latents", ["noise"], [3], None, ["latents", "prompt_embeds"], 5])
def test_a_callback_can_only_ask_for_tensors_that_exist(tiny_pipeline, names):
    name = "callback_on_step_end_tensor_inputs"
    names_the_argument(
        tiny_pipeline.detokenize, name, token_ids=IDS, callback_on_step_end=returns({}), **{name: names}
    )


@pytest.mark.parametrize(
    "prompt", ["\ud83d", "a \udfff cat", ["a", "\ud800"], "\udc41\ud83d", b"a", ["a", b"b"], [""][:0]]
)
def test_prompts_that_are_not_text_are_refused(tiny_pipeline, prompt):
    for call in (tiny_pipeline, tiny_pipeline.generate_tokens, tiny_pipeline.stream):
        names_the_argument(call, "prompt", prompt=prompt)
        names_the_argument(call, "negative_prompt", prompt="a", negative_prompt=prompt)
    names_the_argument(tiny_pipeline.encode_prompt, "prompt", prompt=prompt)


def test_characters_of_two_halves_are_text(tiny_pipeline):
    assert tiny_pipeline.generate_tokens("a \U0001f408 cat").shape == (1, NUM_REGISTERS)


@pytest.mark.parametrize(
    "counts", [[], (), [0], [2.0], ["a"], [True], [None], np.array([1.5]), torch.tensor([0]), "12", {1: 2}]
)
def test_the_counts_of_a_stream_are_named_as_the_caller_named_them(tiny_pipeline, counts):
    with pytest.raises(ValueError, match="`token_counts`") as caught:
        tiny_pipeline.stream("a", token_counts=counts)
    assert "max_tokens" not in str(caught.value)


def test_several_numbers_of_tokens_for_one_call_of_tokenize_are_refused(tiny_pipeline):
    with pytest.raises(ValueError, match=r"`max_tokens` must be a whole number of 1 or more, got \[4, 8\]"):
        tiny_pipeline.tokenize(torch.stack([IMAGE, IMAGE]), max_tokens=[4, 8])


@pytest.mark.parametrize(
    "number", [torch.tensor(3), np.int64(3), np.array(3), np.uint8(3), torch.tensor(3, dtype=torch.int16)]
)
def test_scalars_of_numpy_and_torch_are_numbers_of_tokens(tiny_pipeline, number):
    assert tiny_pipeline.tokenize(IMAGE, number).shape == (1, 3)
    assert tiny_pipeline.generate_tokens("a", number).shape == (1, 3)
    assert [len(ids) for ids in tiny_pipeline.generate_tokens(["a", "b"], [number, 2])] == [3, 2]
    assert len(tiny_pipeline.reconstruct(IMAGE, number, num_inference_steps=1)) == 1
    assert len(tiny_pipeline.reconstruct(IMAGE, [number, 1], num_inference_steps=1)) == 2
    assert [count for count, _ in tiny_pipeline.stream("a", [1, number], num_inference_steps=1)] == [1, 3]


@pytest.mark.parametrize("numbers", [torch.tensor([2, 4]), np.array([2, 4], dtype=np.uint8), (2, 4), range(2, 5, 2)])
def test_lists_of_numbers_of_tokens_may_be_tensors(tiny_pipeline, numbers):
    assert [len(ids) for ids in tiny_pipeline.generate_tokens(["a", "b"], numbers)] == [2, 4]
    assert len(tiny_pipeline.reconstruct(IMAGE, numbers, num_inference_steps=1)) == 2
    assert [count for count, _ in tiny_pipeline.stream("a", numbers, num_inference_steps=1)] == [2, 4]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64])
def test_numpy_scalars_are_numbers(tiny_pipeline, kind):
    options = dict.fromkeys(("guidance_scale", "prior_guidance_scale", "temperature", "top_p", "top_k"), kind(1))
    whole = dict.fromkeys(("num_inference_steps", "num_images_per_prompt", "keep_tokens"), np.int32(1))
    output = tiny_pipeline("a star", token_ids=IDS, **options, **whole, output_type="latent")
    assert output.token_ids.shape == (1, NUM_REGISTERS)
    tiny_pipeline.detokenize(IDS, 1, guidance_scale=lambda sigma: kind(2), output_type="latent")


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "prior_guidance_scale"])
@pytest.mark.parametrize("value", [HUGE, -HUGE, 1e-30, -1e30, "1", None, [1], object(), torch.tensor(1.0), 1j])
def test_values_that_would_overflow_in_the_prior_are_refused(tiny_pipeline, name, value):
    if (name, value) in [("prior_guidance_scale", None), ("prior_guidance_scale", 1e-30), ("top_p", 1e-30)]:
        return  # means the default, or is small but valid
    for call in (tiny_pipeline, tiny_pipeline.generate_tokens, tiny_pipeline.stream):
        names_the_argument(call, name, prompt="a star", **{name: value})


def test_an_overflow_in_the_decoder_is_an_error_and_not_an_image(tiny_pipeline):
    def overflow(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * INF}

    with pytest.raises(ValueError, match="latents are not finite"):
        tiny_pipeline.detokenize(IDS, 2, callback_on_step_end=overflow)
