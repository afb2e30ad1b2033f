"""How the prior writes: classifier-free guidance and generators of one's own on top of Transformers' `generate`.

Letters: B batch, M text length, k new tokens, V codebook size.
"""

import copy
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticCache
from transformers.generation import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from .packed_linear import packed_weights
from .prior_cache import PreallocatedLayer, static_shape, with_text_cache
from .prior_inputs import UNCONDITIONAL_LABEL, check_generate_inputs


# Transformers calls the cache `past_key_values` up to 5.23 and `cache` from 5.24 on, in arguments and outputs alike.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


STATIC_TEXT_MULTIPLE = 32  # texts are padded to it for a static cache, so that few lengths occur


@dataclass
class PriorGenerateOutput(GenerateDecoderOnlyOutput):
    """Transformers' output of `generate`, and how likely the choices were.

    Attributes:
        log_probs (`torch.FloatTensor` of shape `(B, k)`): log-probability of each new token under the distribution it
            was drawn from, after guidance, temperature and filters; their sum over a row scores the row.
    """

    log_probs: Tensor | None = None


@dataclass
class GuidedSampling:
    """What the sampling loop needs beyond Transformers' own options (see `PriorGenerationMixin.generate`)."""

    guidance_scale: float
    negative_hidden_states: Tensor | None
    negative_attention_mask: Tensor | None
    generator: torch.Generator | list[torch.Generator] | None
    return_log_probs: bool
    class_zero_guidance: bool
    owns_cache: bool  # no caller gave one


