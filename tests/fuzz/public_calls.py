"""Every public call with valid arguments, and values to put in the place of each.

Letters: B batch, C latent channels, h w latent grid, K registers, Q code dimensions.
"""

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from outcomes import judge
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from tiny_models import (
    CODEBOOK_SIZE,
    FSQ_LEVELS,
    NUM_REGISTERS,
    SHAPES,
    make_decoder,
    make_encoder,
    make_prior,
    make_text_pipeline,
)

from flextok_hf import FlexTokEncoderConfig, FlexTokFlowDecoder, FlexTokPipeline, FlexTokPriorConfig
from flextok_hf.models.quantizer import FiniteScalarQuantizer
from flextok_hf.pipelines.bulk_tokenization import tokenize_batches


NAN, INF = float("nan"), float("inf")
MEAN_VELOCITY = {"predicts": "mean_velocity", "interval_blocks": 1, "guidance_range": [1.0, 4.0]}

# Values by name: a new one for each use, since a call may keep what it is given.
VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "3": lambda: 3,
    "10**11": lambda: 10**11,
    "10**400": lambda: 10**400,
    "1.5": lambda: 1.5,
    "-0.5": lambda: -0.5,
    "1e308": lambda: 1e308,
    "nan": lambda: NAN,
    "inf": lambda: INF,
    "2j": lambda: 2j,
    "''": lambda: "",
    "'x'": lambda: "x",
    "long text": lambda: "x " * 50_000,
    "lone surrogate": lambda: "a \ud800 cat",
    "null character": lambda: "a\0cat",
    "b'x'": lambda: b"x",
    "[]": lambda: [],
    "[None]": lambda: [None],
    "[1, 2]": lambda: [1, 2],
    "['a', 3]": lambda: ["a", 3],
    "[[1], [2, 3]]": lambda: [[1], [2, 3]],
    "()": lambda: (),
    "{}": lambda: {},
    "{1}": lambda: {1},
    "range(2)": lambda: range(2),
    "object": object,
    "function": lambda: lambda *args, **kwargs: None,
    "np.int64(2)": lambda: np.int64(2),
    "np.float32(0.5)": lambda: np.float32(0.5),
    "np.bool_(True)": lambda: np.bool_(True),
    "np.str_('a')": lambda: np.str_("a"),
    "np.float64(nan)": lambda: np.float64(NAN),
    "np.array([])": lambda: np.array([]),
    "np.array([1, 2])": lambda: np.array([1, 2]),
    "np.array(['a'])": lambda: np.array(["a"]),
    "np objects": lambda: np.array([None, "a"], dtype=object),
    "tensor(2)": lambda: torch.tensor(2),
    "tensor(0.5)": lambda: torch.tensor(0.5),
    "tensor([])": lambda: torch.tensor([]),
    "tensor(nan)": lambda: torch.full((2, 3, 16, 16), NAN),
    "tensor(inf)": lambda: torch.full((1, 3, 16, 16), INF),
    "tensor, large": lambda: torch.full((2, 4), 10**9),
    "tensor, negative": lambda: torch.full((2, 4), -3),
    "tensor, bool": lambda: torch.ones(2, 4, dtype=torch.bool),
    "tensor, complex": lambda: torch.ones(2, 3, 16, 16, dtype=torch.complex64),
    "tensor, empty images": lambda: torch.zeros(2, 3, 0, 0),
    "tensor, no batch": lambda: torch.zeros(0, 3, 16, 16),
    "tensor, five dimensions": lambda: torch.zeros(1, 1, 3, 16, 16),
    "image of one pixel": lambda: Image.new("L", (1, 1)),
    "path": lambda: Path("nowhere/image.png"),
    "torch.float16": lambda: torch.float16,
    "generator": lambda: torch.Generator().manual_seed(0),
}  # fmt: skip

# Values that mean the same as plain numbers, and so must give the same result where these are allowed.
TWINS = {"np.int64(2)": 2, "np.float32(0.5)": 0.5, "np.array([1, 2])": [1, 2]}


@dataclass
class Call:
    """A public call.

    Attributes:
        run: takes the arguments by name.
        valid: valid values of the arguments.
        aliases: further names by which an error may call an argument.
        errors: allowed types; files that cannot be read are OSErrors.
        passes_on: whether values that are not finite may come out where they went in: models run on accelerators,
            where looking at every value would stall them.
    """

    run: Callable[..., Any]
    valid: dict[str, Any]
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    errors: tuple[type[Exception], ...] = (ValueError, TypeError)
    passes_on: bool = False

    def judge(self, values: dict[str, str]) -> str | None:
        """Return what is wrong when these arguments are replaced by these values, or `None`."""
        arguments = {**self.valid, **{name: VALUES[value]() for name, value in values.items()}}
        names = [*values, *(alias for name in values for alias in self.aliases.get(name, ()))]

        def run():
            torch.manual_seed(0)
            return self.run(**arguments)

        return judge(run, names, self.errors, self.passes_on)


