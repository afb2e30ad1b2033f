"""What users of Diffusers' pipelines expect of any pipeline, beyond what `test_pipeline.py` checks."""

import inspect
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from diffusers.hooks import apply_group_offloading
from tiny_models import NUM_REGISTERS, make_pipeline, make_prior

from flextok_hf.cli.arguments import build_parser
from flextok_hf.evaluation.options import ReconstructionOptions
from flextok_hf.evaluation.sampling import Sampling
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline, FlexTokPipelineOutput


FAST = {"num_inference_steps": 2, "output_type": "latent"}
PROMPTS = ["a star", "two crosses, one above the other"]
IDS = torch.tensor([[1, 2], [3, 4]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def equal(one, other):
    return torch.equal(one.token_ids, other.token_ids) and torch.equal(one.images, other.images)


def clone(pipe, folder, **options):
    pipe.save_pretrained(folder)
    loaded = FlexTokPipeline.from_pretrained(folder, **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


# Prompts


def test_encoded_prompts_give_the_same_images_as_their_texts(tiny_pipeline):
    states, mask = tiny_pipeline.encode_prompt(PROMPTS)
    options = {"num_images_per_prompt": 2, **FAST}
    by_text = tiny_pipeline(PROMPTS, generator=seeded(), **options)
    encoded = {"prompt_embeds": states, "prompt_attention_mask": mask}
    assert equal(by_text, tiny_pipeline(**encoded, generator=seeded(), **options))
    tokens = tiny_pipeline.generate_tokens(**encoded, num_images_per_prompt=2, generator=seeded())
    assert torch.equal(tokens, by_text.token_ids)
    first = {"prompt_embeds": states[:1], "prompt_attention_mask": mask[:1].bool()}
    shown = list(tiny_pipeline.stream(**first, token_counts=[6], generator=seeded(), **FAST))
    assert torch.equal(shown[0][1], tiny_pipeline(PROMPTS[0], generator=seeded(), **FAST).images[0])


def test_prompts_are_encoded_without_the_other_components_and_used_without_the_text_encoder(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    reader = FlexTokPipeline.from_pretrained(tmp_path, encoder=None, decoder=None, prior=None)
    writer = FlexTokPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    for pipe in (reader, writer):
        pipe.set_progress_bar_config(disable=True)
    states, mask = reader.encode_prompt(PROMPTS)
    negative, negative_mask = reader.encode_prompt("")
    encoded = {"prompt_embeds": states, "prompt_attention_mask": mask}
    encoded |= {"negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask}
    output = writer(**encoded, generator=seeded(), **FAST)
    assert equal(output, tiny_pipeline(PROMPTS, generator=seeded(), **FAST))
    with pytest.raises(ValueError, match="no text encoder for `prompt`"):
        writer("a star")


def test_without_a_mask_the_whole_of_an_encoded_prompt_counts(tiny_pipeline):
    states, mask = tiny_pipeline.encode_prompt(PROMPTS[1])
    assert mask.all()
    output = tiny_pipeline(prompt_embeds=states, generator=seeded(), **FAST)
    assert equal(output, tiny_pipeline(PROMPTS[1], generator=seeded(), **FAST))


def test_an_empty_negative_prompt_is_the_default_and_another_changes_the_tokens(tiny_pipeline):
    def generate(**options):
        generators = [seeded(number) for number in range(8)]
        prompts = [PROMPTS[number % 2] for number in range(8)]
        return tiny_pipeline.generate_tokens(prompts, prior_guidance_scale=8.0, generator=generators, **options)

    default, negative = generate(), generate(negative_prompt="a blue square on white")
    assert torch.equal(default, generate(negative_prompt="")) and not torch.equal(default, negative)
    each = generate(negative_prompt=["a blue square on white"] * 8)
    assert torch.equal(negative, each)
    states, mask = tiny_pipeline.encode_prompt("a blue square on white")
    assert torch.equal(negative, generate(negative_prompt_embeds=states, negative_prompt_attention_mask=mask))


def test_a_negative_prompt_of_each_prompt_serves_all_its_images(tiny_pipeline):
    options = {"prior_guidance_scale": 8.0, "num_images_per_prompt": 2}
    generators = [seeded(number) for number in range(4)]
    both = tiny_pipeline.generate_tokens(PROMPTS, negative_prompt=["a star", ""], generator=generators, **options)
    for number, negative in enumerate(["a star", ""]):
        alone = {"negative_prompt": negative, "generator": [seeded(2 * number), seeded(2 * number + 1)]}
        tokens = tiny_pipeline.generate_tokens(PROMPTS[number], **alone, **options)
        assert torch.equal(tokens, both[2 * number : 2 * number + 2])


STATES, MASK = torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.long)
BAD_TEXTS = {
    "both": ({"prompt": "a", "prompt_embeds": STATES}, ValueError, "`prompt` or `prompt_embeds`"),
    "both negatives": ({"negative_prompt": "a", "negative_prompt_embeds": STATES}, ValueError, "`negative_prompt` or"),
    "a mask alone": ({"prompt_attention_mask": MASK}, ValueError, "`prompt_attention_mask` belongs"),
    "a negative mask alone": (
        {"negative_prompt_attention_mask": MASK},
        ValueError,
        "`negative_prompt_attention_mask`",
    ),
    "no tensor": ({"prompt_embeds": [[1.0]]}, TypeError, "`prompt_embeds` must be a tensor"),
    "whole numbers": ({"prompt_embeds": STATES.long()}, TypeError, "`prompt_embeds` must be a tensor of floats"),
    "another width": ({"prompt_embeds": STATES[..., :31]}, ValueError, "`prompt_embeds` must have the shape"),
    "no text at all": ({"prompt_embeds": STATES[:, :0]}, ValueError, "`prompt_embeds` must have the shape"),
    "no batch": ({"prompt_embeds": STATES[0]}, ValueError, "`prompt_embeds` must have the shape"),
    "NaN": ({"prompt_embeds": STATES * float("nan")}, ValueError, "`prompt_embeds` contains values"),
    "a mask of floats": (
        {"prompt_embeds": STATES, "prompt_attention_mask": MASK.float()},
        TypeError,
        "_mask` must be",
    ),
    "an empty mask": ({"prompt_embeds": STATES, "prompt_attention_mask": MASK * 0}, ValueError, "a 1 in every row"),
    "a short mask": (
        {"prompt_embeds": STATES, "prompt_attention_mask": MASK[:, 1:]},
        ValueError,
        "must have the shape",
    ),
    "three negatives": ({"prompt": PROMPTS, "negative_prompt": ["a"] * 3}, ValueError, "3 negative prompts"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_encoded_prompts_that_do_not_fit_are_named(tiny_pipeline, name):
    given, error, words = BAD_TEXTS[name]
    prompt = {} if "prompt_embeds" in given else {"prompt": "a star"}
    for call in (tiny_pipeline, tiny_pipeline.generate_tokens):
        with pytest.raises(error, match=words):
            call(**{**prompt, **given})


@pytest.mark.parametrize(
    "given", [{"negative_prompt": "a"}, {"prompt_embeds": STATES}, {"prompt_attention_mask": MASK}]
)
def test_a_class_conditional_prior_takes_no_texts(tiny_class_pipeline, given):
    (name,) = given
    with pytest.raises(ValueError, match=name):
        tiny_class_pipeline(class_labels=1, **given)


# Callbacks


def test_a_callback_gets_the_tensors_that_it_asks_for(tiny_tokenizer_pipeline):
    seen = []
    options = {"callback_on_step_end": lambda *given: seen.append(set(given[3])), **FAST}
    for names in ([], ["latents"], ("latents",), FlexTokPipeline._callback_tensor_inputs):
        tiny_tokenizer_pipeline.detokenize(IDS, callback_on_step_end_tensor_inputs=names, **options)
    assert seen == [set()] * 2 + [{"latents"}] * 6


def test_a_callback_stops_its_run_and_no_other(tiny_pipeline):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        steps.append(step)

    steps = []
    options = {"generator": seeded(), "num_inference_steps": 9, "output_type": "latent"}
    stopped = tiny_pipeline("a star", callback_on_step_end=stop, **options)
    assert steps == [0, 1, 2] and tiny_pipeline.interrupt is False and tiny_pipeline.num_timesteps is None
    whole = tiny_pipeline("a star", **{**options, "generator": seeded()})
    assert torch.equal(stopped.token_ids, whole.token_ids) and not torch.equal(stopped.images, whole.images)


def test_a_callback_can_change_the_last_latents(tiny_pipeline):
    def blank(pipe, step, timestep, tensors):
        return {"latents": tensors["latents"] * (step < pipe.num_timesteps - 1)}

    assert not tiny_pipeline("a star", callback_on_step_end=blank, **FAST).images.any()


def test_callback_objects_of_diffusers_bring_their_tensor_names(tiny_tokenizer_pipeline):
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    halve = Halve(cutoff_step_ratio=1.0)
    options = {"generator": seeded(), **FAST}
    output = tiny_tokenizer_pipeline.detokenize(IDS, callback_on_step_end=halve, **options).images
    plain = tiny_tokenizer_pipeline.detokenize(IDS, **{**options, "generator": seeded()}).images
    assert not torch.equal(output, plain)


def test_progress_is_shown_for_tokens_and_steps_unless_it_is_disabled(tiny_pipeline, capsys):
    pipe = FlexTokPipeline(**tiny_pipeline.components)
    pipe.set_progress_bar_config(mininterval=0)
    output = pipe("a star", generator=seeded(), **FAST)
    shown = capsys.readouterr().err
    assert f"{NUM_REGISTERS}/{NUM_REGISTERS}" in shown and "2/2" in shown
    pipe.set_progress_bar_config(disable=True)
    assert equal(output, pipe("a star", generator=seeded(), **FAST))
    list(pipe.stream("a star", **FAST))
    pipe.generate_tokens("a star")
    assert capsys.readouterr().err == ""


# Outputs and defaults


def test_reconstruct_returns_an_output_on_request(tiny_tokenizer_pipeline):
    pixels = torch.rand(2, 3, 16, 16, generator=seeded())
    batches = tiny_tokenizer_pipeline.reconstruct(pixels, [1, 4], generator=seeded(), **FAST)
    output = tiny_tokenizer_pipeline.reconstruct(pixels, [1, 4], generator=seeded(), return_dict=True, **FAST)
    assert isinstance(output, FlexTokPipelineOutput) and len(output.images) == len(batches) == 2
    assert all(torch.equal(one, other) for one, other in zip(output.images, batches, strict=True))
    assert torch.equal(output.token_ids, tiny_tokenizer_pipeline.tokenize(pixels, 4))


def test_every_call_leaves_the_number_of_steps_to_the_model():
    calls = (FlexTokPipeline.__call__, FlexTokPipeline.stream, FlexTokPipeline.detokenize, FlexTokPipeline.reconstruct)
    defaults = {inspect.signature(call).parameters["num_inference_steps"].default for call in calls}
    commands = (["generate", "a"], ["stream", "a"], ["detokenize", "ids.json"], ["reconstruct", "photo.jpg"])
    defaults |= {
        build_parser().parse_args([*command, "--output", "out.png"]).num_inference_steps for command in commands
    }
    defaults |= {Sampling.num_inference_steps, ReconstructionOptions.num_inference_steps}
    assert defaults == {None}


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("prompts", [["a star"], PROMPTS])
def test_every_prompt_gives_as_many_images_as_asked(tiny_pipeline, num_images, prompts):
    output = tiny_pipeline(prompts, num_images_per_prompt=num_images, **FAST)
    assert len(output.images) == len(output.token_ids) == len(prompts) * num_images


# Copies, precision, loading


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_from_pipe_keeps_components_and_their_precision(tiny_pipeline, tmp_path, dtype):
    pipe = clone(tiny_pipeline, tmp_path, dtype=dtype)
    other = FlexTokPipeline.from_pipe(pipe)
    assert all(other.components[name] is part for name, part in pipe.components.items())
    assert other.dtype == other.decoder.dtype == other.prior.dtype == other.text_encoder.dtype == dtype
    assert other.config.default_guidance_scale == pipe.config.default_guidance_scale


def test_from_pipe_leaves_a_pipeline_of_mixed_precision_as_it_is(tiny_pipeline, tmp_path):
    pipe = clone(tiny_pipeline, tmp_path, dtype={"prior": torch.bfloat16, "default": torch.float32})
    FlexTokPipeline.from_pipe(pipe, prior=None)
    assert pipe.prior.dtype == torch.bfloat16 and pipe.decoder.dtype == torch.float32
    assert FlexTokPipeline.from_pipe(pipe, dtype=torch.float32).prior.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_saving_and_changes_images_little(tiny_pipeline, tmp_path, dtype):
    half = clone(tiny_pipeline, tmp_path / "full", dtype=dtype)
    again = clone(half, tmp_path / "half", dtype=dtype)
    image = torch.rand(1, 3, 16, 16, generator=seeded())
    token_ids = tiny_pipeline.tokenize(image)
    options = {"guidance_scale": 1.0, "output_type": "latent"}
    exact, rounded, same = (
        pipe.detokenize(token_ids, 2, generator=seeded(), **options).images for pipe in (tiny_pipeline, half, again)
    )
    assert torch.equal(rounded, same)
    torch.testing.assert_close(rounded, exact, atol=0.3, rtol=0.1)
    assert half.to(torch.float32).decoder.dtype == torch.float32


@pytest.mark.parametrize("missing", [["text_encoder", "tokenizer"], ["prior"], ["vae"]])
def test_optional_components_stay_missing_after_saving(tiny_pipeline, tmp_path, missing):
    pipe = clone(FlexTokPipeline(**{**tiny_pipeline.components, **dict.fromkeys(missing)}), tmp_path)
    assert all(getattr(pipe, name) is None for name in missing)
    assert torch.equal(pipe.tokenize(torch.zeros(3, 16, 16)), tiny_pipeline.tokenize(torch.zeros(3, 16, 16)))


def test_the_generic_pipeline_class_loads_ours(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is FlexTokPipeline is diffusers.FlexTokPipeline
    assert equal(pipe("a star", generator=seeded(), **FAST), tiny_pipeline("a star", generator=seeded(), **FAST))


@pytest.mark.slow
def test_importing_the_package_is_enough_for_the_generic_class(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    program = (
        f"from diffusers import DiffusionPipeline\nprint(type(DiffusionPipeline.from_pretrained({str(tmp_path)!r})))"
    )
    plain, imported = (
        subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True, timeout=300)
        for start in ("", "import flextok_hf\n")
    )
    assert "FlexTokPipeline" in imported.stdout, imported.stderr
    assert plain.returncode and "FlexTokPipeline" in plain.stderr


def test_group_offloading_gives_the_same_images(tiny_pipeline, tmp_path):
    pipe = clone(tiny_pipeline, tmp_path)
    expected = pipe("a star", generator=seeded(), **FAST)
    for part in (pipe.encoder, pipe.decoder, pipe.prior, pipe.text_encoder):
        options = {"offload_type": "block_level", "num_blocks_per_group": 1}
        apply_group_offloading(part, torch.device("cpu"), torch.device("cpu"), **options)
    output = pipe("a star", generator=seeded(), **FAST)
    assert torch.equal(output.token_ids, expected.token_ids)
    torch.testing.assert_close(output.images, expected.images, atol=1e-5, rtol=0)


def test_slices_and_tiles_are_options_of_the_vae():
    vae = AutoencoderKL(latent_channels=3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()
    pipe = make_pipeline(vae=vae)
    image = torch.rand(2, 3, 16, 16, generator=seeded())
    expected = pipe.reconstruct(image, [6], 1, generator=seeded(), output_type="np")[0]
    pipe.vae.enable_slicing()
    assert np.allclose(pipe.reconstruct(image, [6], 1, generator=seeded(), output_type="np")[0], expected, atol=1e-5)


# Compilation


def test_compilation_covers_vae_and_text_encoder_on_request_and_can_be_undone(tiny_pipeline):
    vae = AutoencoderKL(latent_channels=3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval()
    text_encoder = type(tiny_pipeline.text_encoder)(tiny_pipeline.text_encoder.config).eval()
    parts = {"vae": vae, "prior": make_prior(text_hidden_size=32), "text_encoder": text_encoder}
    pipe = make_pipeline(**parts, tokenizer=tiny_pipeline.tokenizer)
    plain = pipe("a star", generator=seeded(), **{**FAST, "output_type": "pt"})

    def compiled():
        modules = {"encoder": pipe.encoder.blocks[0], "decoder": pipe.decoder.transformer_blocks[0]}
        modules |= {"vae": vae.decoder, "text_encoder": text_encoder}
        return {name for name, module in modules.items() if module._compiled_call_impl is not None}

    assert compiled() == set()
    pipe.enable_compile(backend="eager")
    assert compiled() == {"encoder", "decoder"} and pipe.prior_options
    pipe.enable_compile(with_vae=True, with_text_encoder=True, backend="eager")
    assert compiled() == {"encoder", "decoder", "vae", "text_encoder"}
    output = pipe("a star", generator=seeded(), **{**FAST, "output_type": "pt"})
    assert torch.equal(output.token_ids, plain.token_ids)
    torch.testing.assert_close(output.images, plain.images, atol=1e-4, rtol=0)
    pipe.disable_compile()
    assert compiled() == set() and pipe.prior_options == {}
    assert equal(pipe("a star", generator=seeded(), **{**FAST, "output_type": "pt"}), plain)