class PriorGenerationMixin(GenerationMixin):
    """`generate` with guidance, generators and log-probabilities; everything else is Transformers' own."""

    kept_cache: Cache | None = None  # of the last compiled call, for the next one

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        guidance_scale: float | None = None,
        negative_encoder_hidden_states: Tensor | None = None,
        negative_encoder_attention_mask: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_log_probs: bool = False,
        class_zero_guidance: bool = False,
        **kwargs,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Write token sequences for texts or classes.

        Unless told otherwise, all `max_position_embeddings` tokens are written, greedily; with `do_sample=True` from
        the whole distribution (`top_k=0`, `top_p=1.0`; 0.0 also switches top-p off). Sampling order: guidance,
        temperature, top-k (ties with the k-th stay), top-p (the best token always stays).

        Args:
            inputs: start of the sequences, `[BOS, t0, ...]`, (B, 1 or more); also `input_ids`. `None` is `[BOS]`.
            generation_config: options of Transformers' `generate`, which may also be passed one by one.
            guidance_scale: s in `unconditional + s * (conditional - unconditional)` on the logits (Ho and Salimans,
                2022, https://arxiv.org/abs/2207.12598); 1 is no guidance and costs half. Unconditional is class -1,
                or the negative text.
            negative_encoder_hidden_states: text states of the unconditional rows, (B or 1, M, text_hidden_size),
                usually of the empty string; needed by models with text under guidance.
            negative_encoder_attention_mask: their mask, (B or 1, M).
            generator: source of randomness. A list with one per row makes every row independent of its batch; a single
                one draws for the whole batch. `None` uses PyTorch's global one; otherwise that one is left alone.
            return_log_probs: return a `PriorGenerateOutput` with `log_probs`.
            class_zero_guidance: take class 0 for unconditional from the second new token on, as the official code does
                by mistake, to reproduce what it samples; for models with classes and without text.
            kwargs: conditions as in `forward` (`encoder_hidden_states`, `encoder_attention_mask`, `class_labels`) and
                options such as `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `num_return_sequences`,
                `cache_implementation="static"`, `use_cache`.

        Returns:
            Sequences with their start, (B, 1 + tokens); the token ids are `[:, 1:]`.
        """
        given = {name: kwargs.pop(name, None) for name in ("streamer", "assistant_model", "custom_generate")}
        given = {name: value for name, value in given.items() if value is not None}
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        through = {name: kwargs.pop(name) for name in GENERATE_OBJECTS if name in kwargs}
        generation_config, conditions = self.resolve_generation_options(generation_config, kwargs)
        if guidance_scale is None:
            stored = (generation_config.guidance_scale, self.generation_config.guidance_scale, 1.0)
            guidance_scale = next(value for value in stored if value is not None)
        generation_config.guidance_scale = 1.0  # guided here: Transformers' own would drop the conditions
        negative = (negative_encoder_hidden_states, negative_encoder_attention_mask)
        check_generate_inputs(self.config, inputs, conditions, guidance_scale, negative, class_zero_guidance)
        if guidance_scale != 1.0 or generator is not None or return_log_probs:
            if given or (generation_config.num_beams or 1) > 1:
                raise ValueError(
                    f"`guidance_scale`, `generator` and `return_log_probs` do not go together with {sorted(given)} or"
                    " `num_beams` above 1. Leave one side out."
                )
            given_cache = conditions.get(CACHE_NAME)
            is_static = generation_config.cache_implementation == "static"
            is_static |= given_cache is not None and given_cache.is_compileable
            multiple = STATIC_TEXT_MULTIPLE if is_static else 1
            negative = pad_texts(conditions, *negative, multiple) if guidance_scale != 1.0 else (None, None)
            sampling = GuidedSampling(
                guidance_scale, *negative, generator, return_log_probs, class_zero_guidance, given_cache is None
            )
            given["custom_generate"] = partial(type(self).sample_guided, sampling=sampling)
        limits = [getattr(generation_config, name) for name in ("max_new_tokens", "max_length")]
        num_steps = next((limit for limit in limits if limit is not None), self.config.max_position_embeddings)
        with packed_weights(self, num_calls=num_steps):
            return super().generate(inputs, generation_config, **through, **given, **conditions)

    def resolve_generation_options(
        self, generation_config: GenerationConfig | None, kwargs: dict
    ) -> tuple[GenerationConfig, dict]:
        """Gather the options of one call with the prior's defaults; returns them and the arguments left over."""
        options = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        conditions = options.update(**kwargs)

        def is_unset(name: str) -> bool:
            return getattr(options, name) is None and getattr(self.generation_config, name) is None

        if is_unset("max_length") and is_unset("max_new_tokens"):
            options.max_length = self.config.max_position_embeddings + 1
        if is_unset("top_k") and (options.do_sample or self.generation_config.do_sample):
            options.top_k = 0  # Transformers would keep 50
        if options.top_p == 0.0:
            options.top_p = 1.0  # both mean off
        return options, conditions

    def sample_guided(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        sampling: GuidedSampling,
        **model_kwargs,
    ) -> Tensor | PriorGenerateOutput:
        """Transformers' sampling loop with guidance and a generator; `generate` prepares its arguments."""
        batch_size = input_ids.shape[0]
        if isinstance(sampling.generator, list) and len(sampling.generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(sampling.generator)}, but the batch has {batch_size} rows. Pass one"
                " per row, or a single one."
            )
        is_guided = sampling.guidance_scale != 1.0
        first_unconditional = None
        if is_guided:
            given = model_kwargs.get(CACHE_NAME)
            if sampling.class_zero_guidance and (given is None or given.get_seq_length() == 0):  # the first new token
                no_class = torch.full_like(model_kwargs["class_labels"], UNCONDITIONAL_LABEL)
                first = self(input_ids, class_labels=no_class, use_cache=False, logits_to_keep=1)
                first_unconditional = first.logits[:, -1].float()  # (B, V)
            double_batch(model_kwargs, sampling, batch_size)
        compiled = self._valid_auto_compile_criteria(model_kwargs, generation_config)
        if compiled and sampling.owns_cache:
            model_kwargs[CACHE_NAME] = self.recall_cache(model_kwargs, batch_size * (2 if is_guided else 1))
        next_forward = self.get_compiled_call(generation_config.compile_config) if compiled else self
        other_criteria = [rule for rule in stopping_criteria if not isinstance(rule, MaxLengthCriteria)]

        cache = model_kwargs.get(CACHE_NAME)
        forward, new_ids = self, input_ids if cache is None else input_ids[:, int(cache.get_seq_length()) :]
        scores, raw_logits, log_probs = [], [], []
        while input_ids.shape[1] < generation_config.max_length:
            output = forward(new_ids.repeat(2, 1) if is_guided else new_ids, **model_kwargs)
            logits = output.logits[:, -1].to(torch.float32, copy=True)  # (2 B or B, V); a graph would write over it
            if is_guided:
                conditional, unconditional = logits.chunk(2)
                if first_unconditional is not None:
                    unconditional, first_unconditional = first_unconditional, None
                logits = unconditional + sampling.guidance_scale * (conditional - unconditional)
            step_scores = logits_processor(input_ids, logits)  # (B, V)
            next_ids = choose(step_scores, generation_config.do_sample, sampling.generator)  # (B, 1)
            if sampling.return_log_probs:
                log_probs.append(step_scores.log_softmax(dim=-1).gather(1, next_ids))
            if generation_config.output_scores:
                scores.append(step_scores)
            if generation_config.output_logits:
                raw_logits.append(logits)
            input_ids = torch.cat([input_ids, next_ids], dim=1)
            forward, new_ids = next_forward, input_ids if cache is None else next_ids
            if any(rule(input_ids, step_scores).all() for rule in other_criteria):
                break

        if not (generation_config.return_dict_in_generate or sampling.return_log_probs):
            if sampling.owns_cache:
                self.keep_cache(cache)
            return input_ids
        return PriorGenerateOutput(
            sequences=input_ids,
            scores=tuple(scores) or None,
            logits=tuple(raw_logits) or None,
            **{CACHE_NAME: cache},
            log_probs=torch.cat(log_probs, dim=1) if log_probs else None,
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, is_first_iteration: bool = False, **kwargs
    ) -> dict:
        """Arguments of `forward` for the next step; positions and masks follow from the cache."""
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        given = {name: kwargs[name] for name in FORWARD_INPUTS if name in kwargs}
        return {"input_ids": input_ids.contiguous(), **given}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        is_own = CACHE_NAME not in model_kwargs
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache, text = model_kwargs.get(CACHE_NAME), model_kwargs.get("encoder_hidden_states")
        if is_own and cache is not None and generation_config.cache_implementation in (None, "dynamic"):
            num_layers, capacity = self.config.num_hidden_layers, generation_config.max_length
            cache.layers = [PreallocatedLayer(capacity) for _ in range(num_layers)]
        if is_own and generation_config.cache_implementation == "static":
            # as long as the longest sequence, so that one compiled step serves all lengths
            cache = StaticCache(config=self.config, max_cache_len=self.config.max_position_embeddings)
        if isinstance(cache, StaticCache) and text is not None:
            text_cache = StaticCache(config=self.config, max_cache_len=text.shape[1])
            cache = EncoderDecoderCache(cache, text_cache)
        if cache is not None:
            model_kwargs[CACHE_NAME] = with_text_cache(self.config, cache)

    def recall_cache(self, model_kwargs: dict, num_rows: int) -> Cache:
        """Return the static cache of the last call if it has the right shape, else the one of this call.

        A CUDA graph holds the addresses of its cache, so a new one would have to be captured for another cache.
        """
        cache, kept, self.kept_cache = model_kwargs[CACHE_NAME], self.kept_cache, None
        is_empty = int(cache.get_seq_length()) == 0  # and does not go on from an earlier call
        text = model_kwargs.get("encoder_hidden_states")
        shape = (num_rows, 0 if text is None else text.shape[1], self.dtype, self.device)
        if is_empty and kept is not None and static_shape(kept) == shape:
            kept.reset()
            return kept
        return cache

    def keep_cache(self, cache: Cache | None) -> None:
        """Keep a static cache that nobody needs any more for the next call."""
        self.kept_cache = cache if cache is not None and cache.is_compileable else None

    def _validate_generated_length(self, generation_config, input_ids_length: int, *args, **kwargs) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, *args, **kwargs)
        max_tokens = self.config.max_position_embeddings
        if generation_config.max_length > max_tokens + 1:  # the start vector counts as well
            raise ValueError(
                f"`max_new_tokens` asks for sequences of {generation_config.max_length - 1} tokens, but the model has"
                f" {max_tokens} (`max_position_embeddings`). Ask for fewer, or leave it out to get all."
            )


FORWARD_INPUTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "class_labels",
    CACHE_NAME,
    "use_cache",
    "logits_to_keep",
)
# arguments of Transformers' `generate` that are neither options nor inputs of the model
GENERATE_OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus")


def choose(scores: Tensor, do_sample: bool, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Pick a token per row of scores (B, V): the best, or one drawn by softmax; returns ids (B, 1)."""
    if not do_sample:
        return scores.argmax(dim=-1, keepdim=True)
    probs = scores.softmax(dim=-1)
    if isinstance(generator, list):
        return torch.cat([draw(row[None], own) for row, own in zip(probs, generator, strict=True)])
    return draw(probs, generator)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one id per row of probabilities (B, V), on the generator's device: a CPU seed draws alike everywhere."""
    if generator is None:
        return torch.multinomial(probs, 1)
    return torch.multinomial(probs.to(generator.device), 1, generator=generator).to(probs.device)


def pad_texts(
    conditions: dict, hidden_states: Tensor | None, attention_mask: Tensor | None, multiple: int = 1
) -> tuple:
    """Bring the texts in `conditions` and the negative ones to one length, a multiple; returns the negative ones."""
    if hidden_states is None:
        return None, None
    text, text_mask = conditions["encoder_hidden_states"], conditions.get("encoder_attention_mask")
    length = -(-max(text.shape[1], hidden_states.shape[1]) // multiple) * multiple
    conditions["encoder_hidden_states"], conditions["encoder_attention_mask"] = pad_text(text, text_mask, length)
    return pad_text(hidden_states, attention_mask, length)


def pad_text(hidden_states: Tensor, attention_mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Pad text states (B, M, C) and their mask, (B, M) or `None` for no padding, to `length` masked positions."""
    if attention_mask is None:
        attention_mask = torch.ones(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
    missing = length - hidden_states.shape[1]
    return F.pad(hidden_states, (0, 0, 0, missing)), F.pad(attention_mask, (0, missing))


def double_batch(model_kwargs: dict, sampling: GuidedSampling, batch_size: int) -> None:
    """Put the unconditional rows after the conditional ones, in place: conditions (B, ...) become (2 B, ...)."""
    pairs = {
        "encoder_hidden_states": sampling.negative_hidden_states,
        "encoder_attention_mask": sampling.negative_attention_mask,
    }
    for name, negative in pairs.items():
        if negative is not None:
            rows = negative.repeat_interleave(batch_size // negative.shape[0], dim=0)
            model_kwargs[name] = torch.cat([model_kwargs[name], rows.to(model_kwargs[name])])
    labels = model_kwargs.get("class_labels")
    if labels is not None:
        unconditional = 0 if sampling.class_zero_guidance else UNCONDITIONAL_LABEL
        model_kwargs["class_labels"] = torch.cat([labels, torch.full_like(labels, unconditional)])