def public_calls(text: FlexTokPipeline, classes: FlexTokPipeline) -> dict[str, Call]:
    """Return the public calls by name, on pipelines with text and with classes."""
    return {**pipeline_calls(text, classes), **adapter_calls(), **model_calls(text, classes), **configurations()}


def pipeline_calls(text: FlexTokPipeline, classes: FlexTokPipeline) -> dict[str, Call]:
    image, ids = torch.full((3, 16, 16), 0.5), torch.tensor([[3, 4, 5]])
    generator = torch.Generator().manual_seed(0)
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "generator": generator, "prior_guidance_scale": 1.5}
    decoding = {"num_inference_steps": 2, "guidance_scale": 2.0, "guidance": "apg", "output_type": "pt"}
    prefix = {"image": None, "token_ids": None, "keep_tokens": None}
    called = {"max_tokens": 2, "num_images_per_prompt": 1, **sampling, **decoding, "latents": None, **prefix}
    size = {"height": None, "width": 16}
    called = {**called, **size, "callback_on_step_end": None}
    read = {"max_tokens": ("token_counts",), "image": ("images",), "keep_tokens": ("image", "token_ids")}
    read = {**read, "token_ids": ("`token_ids", "ids"), "prompt": ("prompts",)}
    files = (ValueError, TypeError, OSError)
    written = {"max_tokens": 2, "num_images_per_prompt": 1, **sampling, **prefix, **size}
    return {
        "pipe(prompt)": Call(text, {"prompt": "a cat", **called}, aliases=read, errors=files),
        "pipe(class_labels)": Call(classes, {"class_labels": [1], **called}, aliases=read, errors=files),
        "generate_tokens": Call(text.generate_tokens, {"prompt": "a cat", **written}, aliases=read, errors=files),
        "stream": Call(
            lambda **arguments: list(text.stream(**arguments)),
            {"prompt": "a cat", "token_counts": [1, 2], **sampling, **decoding, "class_labels": None, **size},
            aliases=read,
        ),
        "encode_prompt": Call(text.encode_prompt, {"prompt": "a cat"}, aliases=read),
        "prompt_notes": Call(text.prompt_notes, {"prompt": "a cat"}, aliases=read),
        "tokenize": Call(text.tokenize, {"images": image, "max_tokens": 2, "size": None}, errors=files),
        "tokenize_pixels": Call(
            text.tokenize_pixels,
            {"pixels": image[None], "max_tokens": 2},
            aliases={"pixels": ("latents",)},
            passes_on=True,
        ),
        "detokenize": Call(
            text.detokenize,
            {
                "token_ids": ids,
                **decoding,
                "generator": generator,
                "latents": None,
                **size,
                "callback_on_step_end": None,
            },
            aliases=read,
        ),
        "reconstruct": Call(
            text.reconstruct,
            {"images": image, "max_tokens": [1, 2], **decoding, "generator": generator, "size": None},
            errors=files,
        ),
        "tokenize_batches": Call(
            lambda **arguments: list(tokenize_batches(text, **arguments)),
            {"batches": [image[None]], "max_tokens": 2},
            aliases={"batches": ("pixels",)},
        ),
    }


def adapter_calls() -> dict[str, Call]:
    pipe, folder = make_text_pipeline(), Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["to_q"]), pipe.decoder, "a")
    pipe.save_lora_weights(folder)

    def load(**arguments):
        other = make_text_pipeline()
        other.load_lora_weights(**arguments)
        return other.get_active_adapters()

    def fuse(**arguments):
        other = FlexTokPipeline.from_pipe(pipe)
        other.fuse_lora(**arguments)
        other.unfuse_lora()

    def save(**arguments):
        pipe.save_lora_weights(Path(tempfile.mkdtemp(dir=folder)), **arguments)

    losing = make_text_pipeline()

    def delete(**arguments):
        if "a" not in losing.get_active_adapters():
            losing.load_lora_weights(folder, adapter_name="a")
        losing.delete_adapters(**arguments)

    loaded = {"pretrained_model_name_or_path": folder, "adapter_name": "b", "weight_name": None, "subfolder": None}
    return {
        "load_lora_weights": Call(load, loaded, errors=(ValueError, TypeError, OSError)),
        "save_lora_weights": Call(save, {"adapter_name": "a", "prompts": ["a cat"], "notes": ["For a test."]}),
        "delete_adapters": Call(delete, {"adapter_names": ["a"]}),
        "set_adapters": Call(pipe.set_adapters, {"adapter_names": ["a"], "adapter_weights": [1.0]}),
        "fuse_lora": Call(fuse, {"lora_scale": 1.0, "adapter_names": None}),
    }


