"""Token generation by the prior: classifier-free guidance and custom generators on top of Transformers' `generate`.

Letters: B batch, M text length, k new tokens, V codebook size.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticCache
from transformers.generation import GenerationMode, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .packed_linear import packed_weights
from .prior_cache import CACHE_NAME, PreallocatedLayer, static_shape, with_text_cache
from .prior_inputs import UNCONDITIONAL_LABEL
from .prior_options import check_generate_inputs, check_generator, check_options, check_special_tokens
from .prior_sampling import (
    GuidedSampling,
    KeptSteps,
    PriorGenerateOutput,
    UnfinishedRows,
    choose,
    double_batch,
    pad_texts,
)


STATIC_TEXT_MULTIPLE = 32  # with a static cache, texts are padded to a multiple of this to limit the number of lengths


class PriorGenerationMixin(GenerationMixin):
    """`generate` with guidance, generators and log-probabilities; everything else comes from Transformers."""

    kept_cache: Cache | None = None  # of the last compiled call, reused by the next one

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
        **kwargs,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate token sequences from texts or classes.

        By default, all `max_position_embeddings` tokens are generated greedily; `do_sample=True` samples from the full
        distribution (`top_k=0`, `top_p=1.0`; 0.0 also disables top-p). Order of operations: guidance, temperature,
        top-k (ties with the k-th token are kept), top-p (the best token is always kept).

        Args:
            inputs: prefixes to continue, `[BOS, t0, ...]`, (B, 1 or more); alias `input_ids`. `None` means `[BOS]`.
                Shorter ones have padding on the left, marked by zeros in `attention_mask`, (B, 1 or more).
            generation_config: options of Transformers' `generate`; they may also be passed individually.
            guidance_scale: s in `unconditional + s * (conditional - unconditional)` on the logits (Ho and Salimans,
                2022, https://arxiv.org/abs/2207.12598); 1 disables guidance and halves the cost. The unconditional
                input is class -1, or the negative text.
            negative_encoder_hidden_states, negative_encoder_attention_mask: unconditional text, usually the empty
                string, (B or 1, M, text_hidden_size) and (B or 1, M); required for guidance in models with text.
            generator: random generator, by default PyTorch's global one. A list with one per row makes every row
                independent of its batch; a single one is shared by the whole batch.
            return_log_probs: return a `PriorGenerateOutput` with `log_probs`. Like guidance and `generator`, it is for
                greedy decoding and sampling: neither beams, assistants nor streamers.
            kwargs: conditions as in `forward` (`encoder_hidden_states`, `encoder_attention_mask`, `class_labels`,
                `shape_features`) and options such as `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`,
                `num_return_sequences`, `cache_implementation="static"`, `use_cache`. One more is for models with
                classes and without text: `class_zero_guidance` uses class 0 as unconditional from the second new token
                on, as the official code does by mistake. Options may also be set in `self.generation_config`.

        Returns:
            Sequences including the start token, (B, 1 + tokens); the token ids are `[:, 1:]`.
        """
        given = {name: kwargs.pop(name, None) for name in LOOP_ARGUMENTS}
        given = {name: value for name, value in given.items() if value is not None}
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        through = {name: kwargs.pop(name) for name in GENERATE_OBJECTS if name in kwargs}
        options, conditions = self.resolve_generation_options(generation_config, kwargs)
        guidance_scale = options.guidance_scale if guidance_scale is None else guidance_scale
        options.guidance_scale = 1.0  # applied here: Transformers' own guidance drops the conditions
        negative = (negative_encoder_hidden_states, negative_encoder_attention_mask)
        check_generator(generator)
        check_options({"return_log_probs": return_log_probs})
        check_generate_inputs(self.config, inputs, conditions, guidance_scale, negative, options.class_zero_guidance)
        text = conditions.get("encoder_hidden_states")
        if text is not None and text.dtype != self.dtype and not torch.is_autocast_enabled(self.device.type):
            raise ValueError(f"`encoder_hidden_states` is {text.dtype}, not {self.dtype}: use `.to(prior.dtype)`.")
        mark_padding(conditions)
        if guidance_scale != 1.0 or generator is not None or return_log_probs:
            if given:
                raise ValueError(NOT_COMBINED.format(", ".join(f"`{name}`" for name in given)))
            flags = (return_log_probs, options.class_zero_guidance, conditions.get(CACHE_NAME) is None)
            sampling = GuidedSampling(guidance_scale, generator, *flags)
            if guidance_scale != 1.0:
                sampling.negative = pad_texts(conditions, *negative, text_multiple(options, conditions))
            given["custom_generate"] = partial(type(self).sample_guided, sampling=sampling)
        limits = (options.max_new_tokens, options.max_length, self.config.max_position_embeddings)
        with packed_weights(self, num_calls=next(limit for limit in limits if limit is not None)):
            return super().generate(inputs, options, **through, **given, **conditions)

    def resolve_generation_options(
        self, generation_config: GenerationConfig | None, kwargs: dict
    ) -> tuple[GenerationConfig, dict]:
        """Combine the options of one call with the prior's defaults; returns them and the remaining arguments."""
        if generation_config is not None and not isinstance(generation_config, GenerationConfig):
            raise TypeError(f"`generation_config` must be a `GenerationConfig`, got {generation_config!r}.")
        options = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        check_options({**vars(options), **kwargs})
        check_special_tokens(self.config, self.generation_config)
        conditions = options.update(**kwargs)

        def is_unset(name: str) -> bool:
            return getattr(options, name) is None and getattr(self.generation_config, name) is None

        stored = getattr(options, "class_zero_guidance", getattr(self.generation_config, "class_zero_guidance", False))
        options.class_zero_guidance = conditions.pop("class_zero_guidance", stored)
        if options.guidance_scale is None:
            own = self.generation_config.guidance_scale
            options.guidance_scale = 1.0 if own is None else own
        if is_unset("max_length") and is_unset("max_new_tokens"):
            options.max_length = self.config.max_position_embeddings + 1
        if is_unset("top_k") and (options.do_sample or self.generation_config.do_sample):
            options.top_k = 0  # Transformers' default is 50
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
        mode = generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(NOT_COMBINED.format(f"the options of {mode.value.replace('_', ' ')}"))
        first = {"inputs_embeds": model_kwargs["inputs_embeds"]} if "inputs_embeds" in model_kwargs else {}
        model_kwargs = given_inputs(model_kwargs)
        batch_size = input_ids.shape[0]
        if isinstance(sampling.generator, list) and len(sampling.generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(sampling.generator)}, but the batch has {batch_size} rows. Pass one"
                " per row, or a single generator."
            )
        first_unconditional = None
        if sampling.is_guided:
            if sampling.class_zero_guidance:
                first_unconditional = self.unconditional_logits(first or {"input_ids": input_ids}, model_kwargs)
            double_batch(model_kwargs, sampling, batch_size)
        compiled = self._valid_auto_compile_criteria(model_kwargs, generation_config)
        if compiled and sampling.owns_cache:
            model_kwargs[CACHE_NAME] = self.recall_cache(model_kwargs, batch_size * (2 if sampling.is_guided else 1))
        next_forward = self.get_compiled_call(generation_config.compile_config) if compiled else self
        pad_token_id = getattr(generation_config, "_pad_token_tensor", None)
        rows = UnfinishedRows(stopping_criteria, pad_token_id, batch_size, input_ids.device)

        cache = model_kwargs.get(CACHE_NAME)
        forward = self
        step = first or {"input_ids": input_ids if cache is None else input_ids[:, int(cache.get_seq_length()) :]}
        kept = KeptSteps(generation_config, sampling.return_log_probs)
        while input_ids.shape[1] < generation_config.max_length:
            if sampling.is_guided:
                step = {name: torch.cat([value, value]) for name, value in step.items()}
            output = forward(**step, **model_kwargs)
            logits = output.logits[:, -1].to(torch.float32, copy=True)  # (2 B or B, V); CUDA graphs reuse the buffer
            if sampling.is_guided:
                conditional, unconditional = logits.chunk(2)
                if first_unconditional is not None:
                    unconditional, first_unconditional = first_unconditional, None
                logits = unconditional + sampling.guidance_scale * (conditional - unconditional)
            scores = logits_processor(input_ids, logits)  # (B, V)
            next_ids = choose(scores, generation_config.do_sample, sampling.generator)  # (B, 1)
            kept.add(output, logits, scores, next_ids, rows.is_open)
            next_ids = rows.fill(next_ids)
            input_ids = torch.cat([input_ids, next_ids], dim=1)
            forward, step = next_forward, {"input_ids": input_ids if cache is None else next_ids}
            if "attention_mask" in model_kwargs:
                model_kwargs["attention_mask"] = F.pad(model_kwargs["attention_mask"], (0, 1), value=1)
            if rows.all_done(input_ids, scores):
                break
        if generation_config.return_dict_in_generate or sampling.return_log_probs:
            return PriorGenerateOutput(sequences=input_ids, **{CACHE_NAME: cache}, **kept.outputs())
        if sampling.owns_cache:
            self.keep_cache(cache)
        return input_ids

    def unconditional_logits(self, prefix: dict[str, Tensor], model_kwargs: dict) -> Tensor | None:
        """Return logits (B, V) of the first new token without a class, or `None` if this is a later token."""
        cache = model_kwargs.get(CACHE_NAME)
        if cache is not None and cache.get_seq_length() > 0:
            return None
        no_class = torch.full_like(model_kwargs["class_labels"], UNCONDITIONAL_LABEL)
        prefix = {**prefix, **{name: model_kwargs.get(name) for name in ("attention_mask", "shape_features")}}
        return self(**prefix, class_labels=no_class, use_cache=False, logits_to_keep=1).logits[:, -1].float()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        inputs_embeds: Tensor | None = None,
        is_padded: bool = False,
        **kwargs,
    ) -> dict:
        """Arguments of `forward` for the next step: what the cache does not hold yet."""
        kwargs["is_padded"] = is_padded
        if inputs_embeds is not None and is_first_iteration:
            return {"inputs_embeds": inputs_embeds, **given_inputs(kwargs)}
        cache = kwargs.get(CACHE_NAME)
        length = input_ids.shape[1]
        if next_sequence_length is None:  # otherwise known without reading a device
            next_sequence_length = length - (0 if cache is None else int(cache.get_seq_length()))
        if next_sequence_length <= 0:
            raise ValueError(
                f"`{CACHE_NAME}` holds {length - next_sequence_length} positions, but only {length} ids were passed."
                " Pass the whole sequence, also what the cache holds, and at least one id more."
            )
        new_ids = input_ids[:, -next_sequence_length:]
        # cloned: a slice of one row has a stride of its own, for which a compiled step would compile again
        return {"input_ids": new_ids.clone(memory_format=torch.contiguous_format), **given_inputs(kwargs)}

    def _get_candidate_generator(self, *args, **kwargs):
        generator = super()._get_candidate_generator(*args, **kwargs)
        propose, longest = generator.get_candidates, self.config.max_position_embeddings

        def get_candidates(*args, **kwargs):
            token_ids, logits = propose(*args, **kwargs)
            return token_ids[:, :longest], logits  # prompt lookup proposes more than there are positions

        generator.get_candidates = get_candidates
        return generator

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        is_own = CACHE_NAME not in model_kwargs
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache, text = model_kwargs.get(CACHE_NAME), model_kwargs.get("encoder_hidden_states")
        if is_own and cache is not None and generation_config.cache_implementation in (None, "dynamic"):
            num_layers, capacity = self.config.num_hidden_layers, generation_config.max_length
            cache.layers = [PreallocatedLayer(capacity) for _ in range(num_layers)]
        if is_own and generation_config.cache_implementation == "static":
            # sized for the longest sequence, so that one compiled step serves all lengths
            cache = StaticCache(config=self.config, max_cache_len=self.config.max_position_embeddings)
        if isinstance(cache, StaticCache) and text is not None:
            text_cache = StaticCache(config=self.config, max_cache_len=text.shape[1])
            cache = EncoderDecoderCache(cache, text_cache)
        if cache is not None:
            model_kwargs[CACHE_NAME] = with_text_cache(self.config, cache)

    def recall_cache(self, model_kwargs: dict, num_rows: int) -> Cache:
        """Return the static cache of the last call if it has the right shape, else the one of this call.

        A CUDA graph is tied to the memory addresses of its cache, so a new cache would need a new capture.
        """
        cache, kept = model_kwargs[CACHE_NAME], self.__dict__.pop("kept_cache", None)  # at once: for one thread
        is_empty = int(cache.get_seq_length()) == 0  # and does not continue an earlier call
        text = model_kwargs.get("encoder_hidden_states")
        shape = (num_rows, 0 if text is None else text.shape[1], self.dtype, self.device)
        if is_empty and kept is not None and static_shape(kept) == shape:
            kept.reset()
            return kept
        return cache

    def keep_cache(self, cache: Cache | None) -> None:
        """Keep a static cache, no longer in use, for the next call of a compiled step; `None` frees the memory."""
        is_needed = cache is not None and cache.is_compileable and hasattr(self, "_compiled_call")
        self.kept_cache = cache if is_needed else None

    def _validate_generated_length(self, generation_config, input_ids_length: int, *args, **kwargs) -> None:
        super()._validate_generated_length(generation_config, input_ids_length, *args, **kwargs)
        max_tokens = self.config.max_position_embeddings
        if generation_config.max_length > max_tokens + 1:  # the start token counts as well
            raise ValueError(
                f"`max_new_tokens` or `max_length` asks for {generation_config.max_length - 1} tokens, but"
                f" the model's maximum is {max_tokens} (`max_position_embeddings`). Use fewer, or leave it out."
            )


