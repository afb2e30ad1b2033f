"""The prior behind every way of Transformers' `generate`: each gives the tokens of the plain loop without a cache."""

import copy
import itertools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from test_prior import NUM_TOKENS, VOCABULARY, make_condition, make_config, make_negative, make_prior, rows
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, LogitsProcessor, StaticCache, StoppingCriteria

from flextok_hf.models.modeling_prior import FlexTokPriorForCausalLM
from flextok_hf.models.prior_cache import CACHE_NAME


LOOPS = {
    "greedy": {},
    "own": {"return_log_probs": True},
    "beams": {"num_beams": 3},
    "assisted": {"assistant_model": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def start(num_rows=3):
    return torch.full((num_rows, 1), VOCABULARY)


def run(prior, num_rows=3, inputs=None, **options):
    """Generate with the conditions of `num_rows` rows; returns the sequences."""
    if options.get("assistant_model") is True:
        options["assistant_model"] = make_prior(prior.kind, num_hidden_layers=1)
    inputs = start(num_rows) if inputs is None else inputs
    output = prior.generate(inputs, **rows(make_condition(prior.config), slice(num_rows)), **options)
    return getattr(output, "sequences", output)


@pytest.fixture(params=["class", "text", "text and class", "unconditional"])
def prior(request):
    prior = make_prior(request.param)
    prior.kind = request.param
    return prior


@pytest.fixture(params=["class", "text"])
def guided_prior(request):
    prior = make_prior(request.param)
    prior.kind = request.param
    return prior


class Favour(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 7] = 100
        return scores


class StopAtFour(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 4)


class Streamer:
    def __init__(self):
        self.values, self.has_ended = [], False

    def put(self, value):
        self.values += value.flatten().tolist()

    def end(self):
        self.has_ended = True


# Caches


@pytest.mark.parametrize("loop", ["greedy", "own", "beams"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_every_loop_gives_the_same_with_and_without_a_cache(prior, loop, kind):
    assert run(prior, **LOOPS[loop], cache_implementation=kind).equal(run(prior, **LOOPS[loop], use_cache=False))


@pytest.mark.parametrize("loop", ["assisted", "lookup"])
def test_proposed_tokens_change_nothing(prior, loop):
    for length in (1, 3, NUM_TOKENS):  # of what is continued
        given = run(prior, 1, use_cache=False)[:, :length]
        assert run(prior, 1, given, **LOOPS[loop]).equal(run(prior, 1, given, use_cache=False))


def test_repeated_tokens_propose_at_most_as_many_as_there_are_positions(prior):
    repeated = torch.cat([start(1), torch.tensor([[5, 6, 5, 6, 5]])], dim=1)
    expected = run(prior, 1, repeated, use_cache=False)
    assert run(prior, 1, repeated, prompt_lookup_num_tokens=10).equal(expected)


def test_sampling_with_beams_draws_the_same_with_and_without_a_cache(prior):
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        drawn.append(run(prior, num_beams=3, do_sample=True, use_cache=use_cache))
    assert drawn[0].equal(drawn[1])


def test_an_assistant_gets_the_conditions(guided_prior):
    assistant, seen = make_prior(guided_prior.kind, num_hidden_layers=1), []
    assistant.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run(guided_prior, 1, assistant_model=assistant)
    for name, value in rows(make_condition(guided_prior.config), slice(1)).items():
        assert seen and all(kwargs[name].equal(value) for kwargs in seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_change_nothing(prior, kind):
    expected = run(prior, use_cache=False)
    prior.to("cuda")
    condition = {name: value.to("cuda") for name, value in make_condition(prior.config).items()}
    assert prior.generate(start().to("cuda"), **condition, cache_implementation=kind).cpu().equal(expected)


def test_a_quantized_cache_runs(prior):
    pytest.importorskip("optimum.quanto")
    cache_config = {"nbits": 4, "q_group_size": 16, "axis_key": 0, "axis_value": 0, "residual_length": 4}
    assert run(prior, cache_implementation="quantized", cache_config=cache_config).shape == (3, NUM_TOKENS + 1)


def test_memory_is_kept_for_a_compiled_step_only_and_freed_when_the_model_changes(prior):
    run(prior, cache_implementation="static", generator=torch.Generator())
    assert prior.kept_cache is None
    options = {"compile_config": CompileConfig(backend="eager", mode=None), "generator": torch.Generator()}
    options["compile_config"]._compile_all_devices = True
    for change in (prior.float, lambda: prior.to("cpu"), lambda: prior.keep_cache(None)):
        run(prior, cache_implementation="static", **options)
        assert prior.kept_cache is not None
        change()
        assert prior.kept_cache is None


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 3])
def test_all_steps_with_a_static_cache_are_one_graph(prior, num_rows):
    condition = rows(make_condition(prior.config), slice(num_rows))
    ids = run(prior, num_rows)
    cache = StaticCache(config=prior.config, max_cache_len=NUM_TOKENS)
    cache = prior(ids[:, :1], **condition, past_key_values=cache).past_key_values
    compiled = torch.compile(prior, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    for place in range(1, NUM_TOKENS):
        inputs = prior.prepare_inputs_for_generation(ids[:, : place + 1], **{CACHE_NAME: cache})
        logits = compiled(**inputs, **condition).logits
        assert logits[:, -1].argmax(dim=-1).equal(ids[:, place + 1])
    assert counters["stats"]["unique_graphs"] == 1


class Reads(TorchDispatchMode):
    """Counts values read from tensors: on an accelerator, each would wait for it."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_the_next_step_with_a_static_cache_is_prepared_without_reading_it(prior):
    ids, condition = run(prior), make_condition(prior.config)
    cache = StaticCache(config=prior.config, max_cache_len=NUM_TOKENS)
    cache = prior(ids[:, :3], **condition, past_key_values=cache).past_key_values
    with Reads() as reads:
        prior.prepare_inputs_for_generation(ids[:, :4], next_sequence_length=1, **{CACHE_NAME: cache})
    assert reads.count == 0


# Options


@pytest.mark.parametrize("loop", LOOPS)
def test_processors_and_prefix_functions_choose_the_tokens(prior, loop):
    for option in ({"logits_processor": [Favour()]}, {"prefix_allowed_tokens_fn": lambda row, ids: [7]}):
        assert (run(prior, 1, **LOOPS[loop], **option)[:, 1:] == 7).all()


@pytest.mark.parametrize("loop", ["greedy", "own", "beams"])
def test_a_stopping_criterion_stops(prior, loop):
    assert run(prior, **LOOPS[loop], stopping_criteria=[StopAtFour()]).shape == (3, 4)


@pytest.mark.parametrize("options", [{}, {"assistant_model": True}, {"do_sample": True}])
def test_a_streamer_gets_every_token(prior, options):
    streamer = Streamer()
    sequences = run(prior, 1, streamer=streamer, **options)
    assert streamer.values == sequences[0].tolist() and streamer.has_ended


def test_several_sequences_per_row(prior):
    assert run(prior, num_return_sequences=2, do_sample=True).shape == (6, NUM_TOKENS + 1)
    assert run(prior, num_return_sequences=2, num_beams=3)[::2].equal(run(prior, num_beams=3))


@pytest.mark.parametrize("loop", ["greedy", "own", "beams", "assisted"])
def test_what_is_returned_on_request_has_an_entry_per_token(prior, loop):
    names = ["scores", "logits", "hidden_states", "attentions"]
    options = {"return_dict_in_generate": True, **{f"output_{name}": True for name in names}, **LOOPS[loop]}
    if loop == "assisted":
        options["assistant_model"] = make_prior(prior.kind, num_hidden_layers=1)
    output = prior.generate(start(1), **rows(make_condition(prior.config), slice(1)), **options)
    num_rows, num_layers = options.get("num_beams", 1), prior.config.num_hidden_layers
    assert [len(output[name]) for name in names] == [NUM_TOKENS] * 4
    assert output.scores[0].shape == output.logits[0].shape == (num_rows, VOCABULARY)
    for place, (states, weights) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
        assert [state.shape for state in states] == [(num_rows, 1, 16)] * (num_layers + 1)
        assert [weight.shape for weight in weights] == [(num_rows, 2, 1, place + 1)] * num_layers
    if loop == "greedy":
        assert torch.stack(output.logits).argmax(dim=-1).flatten().equal(output.sequences[0, 1:])


# What is continued


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_shorter_prefixes_are_padded_on_the_left(prior, options):
    check_padding(prior, **options)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_shorter_prefixes_are_padded_on_the_left_in_the_own_loop(guided_prior, options, guidance_scale):
    check_padding(guided_prior, guidance_scale, generator=torch.Generator(), **options)


def test_padding_with_class_zero_guidance():
    prior = make_prior("class")
    check_padding(prior, 2.0, class_zero_guidance=True)


def check_padding(prior, guidance_scale=1.0, **options):
    if guidance_scale != 1.0:
        options |= {"guidance_scale": guidance_scale, **make_negative(prior.config)}
    condition = make_condition(prior.config)
    lengths = (4, 2, 1)
    ids = torch.full((3, 4), 3)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.tensor([VOCABULARY, 11, 12, 13])[:length]
    mask = (torch.arange(4) >= 4 - torch.tensor(lengths)[:, None]).long()
    together = prior.generate(ids, **condition, **options, attention_mask=mask, max_new_tokens=3)
    for row, length in enumerate(lengths):
        own = rows(condition, slice(row, row + 1))
        alone = prior.generate(ids[row : row + 1, -length:], **own, **options, max_new_tokens=3)
        assert together[row, -3:].equal(alone[0, -3:])


def test_a_mask_of_ones_is_no_mask(prior):
    ids = run(prior)[:, :3]
    assert run(prior, inputs=ids, attention_mask=torch.ones(3, 3)).equal(run(prior, inputs=ids))


@pytest.mark.parametrize("options", [{}, {"generator": torch.Generator()}, {"num_beams": 2}])
def test_embedded_prefixes_are_continued(prior, options):
    ids = run(prior)[:, :3]
    embedded = prior.generate(
        inputs_embeds=prior.get_input_embeddings()(ids), **make_condition(prior.config), **options, max_new_tokens=4
    )
    assert embedded.equal(run(prior, inputs=ids, **options, max_new_tokens=4)[:, 3:])


def test_embedded_prefixes_are_continued_with_guidance(guided_prior):
    options = {"guidance_scale": 2.0, **make_negative(guided_prior.config), "max_new_tokens": 4}
    ids = run(guided_prior)[:, :3]
    embeds = guided_prior.get_input_embeddings()(ids)
    embedded = guided_prior.generate(inputs_embeds=embeds, **make_condition(guided_prior.config), **options)
    assert embedded.equal(run(guided_prior, inputs=ids, **options)[:, 3:])


# Adapters and embeddings


def test_an_added_adapter_generates_and_can_be_trained(prior):
    peft = pytest.importorskip("peft")
    expected = run(prior)
    try:
        prior.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv_proj"]))
    except ValueError as error:
        pytest.skip(str(error))  # Transformers needs a later PEFT than the newest one
    assert run(prior).equal(expected)  # a new adapter changes nothing
    ids = expected[:, :5]
    prior(ids, **make_condition(prior.config), labels=ids).loss.backward()
    for name, parameter in prior.named_parameters():
        assert (parameter.grad is not None) == ("lora" in name)
        if "lora" in name:
            parameter.data.normal_()
    assert not run(prior).equal(expected)


def test_embeddings_can_be_set_and_not_resized(prior):
    table = copy.deepcopy(prior.get_input_embeddings())
    prior.set_input_embeddings(table)
    assert prior.get_input_embeddings() is prior.token_embedding is table
    assert prior.get_output_embeddings() is prior.head
    assert prior.resize_token_embeddings() is table
    for size in (1, VOCABULARY, 64000):
        with pytest.raises(ValueError, match=f"`resize_token_embeddings` to {size}"):
            prior.resize_token_embeddings(size)


# Wrong input


NOT_COMBINED = "`generator` and `return_log_probs` cannot be combined with "


@pytest.mark.parametrize(
    "option, message",
    [
        ({"num_beams": 2}, NOT_COMBINED + "the options of beam search"),
        ({"num_beams": 2, "do_sample": True}, NOT_COMBINED + "the options of beam sample"),
        ({"prompt_lookup_num_tokens": 2}, NOT_COMBINED + "the options of assisted generation"),
        ({"streamer": Streamer()}, NOT_COMBINED + "`streamer`"),
        ({"assistant_model": True}, NOT_COMBINED + "`assistant_model`"),
    ],
)
@pytest.mark.parametrize("own", ["generator", "guidance_scale", "return_log_probs"])
def test_other_loops_are_refused_by_name_where_only_the_own_one_works(option, message, own):
    prior = make_prior("class")
    prior.kind = "class"
    value = {"generator": torch.Generator(), "guidance_scale": 2.0, "return_log_probs": True}[own]
    with pytest.raises(ValueError, match=message):
        run(prior, 1, **option, **{own: value})


def test_beams_of_the_models_own_defaults_are_refused_too():
    prior = make_prior("class")
    prior.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="the options of beam search"):
        prior.generate(class_labels=torch.tensor([1]), return_log_probs=True)


NAN, INFINITY = float("nan"), float("inf")
NO_NUMBERS = ["3", [1], torch.Generator(), NAN, INFINITY, True]
WRONG = {
    "max_new_tokens": [*NO_NUMBERS, 0, -1, 2.0, 10**9],
    "max_length": [*NO_NUMBERS, 0, -1, 2.0],
    "min_new_tokens": [*NO_NUMBERS, -1, 2.0],
    "num_beams": [*NO_NUMBERS, 0, -1, 2.0],
    "num_return_sequences": [*NO_NUMBERS, 0, -1, 2.0],
    "top_k": [*NO_NUMBERS, -1, 2.5],
    "top_p": [*NO_NUMBERS, -0.1, 1.5],
    "temperature": [*NO_NUMBERS, -1.0],
    "guidance_scale": NO_NUMBERS,
    "generator": [0, "0", [0, 1], [None, None], (torch.Generator(),) * 2, NAN],
    "generation_config": [{}, 3, "greedy"],
    "assistant_early_exit": [1],
    "prefill_chunk_size": [2],
    "labels": [start(2)],
    "position_ids": [torch.tensor([[3]])],
    "inputs_embeds": [3, [1.0], torch.zeros(2, 1, 16)],  # besides `inputs`
    "inputs": [3, "a", [[VOCABULARY]], start(2).numpy(), start(2).float(), start(2)[:0], start(2)[:, :0], start(2)[0]],
    "attention_mask": [1, [[1]], torch.ones(2, 2), torch.zeros(2, 1), torch.full((2, 1), NAN), torch.full((2, 1), 2)],
    "class_labels": [1, "a", [1, 2], torch.tensor([0.5, 1]), torch.tensor([True, False]), torch.tensor([[0, 1]])],
    CACHE_NAME: [3, [], torch.zeros(2)],
}
WRONG["class_labels"] += [torch.tensor([0, 4]), torch.tensor([-2, 0]), torch.tensor([0, 1], dtype=torch.uint8)]


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_arguments_of_generate_are_refused_by_name(name, value):
    prior = make_prior("class")
    arguments = {"inputs": start(2), "class_labels": torch.tensor([1, 2]), "max_new_tokens": 2, name: value}
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        prior.generate(**arguments)


@pytest.mark.parametrize("part", ["encoder_hidden_states", "encoder_attention_mask"])
@pytest.mark.parametrize("prefix", ["", "negative_"])
def test_wrong_texts_of_generate_are_refused_by_name(part, prefix):
    prior = make_prior("text")
    arguments = {**make_condition(prior.config, 1), **make_negative(prior.config), "guidance_scale": 2.0}
    name = prefix + part
    right = arguments[name].float()
    wrong = [3, "a", right.tolist(), right.numpy(), right[None], right[:0], right[:, :0], right * NAN]
    wrong += [right.double(), right.long()] if name == "encoder_hidden_states" else [right * INFINITY]
    for value in wrong:
        with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
            prior.generate(**{**arguments, name: value})


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"input_ids": 3}, "input_ids"),
        ({"input_ids": start(2).to(torch.uint8)}, "input_ids"),
        ({"position_ids": torch.zeros(2, 2, dtype=torch.long)}, "position_ids"),
        ({"position_ids": torch.zeros(1, 1)}, "position_ids"),
        ({"position_ids": 0}, "position_ids"),
        ({"attention_mask": [1]}, "attention_mask"),
        ({"past_key_values": ()}, "past_key_values"),
        ({"past_key_values": 3}, "past_key_values"),
        ({"labels": 3}, "labels"),
        ({"shift_labels": 3}, "shift_labels"),
        ({"shift_labels": torch.zeros(2, 2, dtype=torch.long)}, "shift_labels"),
        ({"shift_labels": torch.zeros(2, 1, dtype=torch.long), "logits_to_keep": 1}, "logits_to_keep"),
        ({"logits_to_keep": -1}, "logits_to_keep"),
        ({"logits_to_keep": 1.0}, "logits_to_keep"),
        ({"logits_to_keep": "all"}, "logits_to_keep"),
        ({"logits_to_keep": True}, "logits_to_keep"),
    ],
)
def test_wrong_arguments_of_forward_are_refused_by_name(arguments, name):
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        make_prior("unconditional")(**{"input_ids": start(2), **arguments})


COUNTS = ["codebook_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
COUNTS += ["max_position_embeddings", "text_hidden_size", "num_classes"]
FLOATS = ["norm_eps", "qk_norm_eps", "attention_scale", "initializer_range", "dropout"]


@pytest.mark.parametrize("name, value", itertools.product(COUNTS, [0, -1, 2.0, NAN, INFINITY, "3", True]))
def test_a_size_is_a_whole_number_of_one_or_more(name, value):
    with pytest.raises((StrictDataclassError, ValueError), match=name):
        make_config("text", **{name: value})


@pytest.mark.parametrize("name, value", itertools.product(FLOATS, [-0.1, NAN, INFINITY, "3", True]))
def test_a_number_of_the_configuration_is_finite(name, value):
    with pytest.raises((StrictDataclassError, ValueError), match=name):
        make_config("text", **{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_a_size_that_was_set_to_zero_later_makes_no_model(name):
    config = make_config("text")
    setattr(config, name, 0)
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more"):
        FlexTokPriorForCausalLM(config)


# The loss of shifted labels


def test_shifted_labels_give_the_loss_of_labels(prior):
    ids = run(prior)
    condition = make_condition(prior.config)
    shifted = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], dim=1)
    expected = prior(ids, **condition, labels=ids).loss
    torch.testing.assert_close(prior(ids, **condition, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(prior(ids, **condition, labels=ids.roll(1), shift_labels=shifted).loss, expected)


def test_logits_that_are_not_finite_are_an_error(tiny_pipeline):
    prior = copy.deepcopy(tiny_pipeline.prior)
    prior.norm.weight.data[0] = torch.nan
    states = torch.zeros(1, 2, 32)
    with pytest.raises(ValueError, match="The prior computes NaN"):
        prior.generate(encoder_hidden_states=states, do_sample=True, generator=torch.Generator())
