"""FlexTokPipeline: prompt or image -> token ids -> image.

Letters: B batch, C latent channels, h w latent grid, K registers, Q code dimensions.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_loading_utils
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cards.model_card import CardMixin
from ..embedded import is_official
from ..models.argument_checks import check_tensor
from ..models.latents import check_token_ids, decode_latents, encode_latents
from ..models.modeling_decoder import FlexTokFlowDecoder
from ..models.modeling_encoder import FlexTokEncoder
from ..models.modeling_prior import FlexTokPriorForCausalLM
from . import token_checks as tokens
from .adapters import AdapterMixin
from .compatibility import check_components
from .conditions import GivenTexts
from .decoder_half import DecoderHalf, StepCallback
from .guided_velocity import GuidanceScale
from .images import pixels_to_values, prepare_each, to_output
from .input_checks import spread_generators
from .offloading import OffloadingMixin
from .prior_half import PriorHalf
from .saved_folders import load_checked
from .sizes import FlexTokTokenizerOutput, Size, SizeRules, in_groups


# Diffusers looks up a component's save and load methods by its package. Without these entries, a model index refers to
# our modules by their full path, which loads from a folder but not from the Hub.
METHODS = ["save_pretrained", "from_pretrained"]
OWN_CLASSES = dict.fromkeys(("FlexTokEncoder", "FlexTokFlowDecoder", "FlexTokPriorForCausalLM"), METHODS)
pipeline_loading_utils.LOADABLE_CLASSES["flextok_hf"] = OWN_CLASSES
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(OWN_CLASSES)


DEFAULT_GUIDANCE_SCALE, DEFAULT_PRIOR_GUIDANCE_SCALE = 7.5, 3.0  # of the published models


@dataclass
class FlexTokPipelineOutput(BaseOutput):
    """Images and the tokens they were generated from.

    Attributes:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): format as selected by `output_type`; a list
            if the sizes differ.
        token_ids (`torch.LongTensor` of shape `(B, k)`): a list of `(k,)` tensors if the lengths differ.
    """

    images: list | np.ndarray | Tensor
    token_ids: Tensor | list[Tensor]


class FlexTokPipeline(AdapterMixin, CardMixin, OffloadingMixin, PriorHalf, DecoderHalf):
    """Images as 1 to K ordered tokens (Bachmann et al., 2025, https://arxiv.org/abs/2502.13967).

    `tokenize` and `detokenize` need only the encoder and the decoder. Calling the pipeline needs a prior, and a prior
    with text needs its text encoder. Without a VAE, the latents are the pixels themselves.

    Several threads may call one pipeline at the same time, with the same results as one after the other; nothing may
    change the pipeline meanwhile. Offloading and `decoder.enable_cache` keep state in the models: use one thread then.

    Args:
        encoder: latents to token ids.
        decoder: token ids and noise to latents; `num_registers` and `token_layout` must match the encoder's.
        scheduler: integrates from noise to latents.
        vae: pixels to latents and back.
        prior: prompts or classes to token ids.
        text_encoder: prompts to the states that condition the prior.
        tokenizer: tokenizer of the text encoder.
        default_guidance_scale: guidance scale of the decoder for calls that do not pass one; `None` is the decoder's.
        default_prior_guidance_scale: the same for the prior, which keeps it in its generation configuration.

    Raises:
        ValueError: if two components do not fit together; the message names the settings that differ.
    """

    model_cpu_offload_seq = "text_encoder->prior->encoder->decoder->vae"
    _optional_components = ["vae", "prior", "text_encoder", "tokenizer"]

    def __init__(
        self,
        encoder: FlexTokEncoder,
        decoder: FlexTokFlowDecoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | None = None,
        prior: FlexTokPriorForCausalLM | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        default_guidance_scale: float | None = None,
        default_prior_guidance_scale: float | None = None,
    ):
        super().__init__()
        check_components(encoder=encoder, decoder=decoder, vae=vae, prior=prior, text_encoder=text_encoder)
        # The best scales depend on how well a model was trained: saved here, and with each model for other pipelines.
        generation = None if prior is None else prior.generation_config
        if default_guidance_scale is None:
            stored = None if decoder is None else decoder.config.default_guidance_scale
            default_guidance_scale = stored or DEFAULT_GUIDANCE_SCALE
        if default_prior_guidance_scale is None:
            default_prior_guidance_scale = getattr(generation, "default_guidance_scale", DEFAULT_PRIOR_GUIDANCE_SCALE)
        if decoder is not None:  # some pipelines only encode prompts
            decoder.register_to_config(default_guidance_scale=default_guidance_scale)
        if generation is not None:
            generation.default_guidance_scale = default_prior_guidance_scale
        self.register_to_config(
            default_guidance_scale=default_guidance_scale, default_prior_guidance_scale=default_prior_guidance_scale
        )
        self.register_modules(
            encoder=encoder,
            decoder=decoder,
            scheduler=scheduler,
            vae=vae,
            prior=prior,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.prior_options = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a pipeline from a folder or the Hub, in float32 unless `dtype` says otherwise.

        The default is set here because Transformers models would keep their stored precision, and half precision,
        which halves the download, is slow or unsupported on CPUs. Pickle files (`.bin`) are read with
        `use_safetensors=False` only.

        Raises:
            ValueError: if settings are not valid, or weights of any component are missing or do not match them.
            OSError: if files are missing or cannot be read, or the Hub cannot be reached.
        """
        if is_official(pretrained_model_name_or_path):
            raise ValueError(
                f"`pretrained_model_name_or_path` {pretrained_model_name_or_path!r} is in the official format: load a"
                " tokenizer with `FlexTokPipeline.from_original`, and a prior as its `prior`."
            )
        if "dtype" not in kwargs and "torch_dtype" not in kwargs:
            kwargs["dtype"] = torch.float32
        pipe = load_checked(cls, super().from_pretrained, pretrained_model_name_or_path, kwargs)
        pipe._load_saved_adapters(pretrained_model_name_or_path, kwargs)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Make a pipeline of the same components, in the precision that they have unless `dtype` says otherwise.

        Args:
            pipeline: a pipeline whose components are shared, not copied.
            kwargs: components to replace, or other values of the constructor's arguments.
        """
        if not isinstance(pipeline, cls) or "dtype" in kwargs or "torch_dtype" in kwargs:
            return super().from_pipe(pipeline, **kwargs)
        scales = {name: pipeline.config[name] for name in ("default_guidance_scale", "default_prior_guidance_scale")}
        return cls(**{**pipeline.components, **scales, **kwargs})

    @classmethod
    def from_original(
        cls,
        tokenizer: str | os.PathLike,
        prior: str | os.PathLike | None = None,
        text_encoder: str | os.PathLike | None = None,
        revision: str | None = None,
        prior_revision: str | None = None,
        dtype: torch.dtype | None = torch.float32,
        ignore: Sequence[str] = (),
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> "FlexTokPipeline":
        """Load checkpoints in the official format; `flextok convert` turns them into a folder for `from_pretrained`.

        Args:
            tokenizer: Hub id, folder or safetensors file, such as "EPFL-VILAB/flextok_d18_d28_dfn".
            prior: the same for the prior, such as "EPFL-VILAB/FlexAR-3B-T2I", trained with this tokenizer.
            text_encoder: Hub id or folder of the prior's text encoder; `None` for the one specified by the prior.
            revision: branch, tag or commit of the tokenizer on the Hub.
            prior_revision: the same for the prior.
            dtype: of the weights; `None` keeps the stored one.
            ignore: settings to ignore, if you are sure that they do not change what the model computes.
            cache_dir, token, local_files_only: as in `from_pretrained`, for all that comes from the Hub.

        Raises:
            ValueError: if a checkpoint is damaged, incomplete, unknown or not supported; the message says where.
            OSError: if files are missing, or the Hub cannot be reached.
        """
        from ..conversion.original import load_original  # deferred, since `conversion` imports `pipelines`

        return cls(
            **load_original(
                tokenizer,
                prior,
                text_encoder,
                dtype,
                revision=revision,
                prior_revision=prior_revision,
                ignore=ignore,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        )

    @property
    def codebook_size(self) -> int:
        """Number of token ids V; ids lie in [0, V)."""
        return self.encoder.quantizer.codebook_size

    @property
    def size_rules(self) -> SizeRules:
        """Which sizes of images the model accepts."""
        patch_size = math.lcm(self.encoder.config.patch_size, self.decoder.config.patch_size)
        step = patch_size * (self.resolution // self.latent_size)
        return SizeRules(step, self.resolution, self.decoder.config.positions == "stretch")

    def enable_compile(self, with_vae: bool = False, with_text_encoder: bool = False, **options) -> None:
        """Compile encoder, decoder and prior in place, for accelerators; the first calls afterwards are slow.

        One compilation of a block serves all blocks and token counts, and one serves all batch sizes above 1. The
        prior uses a static key-value cache, for which Transformers compiles its steps as CUDA graphs.

        Args:
            with_vae, with_text_encoder: compile these as well.
            options: of `torch.compile`; `dynamic=True` by default. The prior has its own. After as many shapes as
                `torch._dynamo.config.recompile_limit`, others run uncompiled, or are an error with `fullgraph=True`.
        """
        for part in self._compilable_parts(with_vae, with_text_encoder):
            part.compile(**{"dynamic": True, **options})
        self.prior_options = {"cache_implementation": "static"}

    def disable_compile(self) -> None:
        """Undo `enable_compile`."""
        for part in self._compilable_parts(with_vae=True, with_text_encoder=True):
            part._compiled_call_impl = None
        self.prior_options = {}

    def _compilable_parts(self, with_vae: bool, with_text_encoder: bool) -> list[torch.nn.Module]:
        of_vae = [self.vae.encoder, self.vae.decoder] if with_vae and self.vae is not None else []
        of_text = [self.text_encoder] if with_text_encoder and self.text_encoder is not None else []
        return [*self.encoder.blocks, *self.decoder.transformer_blocks, *of_vae, *of_text]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        max_tokens: int | Sequence[int] | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        prior_guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance: str = "apg",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        token_ids: Tensor | None = None,
        keep_tokens: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> FlexTokPipelineOutput | tuple:
        """Generate images for prompts or classes, from scratch or as variations of an image.

        Args:
            prompt: one prompt or a list; an empty string means unconditional.
            max_tokens: maximum number of tokens, for all or per prompt; above `num_registers` means all, below 1 is an
                error. Few tokens give a plausible image of the general idea, more pin down the details.
            class_labels: classes instead of a prompt, for a class-conditional prior: numbers, or names if it has any.
            num_images_per_prompt: number of images per prompt, adjacent in the result.
            num_inference_steps: number of steps of the flow decoder, at most the scheduler's `num_train_timesteps`.
                `None` is the model's default, 20 unless it names others; they may depend on the number of tokens, and
                a batch takes as many as any of its images needs.
            guidance_scale: how strongly the decoder follows the tokens, 1 is no guidance; or a function of sigma.
                `None` means the model's default, 7.5 for the published ones.
            prior_guidance_scale: how strongly the prior follows the prompt, 1 is no guidance. `None` means the
                model's default, 3 for the published ones with text.
            temperature: sampling temperature of the prior; below 1 is more typical, above 1 more varied.
            top_k: sample from this many most likely tokens only; 0 means all.
            top_p: sample from the most likely tokens of this total probability only; 1 means all.
            guidance: guidance method of the decoder, "apg" or "cfg".
            generator: source of randomness, PyTorch's global one by default; a list with one per image makes each
                image independent of its batch. A single one draws the noise of the images in order, and then the
                tokens of all together, so that even those of the first image depend on the batch.
            latents: initial noise, (B, C, h, w); drawn with `generator` by default.
            image: image to vary, one for all or a list with one per prompt, as in `tokenize`; its first `keep_tokens`
                tokens are kept and the prior generates the rest. Pass an empty prompt for an unconditional variation.
            token_ids: ids to continue from instead of an image, (1 or number of prompts, n).
            keep_tokens: number of tokens to keep, fewer vary more; required with `image`, default all of `token_ids`.
            prompt_embeds, prompt_attention_mask: what `encode_prompt` returns, instead of a prompt: (prompts, M,
                text_hidden_size) and (prompts, M), 1 for text and 0 for padding; `None` for no padding.
            negative_prompt: what the prior's guidance steers away from, for all or per prompt; no text by default.
            negative_prompt_embeds, negative_prompt_attention_mask: the same, encoded.
            height, width: of the images, and of an `image` to vary, in pixels; the model's square by default. See
                `size_rules` for what is allowed.
            output_type: "pil", "np" or "pt" ([0, 1]), or "latent".
            callback_on_step_end: called as `callback(pipe, step, timestep, {"latents": latents})` after each step of
                the decoder; may return a dictionary with new latents. Its `pipe` is a copy for this call, with
                `scheduler` and `num_timesteps`; to stop the call, set `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets; only "latents" exists.
            return_dict: return a `FlexTokPipelineOutput` instead of a tuple.

        Returns:
            Images and their token ids.

        Raises:
            ValueError: if the model has no prior, or an argument is invalid.
            TypeError: if an argument has the wrong type.
        """
        # 1. Check inputs, encode the condition
        decoding = self.check_decoding(num_inference_steps, guidance_scale, guidance, output_type)
        decoding |= self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        size = self.size_rules.check_each(height, width, 1)
        prefix = self.encode_prefix(image, token_ids, keep_tokens, size)  # (1 or prompts, p)
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        texts = GivenTexts(
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        writer = self.token_writer(
            prompt,
            class_labels,
            num_images_per_prompt,
            max_tokens,
            prefix,
            prior_guidance_scale,
            texts=texts,
            shape_features=self.size_rules.features(size),
            **sampling,
        )
        # Drawn first, so that a sample's generator gives the same noise however many tokens its batch needs.
        latents = self.prepare_latents(len(writer.counts), generator, latents, size)  # (B, C, h, w)
        # 2. Condition -> token ids
        token_ids = writer.write_all()  # (B, k), or B of different lengths
        # 3. Token ids -> images
        output = self.detokenize(token_ids, latents=latents, **decoding)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def generate_tokens(
        self,
        prompt: str | list[str] | None = None,
        max_tokens: int | Sequence[int] | None = None,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_images_per_prompt: int = 1,
        prior_guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Any = None,
        token_ids: Tensor | None = None,
        keep_tokens: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor | list[Tensor]:
        """Generate token ids for prompts or classes without decoding them; arguments as when calling the pipeline.

        Returns:
            Token ids, (B, k) int64, the same as calling the pipeline with the same generator; a list of (k,) tensors
            if the lengths differ.
        """
        size = self.size_rules.check_each(height, width, 1)
        prefix = self.encode_prefix(image, token_ids, keep_tokens, size)  # (1 or prompts, p)
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        texts = GivenTexts(
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        writer = self.token_writer(
            prompt,
            class_labels,
            num_images_per_prompt,
            max_tokens,
            prefix,
            prior_guidance_scale,
            texts=texts,
            shape_features=self.size_rules.features(size),
            **sampling,
        )
        self.prepare_latents(len(writer.counts), generator, sizes=size)  # unused: keeps generators in step
        token_ids = writer.write_all()
        self.maybe_free_model_hooks()
        return token_ids

    @torch.no_grad()
    def stream(
        self,
        prompt: str | None = None,
        token_counts: Sequence[int] | None = None,
        class_labels: int | str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        prior_guidance_scale: float | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance: str = "apg",
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        token_ids: Tensor | None = None,
        keep_tokens: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> Iterator[tuple[int, Any]]:
        """Generate one image, and show it at several token counts while its tokens are generated.

        All images use the same tokens and the same noise, so they refine without jumping. The last one equals the one
        from calling the pipeline with `max_tokens=token_counts[-1]` and the same generator. The prior generates every
        token once; every count costs one run of the flow decoder.

        Args:
            prompt: one prompt.
            token_counts: increasing numbers of tokens at which to show the image; more than `num_registers` means all.
                `None` means 1, 2, 4, ... up to all tokens.
            class_labels: one class instead of a prompt, as a number or name.
            num_inference_steps, guidance_scale, prior_guidance_scale, temperature, top_k, top_p, guidance, generator,
                latents, image, token_ids, keep_tokens, prompt_embeds, prompt_attention_mask, negative_prompt,
                negative_prompt_embeds, negative_prompt_attention_mask, height, width, output_type: as when calling
                the pipeline.

        Returns:
            An iterator over (number of tokens, image).

        Raises:
            ValueError: on the call, not on the first image, if an argument is invalid; also for several prompts.
            TypeError: if an argument has the wrong type.
        """
        decoding = self.check_decoding(num_inference_steps, guidance_scale, guidance, output_type)
        counts = tokens.check_token_counts(token_counts, self.num_registers)
        size = self.size_rules.check_each(height, width, 1)
        prefix = self.encode_prefix(image, token_ids, keep_tokens, size)  # (1, p)
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        texts = GivenTexts(
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        sampling["shape_features"] = self.size_rules.features(size)
        writer = self.token_writer(
            prompt, class_labels, 1, counts[-1], prefix, prior_guidance_scale, texts=texts, **sampling
        )
        if len(writer.counts) != 1:
            raise ValueError(
                f"`stream` generates one image, got {len(writer.counts)} prompts or classes. Call it once for each."
            )
        decoding["latents"] = self.prepare_latents(1, generator, latents, size)  # (1, C, h, w)
        return ((count, self.detokenize(writer.write(count), **decoding).images[0]) for count in counts)

    @torch.no_grad()
    def tokenize(
        self, images: Any, max_tokens: int | None = None, size: str | Size | None = None, return_dict: bool = False
    ) -> Tensor | FlexTokTokenizerOutput:
        """Turn images into token ids; the same image always gives the same ids.

        Args:
            images: an image or a list of images: path, PIL, numpy or torch, any size (see `prepare_images`).
            max_tokens: maximum number of tokens, the same for all images; fewer are faster and equal the start of all.
            size: `None` for the model's square; "keep" for the proportions of each image, up to 4 to 1, at about the
                same number of patches; or (height, width). Images are resized to cover it, and the center is cropped.
            return_dict: return a `FlexTokTokenizerOutput`, with the sizes that `detokenize` needs for "keep".

        Returns:
            Token ids, (B, k) int64 in [0, codebook_size), coarsest first.

        Raises:
            ValueError: if an image is damaged or has invalid values, the model does not accept the size, `max_tokens`
                is below 1, or the VAE or encoder computes NaN or infinity.
            TypeError: if an image has the wrong type; see `prepare_images`.
            FileNotFoundError: if a path is not an existing file.
        """
        pixels = prepare_each(images, self.size_rules.chooser(size), self._execution_device)  # B of (3, H, W)

        def run(pixel_values: Tensor, rows: list[int]) -> Tensor:
            token_ids = self.tokenize_pixels(pixel_values, max_tokens)
            check_token_ids(token_ids, pixel_values, self.encoder, self.vae)
            return token_ids

        token_ids = torch.stack(in_groups(pixels, run))  # (B, k)
        self.maybe_free_model_hooks()
        sizes = [(image.shape[1], image.shape[2]) for image in pixels]
        return FlexTokTokenizerOutput(token_ids=token_ids, sizes=sizes) if return_dict else token_ids

    @torch.no_grad()
    def tokenize_pixels(self, pixels: Tensor, max_tokens: int | None = None) -> Tensor:
        """Turn pixels (B, 3, H, W), uint8 or float32 in [-1, 1], on the pipeline's device into ids (B, k).

        `tokenize` calls this after reading images; `bulk_tokenization.tokenize_batches` is faster for many batches.
        Both refuse the ids -1, which stand for features that are not finite; this does not wait for the device.
        """
        num_tokens = tokens.resolve_count(max_tokens, "max_tokens", self.num_registers)
        is_bytes = isinstance(pixels, Tensor) and pixels.dtype == torch.uint8
        check_tensor("pixels", pixels, "integers" if is_bytes else "floats", "B", 3, "h", "w")
        pixel_values = pixels_to_values(pixels) if is_bytes else pixels
        latents = encode_latents(self.vae, pixel_values)  # (B, C, h, w)
        return self.encoder(latents.to(self.encoder.dtype), num_tokens).token_ids

    @torch.no_grad()
    def detokenize(
        self,
        token_ids: Tensor | np.ndarray | Sequence,
        num_inference_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        guidance: str = "apg",
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
    ) -> FlexTokPipelineOutput | tuple:
        """Turn token ids into images; any prefix of a sequence gives a complete image.

        Args:
            token_ids: (B, k) integers as a tensor, an array or lists; rows of a list may differ in length.
            num_inference_steps, guidance_scale, guidance, generator, latents, output_type, callback_on_step_end,
                callback_on_step_end_tensor_inputs, return_dict: as when calling the pipeline. For images of several
                sizes, `latents` is a list with noise for each, and a callback is called for each size in turn.
            height, width: of the images, in pixels, for all or as lists with one each; the model's square by default.
                Tokens do not belong to a size, so the same ones give an image of any.

        Returns:
            Images and the token ids.

        Raises:
            ValueError: if an id lies outside the codebook, or another argument is invalid.
            TypeError: if the ids are not rows of integers.
        """
        # 1. Check inputs
        decoding = self.check_decoding(num_inference_steps, guidance_scale, guidance, output_type)
        callback = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        padded_ids, counts = tokens.pad_token_ids(token_ids, self.codebook_size, self.num_registers)
        generator = spread_generators(generator, len(counts))
        # 2. Token ids -> codes
        device = self._execution_device
        codes = self.encoder.quantizer.ids_to_codes(padded_ids.to(device).long())  # (B, longest, Q)
        num_tokens = torch.tensor(counts)  # (B,)
        # 3. Noise -> latents, along the straight paths of rectified flow -> images
        sizes = self.size_rules.check_each(height, width, len(counts))
        noise = self.prepare_latents(len(counts), generator, latents, sizes)  # (B, C, h, w), or B of (C, h, w)

        num_steps = self.choose_steps(decoding["num_inference_steps"], counts)

        def run(noise: Tensor, rows: Any) -> Any:
            scale = decoding["guidance_scale"]
            latents = self.integrate_flow(noise, codes[rows], num_tokens[rows], num_steps, scale, guidance, **callback)
            return latents if output_type == "latent" else to_output(decode_latents(self.vae, latents), output_type)

        images = run(noise, slice(None)) if isinstance(noise, Tensor) else in_groups(noise, run)
        self.maybe_free_model_hooks()
        if not all(isinstance(row, Tensor) for row in token_ids):  # lists or arrays
            rows = [row[:count] for row, count in zip(padded_ids, counts)]
            token_ids = padded_ids if len(set(counts)) == 1 else rows
        output = FlexTokPipelineOutput(images=images, token_ids=token_ids)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def reconstruct(
        self,
        images: Any,
        max_tokens: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        guidance: str = "apg",
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = False,
        size: str | Size | None = None,
    ) -> list | FlexTokPipelineOutput:
        """Tokenize images and reconstruct them from prefixes of different lengths, all from the same noise.

        Args:
            images: as in `tokenize`.
            max_tokens: lengths of the prefixes; `None` means 1, 2, 4, ... up to all tokens.
            num_inference_steps, guidance_scale, guidance, generator, output_type: as in `detokenize`.
            return_dict: return a `FlexTokPipelineOutput` with these batches as `images`, and all `token_ids`.
            size: as in `tokenize`.

        Returns:
            A batch of images for each length.
        """
        decoding = self.check_decoding(num_inference_steps, guidance_scale, guidance, output_type)
        lengths = tokens.resolve_counts(max_tokens, "max_tokens", self.num_registers)
        read = self.tokenize(images, max(lengths), size, return_dict=True)
        token_ids = read.token_ids  # (B, longest)
        generator = spread_generators(generator, token_ids.shape[0])
        noise = self.prepare_latents(token_ids.shape[0], generator, sizes=read.sizes)
        batches = [self.detokenize(token_ids[:, :count], latents=noise, **decoding).images for count in lengths]
        return FlexTokPipelineOutput(images=batches, token_ids=token_ids) if return_dict else batches

    def encode_prefix(
        self, image: Any, token_ids: Tensor | None, keep_tokens: int | None, sizes: list[Size] | None = None
    ) -> Tensor:
        """Return the tokens that new images start with, (1 or prompts, p) int64; p is 0 if there are none."""
        if image is not None and token_ids is not None:
            raise ValueError("Pass either `image` or `token_ids` to continue from, not both.")
        if image is not None:
            tokens.check_keep_tokens(keep_tokens, self.num_registers, "the model's number of registers")
            return self.tokenize(image, keep_tokens, sizes[0] if sizes else None)
        if token_ids is not None:
            prefix = tokens.check_prefix_ids(token_ids, keep_tokens, self.codebook_size, self.num_registers)
            return prefix.to(self._execution_device).long()
        if keep_tokens is not None:
            raise ValueError("`keep_tokens` was passed, but there is nothing to keep. Pass `image` or `token_ids`.")
        return torch.zeros(1, 0, dtype=torch.long, device=self._execution_device)