FORWARD_INPUTS = (
    "output_hidden_states",
    "output_attentions",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "class_labels",
    "shape_features",
    CACHE_NAME,
    "use_cache",
    "logits_to_keep",
)
NOT_COMBINED = "`guidance_scale`, `generator` and `return_log_probs` cannot be combined with {}. Use one or the other."
LOOP_ARGUMENTS = ("streamer", "assistant_model", "custom_generate")  # these select another loop of Transformers
# arguments of Transformers' `generate` that are neither options nor model inputs
GENERATE_OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus")


def mark_padding(conditions: dict) -> None:
    """Keep an attention mask (B, L) only if it hides something, and mark it: the libraries' own hide nothing."""
    padding = conditions.pop("attention_mask", None)
    if padding is not None and not padding.bool().all():
        conditions.update(attention_mask=padding, is_padded=True)


def given_inputs(kwargs: dict) -> dict:
    """Return those arguments of a step that `forward` takes."""
    names = (*FORWARD_INPUTS, "attention_mask") if kwargs.get("is_padded") else FORWARD_INPUTS
    return {name: kwargs[name] for name in names if name in kwargs}


def text_multiple(generation_config: GenerationConfig, conditions: dict) -> int:
    """Return the multiple that text lengths are padded to: 1 unless the cache is static."""
    cache = conditions.get(CACHE_NAME)
    is_static = generation_config.cache_implementation == "static" or (cache is not None and cache.is_compileable)
    return STATIC_TEXT_MULTIPLE if is_static else 1