def model_calls(text: FlexTokPipeline, classes: FlexTokPipeline) -> dict[str, Call]:
    latents, codes = torch.randn(2, 3, 16, 16), torch.zeros(2, 3, len(FSQ_LEVELS))
    ids = torch.tensor([[CODEBOOK_SIZE, 3, 4], [CODEBOOK_SIZE, 0, 9]])
    encoder, decoder, prior, class_prior = make_encoder(), make_decoder(), text.prior, classes.prior
    shape_prior = make_prior(text_hidden_size=None, shape_conditioning=True)
    states = torch.randn(2, 4, 32)
    options = {"max_new_tokens": 2, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options |= {"guidance_scale": 1.0, "generator": None, "return_log_probs": False}
    return {
        "encoder": Call(encoder, {"latents": latents, "num_tokens": 2}, passes_on=True),
        "decoder": Call(
            decoder,
            {"noisy_latents": latents, "sigma": torch.tensor([0.5, 0.1]), "codes": codes, "num_tokens": None}
            | {"is_unconditional": None},
            aliases={"noisy_latents": ("latents", "codes", "sigma")},  # the other arguments have its batch size
            passes_on=True,
        ),
        "decoder(mean velocity)": Call(
            make_decoder(**MEAN_VELOCITY),
            {"noisy_latents": latents, "sigma": torch.tensor([0.5, 0.1]), "codes": codes}
            | {"next_sigma": torch.tensor([0.2, 0.0]), "guidance_scale": torch.tensor([2.0])},
            aliases={"noisy_latents": ("latents", "codes", "sigma")},
            passes_on=True,
        ),
        "prior(text)": Call(
            prior,
            {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": None, "labels": None}
            | {"attention_mask": None, "position_ids": None, "logits_to_keep": 0},
        ),
        "prior(classes)": Call(class_prior, {"input_ids": ids, "class_labels": torch.tensor([0, 2])}),
        "prior(shape)": Call(shape_prior, {"input_ids": ids, "shape_features": torch.zeros(2, 2)}),
        "prior.generate(text)": Call(
            prior.generate,
            {"inputs": ids[:, :1], "encoder_hidden_states": states, **options},
            aliases={"inputs": ("input_ids", "encoder_hidden_states"), "guidance_scale": ("negative_encoder",)},
        ),
        "prior.generate(classes)": Call(
            class_prior.generate,
            {"inputs": ids[:, :1], "class_labels": torch.tensor([0, 2]), **options},
            aliases={"inputs": ("input_ids", "class_labels")},
        ),
        "prior.generate(shape)": Call(
            shape_prior.generate,
            {"inputs": ids[:, :1], "shape_features": torch.zeros(2, 2), **options, "guidance_scale": None},
            aliases={"inputs": ("input_ids", "shape_features")},
        ),
        "quantizer": Call(
            FiniteScalarQuantizer(FSQ_LEVELS), {"features": torch.zeros(1, 2, len(FSQ_LEVELS))}, passes_on=True
        ),
    }


def configurations() -> dict[str, Call]:
    encoder = {**SHAPES, "num_hidden_layers": 1, "num_registers": NUM_REGISTERS, "fsq_levels": FSQ_LEVELS}
    decoder = {**SHAPES, "num_layers": 1, "num_registers": NUM_REGISTERS, "code_dim": len(FSQ_LEVELS)}
    strict = (ValueError, TypeError, StrictDataclassError)  # the last as in all configurations of Transformers
    prior = make_prior(text_hidden_size=32).config.to_diff_dict()
    prior = {name: value for name, value in prior.items() if name in FlexTokPriorConfig.__annotations__}
    return {
        "FlexTokEncoderConfig": Call(FlexTokEncoderConfig, {**encoder, "token_layout": "registers"}, errors=strict),
        "FlexTokPriorConfig": Call(FlexTokPriorConfig, prior, errors=strict),
        "FlexTokFlowDecoder": Call(FlexTokFlowDecoder, {**decoder, "token_layout": "registers"}),
        "FlexTokFlowDecoder(mean velocity)": Call(
            FlexTokFlowDecoder, {**decoder, **MEAN_VELOCITY, "default_num_inference_steps": {1: 4, 3: 2}}
        ),
        "FiniteScalarQuantizer": Call(FiniteScalarQuantizer, {"levels": FSQ_LEVELS}),
    }


def random_values(call: Call, draw: random.Random) -> dict[str, str]:
    """Choose one to three arguments of a call and a value for each."""
    names = draw.sample(sorted(call.valid), min(len(call.valid), draw.choice([1, 1, 2, 3])))
    return {name: draw.choice(sorted(VALUES)) for name in names}
