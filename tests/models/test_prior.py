"""Properties of the autoregressive prior: a causal LM over image tokens, conditioned on text or classes."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from flextok_hf.models.configuration_prior import FlexTokPriorConfig
from flextok_hf.models.modeling_prior import FlexTokPriorForCausalLM
from flextok_hf.models.prior_cache import CACHE_NAME
from flextok_hf.models.prior_sampling import choose


VOCABULARY, NUM_TOKENS, TEXT_WIDTH, TEXT_LENGTH, NUM_CLASSES = 30, 8, 12, 5, 4
KINDS = {
    "text": {"text_hidden_size": TEXT_WIDTH},
    "class": {"text_hidden_size": None, "num_classes": NUM_CLASSES, "qk_norm": True},
    "text and class": {"text_hidden_size": TEXT_WIDTH, "num_classes": NUM_CLASSES, "cross_qk_norm": True},
    "unconditional": {"text_hidden_size": None},
    "every option": {
        "text_hidden_size": TEXT_WIDTH,
        "norm_type": "layer_norm",
        "norm_eps": 1e-3,
        "use_final_norm": False,
        "use_head_norm": True,
        "use_bias": True,
        "qk_norm": True,
        "cross_qk_norm": True,
        "qk_norm_type": "rms_norm",
        "qk_norm_eps": 1e-2,
        "attention_scale": 0.2,
    },
}


def make_config(kind, **changes):
    shapes = {
        "codebook_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": NUM_TOKENS,
        "initializer_range": 0.3,  # large enough that conditions and positions affect the logits
    }
    return FlexTokPriorConfig(**{**shapes, **KINDS[kind], **changes})


def make_prior(kind, **changes):
    torch.manual_seed(0)
    return FlexTokPriorForCausalLM(make_config(kind, **changes)).eval()


def make_condition(config, batch_size=3):
    generator = torch.Generator().manual_seed(1)
    condition = {}
    if config.text_hidden_size is not None:
        shape = (batch_size, TEXT_LENGTH, config.text_hidden_size)
        condition["encoder_hidden_states"] = torch.randn(shape, generator=generator)
        lengths = torch.arange(batch_size) % TEXT_LENGTH + 1
        condition["encoder_attention_mask"] = (torch.arange(TEXT_LENGTH) < lengths[:, None]).long()
    if config.num_classes is not None:
        condition["class_labels"] = torch.arange(batch_size) % config.num_classes
    return condition


def make_negative(config):
    if config.text_hidden_size is None:
        return {}
    states = torch.randn(1, 2, config.text_hidden_size, generator=torch.Generator().manual_seed(2))
    return {"negative_encoder_hidden_states": states, "negative_encoder_attention_mask": torch.tensor([[1, 0]])}


def rows(condition, index):
    return {name: value[index] for name, value in condition.items()}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=list(KINDS))
def prior(request):
    return make_prior(request.param)


@pytest.fixture(params=["text", "class", "text and class", "every option"])
def guided_prior(request):
    return make_prior(request.param)


@pytest.fixture
def input_ids():
    return torch.cat(
        [
            torch.full((3, 1), VOCABULARY),
            torch.randint(VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(3)),
        ],
        dim=1,
    )


# Forward


@torch.no_grad()
def test_a_position_does_not_depend_on_later_tokens(prior, input_ids):
    condition = make_condition(prior.config)
    changed = input_ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % VOCABULARY

    before, after = prior(input_ids, **condition).logits, prior(changed, **condition).logits

    torch.testing.assert_close(after[:, :4], before[:, :4], atol=0, rtol=0)
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize("make_cache", [
    lambda config: DynamicCache(config=config), lambda config: StaticCache(config=config, max_cache_len=NUM_TOKENS)
], ids=["dynamic", "static"])  # fmt: skip
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(prior, input_ids, make_cache):
    condition = make_condition(prior.config)
    expected = prior(input_ids, **condition).logits

    cache, logits = make_cache(prior.config), []
    for start, stop in [(0, 3), (3, 4), (4, 7), (7, 8)]:  # prefill, one token, several tokens, the last
        output = prior(input_ids[:, start:stop], **condition, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)

    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_is_projected_once_when_cached(input_ids):
    prior = make_prior("text")
    cache = prior(input_ids[:, :3], **make_condition(prior.config), use_cache=True).past_key_values
    calls = []
    prior.text_projector.register_forward_hook(lambda *_: calls.append(1))

    prior(input_ids[:, 3:4], past_key_values=cache)

    assert calls == []


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(prior, input_ids):
    condition = make_condition(prior.config)
    together = prior(input_ids, **condition).logits
    alone = [prior(input_ids[i : i + 1], **rows(condition, slice(i, i + 1))).logits for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_of_the_text_changes_nothing(input_ids):
    prior = make_prior("text")
    condition = make_condition(prior.config)
    padded = {
        "encoder_hidden_states": F.pad(condition["encoder_hidden_states"], (0, 0, 0, 4), value=7.0),
        "encoder_attention_mask": F.pad(condition["encoder_attention_mask"], (0, 4)),
    }
    expected = prior(input_ids, **condition).logits
    torch.testing.assert_close(prior(input_ids, **padded).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_and_class_change_the_logits(guided_prior, input_ids):
    condition = make_condition(guided_prior.config)
    before = guided_prior(input_ids, **condition).logits
    for name in set(condition) - {"encoder_attention_mask"}:
        after = guided_prior(input_ids, **{**condition, name: condition[name].roll(1, dims=0)}).logits
        assert not torch.allclose(after, before), name


@torch.no_grad()
def test_the_unconditional_label_adds_nothing(input_ids):
    prior = make_prior("class")
    labels = torch.full((3,), -1)
    before = prior(input_ids, class_labels=labels).logits
    prior.class_embedding.weight.fill_(float("nan"))
    torch.testing.assert_close(prior(input_ids, class_labels=labels).logits, before, atol=0, rtol=0)


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(prior, input_ids):
    condition = make_condition(prior.config)
    expected = prior(input_ids, **condition).logits[:, -2:]
    torch.testing.assert_close(prior(input_ids, **condition, logits_to_keep=2).logits, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(prior, input_ids):
    condition = make_condition(prior.config)
    (logits,) = prior(input_ids, **condition, use_cache=False, return_dict=False)
    assert logits.equal(prior(input_ids, **condition).logits)


# Training


def test_the_loss_is_the_cross_entropy_of_the_next_token(prior, input_ids):
    condition = make_condition(prior.config)
    full = torch.cat([input_ids, torch.full((3, 1), 5)], dim=1)  # the start and all `max_position_embeddings` tokens
    labels = full.clone()
    labels[0, 2] = -100

    output = prior(full, **condition, labels=labels)

    logits = prior(full[:, :-1], **condition).logits
    targets = labels[:, 1:]
    picked = logits.log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(output.loss, -picked[targets != -100].mean())
    assert output.logits.shape == (3, NUM_TOKENS, VOCABULARY)


def test_the_loss_divides_by_the_passed_number_of_items(prior, input_ids):
    condition = make_condition(prior.config)
    mean = prior(input_ids, **condition, labels=input_ids).loss
    shared = prior(input_ids, **condition, labels=input_ids, num_items_in_batch=42).loss
    torch.testing.assert_close(shared, mean * input_ids[:, 1:].numel() / 42)


def test_every_parameter_gets_a_gradient(prior, input_ids):
    full = torch.cat([input_ids, torch.full((3, 1), 5)], dim=1)
    prior.train()(full, **make_condition(prior.config), labels=full).loss.backward()
    without = [name for name, value in prior.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_gradient_checkpointing_changes_no_gradient(prior, input_ids):
    condition = make_condition(prior.config)

    def gradients():
        prior.zero_grad()
        prior.train()(input_ids, **condition, labels=input_ids).loss.backward()
        return [value.grad.clone() for value in prior.parameters()]

    plain = gradients()
    prior.gradient_checkpointing_enable()
    for checkpointed, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(checkpointed, expected)


def test_one_batch_can_be_overfitted(input_ids):
    prior = make_prior("text").train()
    condition = make_condition(prior.config)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-2)
    for _ in range(80):
        loss = prior(input_ids, **condition, labels=input_ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert prior.eval().generate(**condition, max_new_tokens=7).equal(input_ids)


def test_dropout_acts_in_training_only(input_ids):
    prior = make_prior("class", dropout=0.5)
    condition = make_condition(prior.config)
    assert prior(input_ids, **condition).logits.equal(prior(input_ids, **condition).logits)
    prior.train()
    assert not torch.allclose(prior(input_ids, **condition).logits, prior(input_ids, **condition).logits)


# Saving


@torch.no_grad()
def test_saving_and_loading_keeps_every_bit(prior, input_ids, tmp_path):
    condition = make_condition(prior.config)
    prior.save_pretrained(tmp_path)
    loaded = FlexTokPriorForCausalLM.from_pretrained(tmp_path)
    changed = {name for name, value in loaded.config.to_dict().items() if prior.config.to_dict().get(name) != value}
    assert changed <= {"_name_or_path", "dtype", "architectures", "transformers_version"}
    assert loaded(input_ids, **condition).logits.equal(prior(input_ids, **condition).logits)


def test_there_are_no_buffers_to_lose_on_load(prior):
    assert list(prior.named_buffers()) == []


def test_residual_outputs_start_smaller_than_other_weights():
    block = make_prior("text", hidden_size=64, intermediate_size=64).blocks[0]
    for projection in (block.self_attention.out_proj, block.cross_attention.out_proj, block.mlp.down_proj):
        assert abs(projection.weight.std() - 0.15) < 0.01  # 0.3 / sqrt(2 * 2 layers)
    assert abs(block.self_attention.qkv_proj.weight.std() - 0.3) < 0.01


# Generation


def test_the_cache_of_a_caller_is_not_reused():
    prior = make_prior("class")
    condition, inputs = make_condition(prior.config), torch.full((3, 1), VOCABULARY)
    cache = StaticCache(config=prior.config, max_cache_len=4)
    prior.generate(inputs, **condition, generator=torch.Generator(), max_new_tokens=3, **{CACHE_NAME: cache})
    assert int(cache.get_seq_length()) == 3 and prior.kept_cache is None


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 1}])
def test_all_caches_generate_the_same_tokens(prior, options):
    condition = make_condition(prior.config)
    inputs = torch.full((3, 1), VOCABULARY)
    expected = prior.generate(inputs, **condition)
    assert prior.generate(inputs, **condition, **options).equal(expected)
    assert prior.generate(inputs, **condition, **options, generator=torch.Generator()).equal(expected)


def test_all_tokens_are_generated_by_default(prior):
    sequences = prior.generate(torch.full((3, 1), VOCABULARY), **make_condition(prior.config))
    assert sequences.shape == (3, 1 + NUM_TOKENS)
    assert sequences[:, 0].eq(VOCABULARY).all() and sequences[:, 1:].lt(VOCABULARY).all()


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_guidance_equals_separate_conditional_and_unconditional_calls(guided_prior, options):
    config = guided_prior.config
    condition, negative = make_condition(config), make_negative(config)
    unconditional = {
        name.removeprefix("negative_"): value.expand(3, *value.shape[1:]) for name, value in negative.items()
    }
    if config.num_classes is not None:
        unconditional["class_labels"] = torch.full((3,), -1)
    ids = torch.full((3, 1), VOCABULARY)
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            on, off = (guided_prior(ids, **given).logits[:, -1] for given in (condition, unconditional))
        ids = torch.cat([ids, (off + 2.5 * (on - off)).argmax(-1, keepdim=True)], dim=1)

    assert guided_prior.generate(**condition, **negative, guidance_scale=2.5, **options).equal(ids)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("prefix_length", [0, 3])
def test_class_zero_guidance_starts_without_a_class_and_continues_with_class_zero(options, prefix_length):
    prior = make_prior("class")
    labels = torch.tensor([1, 2, 3])
    inputs = ids = torch.cat([torch.full((3, 1), VOCABULARY), torch.arange(3 * prefix_length).view(3, -1)], dim=1)
    for step in range(NUM_TOKENS - prefix_length):
        with torch.no_grad():
            on = prior(ids, class_labels=labels).logits[:, -1]
            off = prior(ids, class_labels=torch.full((3,), -1 if step == 0 else 0)).logits[:, -1]
        ids = torch.cat([ids, (off + 2.5 * (on - off)).argmax(-1, keepdim=True)], dim=1)

    asked = {"inputs": inputs, "class_labels": labels, "guidance_scale": 2.5, **options}
    assert prior.generate(**asked, class_zero_guidance=True).equal(ids)
    assert not prior.generate(**asked).equal(ids)


def test_class_zero_guidance_is_saved_with_the_prior(tmp_path):
    prior = make_prior("class")
    asked = {"class_labels": torch.tensor([1, 2, 3]), "guidance_scale": 2.5}
    expected = prior.generate(**asked, class_zero_guidance=True)
    prior.generation_config.class_zero_guidance = True
    prior.save_pretrained(tmp_path)
    loaded = type(prior).from_pretrained(tmp_path)

    assert loaded.generate(**asked).equal(expected)
    assert not loaded.generate(**asked, class_zero_guidance=False).equal(expected)


def test_a_list_of_generators_makes_rows_independent_of_their_batch(guided_prior):
    condition, negative = make_condition(guided_prior.config), make_negative(guided_prior.config)
    options = {**negative, "guidance_scale": 2.0, "do_sample": True}
    together = guided_prior.generate(**condition, **options, generator=seeded(5, 6, 7))
    for index, seed in enumerate((5, 6, 7)):
        one = rows(condition, slice(index, index + 1))
        alone = guided_prior.generate(**one, **options, generator=seeded(seed))
        assert alone.equal(together[index : index + 1])


def test_the_same_seed_generates_the_same_tokens(prior):
    inputs, condition = torch.full((3, 1), VOCABULARY), make_condition(prior.config)
    first, second, other = (
        prior.generate(inputs, **condition, do_sample=True, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert first.equal(second)
    assert not first.equal(other)


def test_a_generator_does_not_touch_the_global_one(prior):
    inputs, condition = torch.full((3, 1), VOCABULARY), make_condition(prior.config)
    before = torch.get_rng_state()
    prior.generate(inputs, **condition, do_sample=True, generator=torch.Generator())
    prior.generate(inputs, **condition, do_sample=True, generator=seeded(1, 2, 3))
    assert torch.get_rng_state().equal(before)


def test_a_shorter_request_is_a_prefix_of_a_longer_one(prior):
    inputs, condition = torch.full((3, 1), VOCABULARY), make_condition(prior.config)
    options = {"do_sample": True, **condition}
    short = prior.generate(inputs, **options, max_new_tokens=3, generator=seeded(1, 2, 3))
    long = prior.generate(inputs, **options, max_new_tokens=7, generator=seeded(1, 2, 3))
    assert long[:, :4].equal(short)


def test_a_prefix_is_continued_as_if_it_had_been_generated(guided_prior):
    condition, negative = make_condition(guided_prior.config), make_negative(guided_prior.config)
    whole = guided_prior.generate(**condition, **negative, guidance_scale=2.0)
    rest = guided_prior.generate(whole[:, :5], **condition, **negative, guidance_scale=2.0)
    assert rest.equal(whole)


def test_sampling_uses_the_whole_distribution_by_default():
    prior = make_prior("class", codebook_size=80, initializer_range=0.001)  # nearly uniform over more than 50 ids
    labels = torch.zeros(2000, dtype=torch.long)  # one class, one token: all rows share one distribution
    sequences = prior.generate(class_labels=labels, do_sample=True, max_new_tokens=1, generator=seeded(0)[0])
    assert sequences[:, 1:].unique().numel() > 70


def test_a_top_p_of_zero_disables_the_filter():
    prior = make_prior("class")
    options = {"class_labels": torch.tensor([1]), "do_sample": True}
    zero, one = (prior.generate(**options, top_p=top_p, generator=seeded(4)) for top_p in (0.0, 1.0))
    assert zero.equal(one)


def test_log_probabilities_are_those_of_the_filtered_distribution():
    prior = make_prior("class")
    options = {"class_labels": torch.tensor([1, 2]), "do_sample": True, "top_k": 1, "generator": seeded(0, 1)}
    output = prior.generate(**options, return_log_probs=True)
    assert output.sequences.shape == (2, 1 + NUM_TOKENS)
    torch.testing.assert_close(output.log_probs, torch.zeros(2, NUM_TOKENS))


def test_several_sequences_per_condition_are_grouped_by_condition(guided_prior):
    condition, negative = make_condition(guided_prior.config), make_negative(guided_prior.config)
    options = {**condition, **negative, "guidance_scale": 2.0}
    once = guided_prior.generate(**options)
    twice = guided_prior.generate(
        **options, num_return_sequences=2, do_sample=True, top_k=1, generator=seeded(*range(6))
    )
    assert twice.equal(once.repeat_interleave(2, dim=0))


def test_options_may_be_passed_as_a_generation_config():
    prior = make_prior("class")
    options = {"do_sample": True, "max_new_tokens": 4, "guidance_scale": 2.0, "top_p": 0.9}
    labels = torch.tensor([1, 2])
    one_by_one = prior.generate(class_labels=labels, generator=seeded(0, 1), **options)
    config = GenerationConfig(**options)
    together = prior.generate(class_labels=labels, generation_config=config, generator=seeded(0, 1))
    assert together.equal(one_by_one)
    assert config.guidance_scale == 2.0  # unchanged


def test_beam_search_scores_at_least_the_greedy_sequence():
    prior = make_prior("text")
    condition = make_condition(prior.config)
    options = {**condition, "output_scores": True, "return_dict_in_generate": True}
    beams = prior.generate(**options, num_beams=4, length_penalty=0.0)
    greedy = prior.generate(**condition, return_log_probs=True)
    assert (beams.sequences_scores >= greedy.log_probs.sum(dim=1) - 1e-4).all()


def test_a_token_without_probability_is_never_drawn():
    scores = torch.full((500, 4), -torch.inf)
    scores[:, 2] = 0.0
    assert choose(scores, do_sample=True, generator=torch.Generator()).eq(2).all()


@torch.no_grad()
def test_a_decoding_step_compiles_without_graph_breaks(guided_prior):
    condition = make_condition(guided_prior.config)
    caches = [StaticCache(config=guided_prior.config, max_cache_len=NUM_TOKENS) for _ in range(2)]
    start, step = torch.full((3, 1), VOCABULARY), torch.tensor([[1], [2], [3]])
    caches = [guided_prior(start, **condition, past_key_values=cache).past_key_values for cache in caches]
    compiled = torch.compile(guided_prior, fullgraph=True, backend="eager")

    logits = compiled(step, **condition, past_key_values=caches[0]).logits

    expected = guided_prior(step, **condition, past_key_values=caches[1]).logits
    torch.testing.assert_close(logits, expected)


@torch.no_grad()
def test_a_compiled_step_serves_all_lengths_and_prompts():
    prior = make_prior("text")
    options = {"compile_config": CompileConfig(backend="eager", mode=None, fullgraph=True)}
    options["compile_config"]._compile_all_devices = True  # Transformers compiles on accelerators only
    options |= {"cache_implementation": "static", "generator": torch.Generator(), "guidance_scale": 2.0}
    torch._dynamo.reset()
    counters.clear()
    for text_length, num_tokens in ((TEXT_LENGTH, 4), (3, NUM_TOKENS), (1, 6)):
        condition = {name: value[:, :text_length] for name, value in make_condition(prior.config).items()}
        condition |= make_negative(prior.config)
        generated = prior.generate(**condition, max_new_tokens=num_tokens, **options)
        assert generated.equal(prior.generate(**condition, max_new_tokens=num_tokens, guidance_scale=2.0))
    assert counters["stats"]["unique_graphs"] == 1


def test_the_static_cache_of_a_compiled_call_is_reused_unless_it_was_returned():
    prior = make_prior("text")
    options = {"compile_config": CompileConfig(backend="eager", mode=None)}
    options["compile_config"]._compile_all_devices = True
    options |= {"cache_implementation": "static", "generator": torch.Generator()}
    condition = make_condition(prior.config)
    first = prior.generate(**condition, **options)
    kept = prior.kept_cache
    assert kept is not None
    assert prior.generate(**condition, **options).equal(first) and prior.kept_cache is kept
    assert prior.generate(**condition, **options, return_log_probs=True).sequences.equal(first)
    assert prior.kept_cache is None
    prior.generate(**rows(condition, slice(2)), **options)
    assert prior.kept_cache is not kept


def test_a_compiled_call_continues_from_its_own_cache_and_not_from_a_kept_one():
    prior = make_prior("text")
    options = {"compile_config": CompileConfig(backend="eager", mode=None), "generator": torch.Generator()}
    options["compile_config"]._compile_all_devices = True
    condition = make_condition(prior.config)
    whole = prior.generate(**condition, **options, cache_implementation="static")
    part = prior.generate(
        **condition, **options, cache_implementation="static", max_new_tokens=2, return_log_probs=True
    )
    prior.generate(**condition, **options, cache_implementation="static")
    assert prior.kept_cache is not None
    given = {CACHE_NAME: getattr(part, CACHE_NAME)}
    rest = prior.generate(part.sequences, **condition, **options, **given, return_log_probs=True)
    assert rest.sequences.equal(whole) and getattr(rest, CACHE_NAME) is given[CACHE_NAME]


# Wrong input


@pytest.mark.parametrize("changes, message", [
    ({"hidden_size": 15}, "`hidden_size` .* must be a multiple"),
    ({"codebook_size": 0}, "`codebook_size` must be 1 or more"),
    ({"bos_token_id": 3}, "`bos_token_id` is 3"),
    ({"projector_activation": "magic"}, "`projector_activation` is 'magic'"),
    ({"dropout": 1.0}, "`dropout` must lie in"),
    ({"num_classes": "ten"}, "num_classes"),
    ({"norm_type": "batch_norm"}, "`norm_type` must be one of rms_norm, layer_norm, got 'batch_norm'"),
    ({"qk_norm_type": "batch_norm"}, "`qk_norm_type` must be one of"),
])  # fmt: skip
def test_an_inconsistent_config_is_refused(changes, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        make_config("text", **changes)


def test_vocab_size_is_an_alias_of_codebook_size():
    config = FlexTokPriorConfig(codebook_size=10)
    assert (config.vocab_size, config.bos_token_id) == (10, 10)


def test_rms_norm_eps_is_an_alias_of_norm_eps():
    config = FlexTokPriorConfig(rms_norm_eps=1e-3)
    assert config.norm_eps == config.rms_norm_eps == 1e-3
    assert FlexTokPriorConfig.from_dict({"rms_norm_eps": 1e-4}).norm_eps == 1e-4


START = torch.full((2, 1), VOCABULARY)
TEXT = torch.zeros(2, TEXT_LENGTH, TEXT_WIDTH)
NO_TEXT = torch.zeros(2, TEXT_LENGTH)
LABELS = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("kind, arguments, message", [
    ("text", {"input_ids": START}, "`encoder_hidden_states` is missing"),
    ("text", {"input_ids": START, "encoder_hidden_states": TEXT[..., 1:]}, "`encoder_hidden_states` must have shape"),
    ("text", {"input_ids": START, "encoder_hidden_states": TEXT[:1]}, "`encoder_hidden_states` must have shape"),
    ("text", {"input_ids": START, "encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(2, 2)},
     "`encoder_attention_mask` must have shape"),
    ("text", {"input_ids": START, "encoder_hidden_states": TEXT, "encoder_attention_mask": NO_TEXT},
     "`encoder_attention_mask` .* masks the whole text"),
    ("text", {"input_ids": START, "encoder_hidden_states": TEXT, "class_labels": LABELS}, "has no classes"),
    ("class", {"input_ids": START}, "`class_labels` is missing"),
    ("class", {"input_ids": START, "class_labels": LABELS + NUM_CLASSES}, "`class_labels` must hold values"),
    ("class", {"input_ids": START, "class_labels": LABELS - 2}, "`class_labels` must hold values"),
    ("class", {"input_ids": START, "class_labels": LABELS.float()}, "`class_labels` must be integers"),
    ("class", {"input_ids": START, "class_labels": LABELS, "encoder_hidden_states": TEXT}, "reads no text"),
    ("unconditional", {"input_ids": START + 1}, "`input_ids` must hold values"),
    ("unconditional", {"input_ids": START.float()}, "`input_ids` must be integers"),
    ("unconditional", {"input_ids": START[:, :0]}, "`input_ids` must be integers of shape"),
    ("unconditional", {"input_ids": START.repeat(1, NUM_TOKENS + 2)}, "`input_ids` needs 10 positions"),
    ("unconditional", {"input_ids": START, "labels": START}, "`labels` of shape"),
    ("unconditional", {"input_ids": START.repeat(1, 3), "labels": START.repeat(1, 3)}, "`labels` must hold values"),
])  # fmt: skip
def test_forward_refuses_what_it_cannot_run(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_prior(kind)(**arguments)


@pytest.mark.parametrize("kind, arguments, message", [
    ("text", {}, "`encoder_hidden_states` is missing"),
    ("text", {"encoder_hidden_states": TEXT, "guidance_scale": 2.0}, "`negative_encoder_hidden_states` is missing"),
    ("text", {"encoder_hidden_states": TEXT, "guidance_scale": 2.0, "negative_encoder_hidden_states": TEXT[:, :0]},
     "`negative_encoder_hidden_states` must have shape"),
    ("class", {}, "`class_labels` is missing"),
    ("class", {"class_labels": LABELS + NUM_CLASSES}, "`class_labels` must hold values"),
    ("class", {"class_labels": LABELS, "max_new_tokens": NUM_TOKENS + 1}, "`max_new_tokens` .* asks for"),
    ("class", {"class_labels": LABELS, "inputs": START, "max_new_tokens": 0}, "`max_new_tokens` must be"),
    ("class", {"class_labels": LABELS, "inputs": START - 1}, "start with `bos_token_id`"),
    ("class", {"class_labels": LABELS, "inputs": START.repeat(1, 2)}, "`inputs` must hold values"),
    ("class", {"class_labels": LABELS, "generator": [torch.Generator()]}, "`generator` is a list of 1"),
    ("class", {"class_labels": LABELS, "guidance_scale": 2.0, "num_beams": 2}, "the options of beam"),
    ("class", {"class_labels": LABELS, "temprature": 2.0}, "temprature"),
    ("class", {"class_labels": LABELS, "do_sample": True, "temperature": 0.0}, "temperature"),
    ("unconditional", {"guidance_scale": 2.0}, "this model is unconditional"),
    ("text", {"encoder_hidden_states": TEXT, "class_zero_guidance": True}, "`class_zero_guidance` is for models with"),
])  # fmt: skip
def test_generate_refuses_what_it_cannot_run(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_prior(kind).generate(**arguments)
