"""The prior as a causal LM of Transformers: masks, embeddings, hidden states, caches, end tokens, `Trainer`."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from test_prior import NUM_TOKENS, VOCABULARY, make_condition, make_prior
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from flextok_hf import FlexTokPriorConfig
from flextok_hf.models.prior_cache import CACHE_NAME


def start(num_rows=3):
    return torch.full((num_rows, 1), VOCABULARY)


@pytest.fixture(params=["class", "text", "text and class", "unconditional"])
def prior(request):
    return make_prior(request.param)


def make_inputs(prior, length=5):
    ids = torch.randint(0, VOCABULARY, (3, length - 1), generator=torch.Generator().manual_seed(4))
    return {"input_ids": torch.cat([start(), ids], dim=1), **make_condition(prior.config)}


# Continuing from a cache


@pytest.mark.parametrize("parts", [(4, 4), (1, 7), (2, 3, 3)])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_in_parts_from_a_cache_is_generation_in_one_go(prior, parts, kind):
    condition = make_condition(prior.config)
    whole = prior.generate(start(), **condition, max_new_tokens=sum(parts))
    cache = DynamicCache(config=prior.config) if kind == "dynamic" else StaticCache(prior.config, NUM_TOKENS)
    ids = start()
    for num_new in parts:
        output = prior.generate(
            ids, **condition, **{CACHE_NAME: cache}, max_new_tokens=num_new, return_dict_in_generate=True
        )
        ids, cache = output.sequences, getattr(output, CACHE_NAME)
    assert ids.equal(whole)


def test_a_cache_that_already_holds_all_ids_is_refused():
    prior = make_prior("class")
    condition = make_condition(prior.config)
    ids = make_inputs(prior, 3)["input_ids"]
    cache = prior(ids, **condition, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="holds 3 positions, but only 3 ids"):
        prior.generate(ids, **condition, **{CACHE_NAME: cache}, max_new_tokens=1)


# Inputs of `forward`


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing(prior):
    inputs = make_inputs(prior)
    masked = prior(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    torch.testing.assert_close(masked.logits, prior(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_on_the_left_changes_nothing_for_what_follows(prior, use_cache):
    inputs = make_inputs(prior)
    expected = prior(**inputs).logits
    padded = {**inputs, "input_ids": torch.cat([torch.zeros(3, 2, dtype=torch.long), inputs["input_ids"]], dim=1)}
    mask = torch.cat([torch.zeros(3, 2), torch.ones(3, 5)], dim=1)
    output = prior(**padded, attention_mask=mask, use_cache=use_cache)
    torch.testing.assert_close(output.logits[:, 2:], expected)
    assert output.logits.isfinite().all()


@torch.no_grad()
def test_embedded_tokens_and_explicit_positions_give_the_same(prior):
    inputs = make_inputs(prior)
    expected = prior(**inputs).logits
    ids = inputs.pop("input_ids")
    positions = torch.arange(5)[None]
    embedded = prior(inputs_embeds=prior.get_input_embeddings()(ids), position_ids=positions, **inputs).logits
    torch.testing.assert_close(embedded, expected)


@torch.no_grad()
def test_hidden_states_are_the_inputs_of_all_blocks_and_the_normalized_end(prior):
    inputs = make_inputs(prior)
    states = prior(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == prior.config.num_hidden_layers + 1
    torch.testing.assert_close(prior.head(prior.head_norm(states[-1])), prior(**inputs).logits)
    assert prior(**inputs).hidden_states is None


@torch.no_grad()
def test_eager_attention_gives_the_same_and_its_weights(prior):
    inputs = make_inputs(prior)
    expected = prior(**inputs).logits
    eager = copy.deepcopy(prior)
    eager.set_attn_implementation("eager")
    output = eager(**inputs, output_attentions=True)
    torch.testing.assert_close(output.logits, expected)
    weights = output.attentions[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not weights.triu(1).any()
    for fused, exact in zip(prior(**inputs, output_attentions=True).attentions, output.attentions, strict=True):
        torch.testing.assert_close(fused, exact)


def test_an_implementation_that_the_prior_does_not_have_is_refused():
    with pytest.raises((ValueError, ImportError), match="[Ff]lash"):
        make_prior("class").set_attn_implementation("flash_attention_2")


@torch.no_grad()
def test_a_full_row_without_labels_has_logits_of_its_length():
    prior = make_prior("unconditional")
    inputs = make_inputs(prior, NUM_TOKENS + 1)
    logits = prior(**inputs).logits
    torch.testing.assert_close(logits[:, :-1], prior(inputs["input_ids"][:, :-1]).logits)
    assert logits.shape[1] == NUM_TOKENS + 1 and not logits[:, -1].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": start(), "inputs_embeds": torch.zeros(3, 1, 16)}, "either `input_ids` or `inputs_embeds`"),
        ({}, "either `input_ids` or `inputs_embeds`"),
        ({"inputs_embeds": torch.zeros(3, 1, 5)}, "`inputs_embeds` must have the shape"),
        ({"input_ids": start(), "attention_mask": torch.ones(3, 4)}, "`attention_mask` must have the shape"),
        ({"input_ids": start(), "position_ids": torch.tensor([[NUM_TOKENS]])}, "`position_ids`"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_prior("unconditional")(**arguments)


# The end of a sequence


def test_rows_end_at_their_own_end_token_and_are_padded(prior):
    condition = make_condition(prior.config)
    whole = prior.generate(start(), **condition, generator=torch.Generator().manual_seed(0), do_sample=True)
    end = whole[0, 3].item()
    output = prior.generate(
        start(),
        **condition,
        generator=torch.Generator().manual_seed(0),
        do_sample=True,
        eos_token_id=end,
        pad_token_id=1,
        return_log_probs=True,
    )
    for row, expected, log_probs in zip(output.sequences, whole, output.log_probs, strict=True):
        ends = (expected == end).nonzero().flatten().tolist()
        length = ends[0] + 1 if ends else len(expected)
        assert row[:length].equal(expected[:length]) and (row[length:] == 1).all()
        assert not log_probs[length - 1 :].any()


def test_an_end_token_that_is_no_code_is_refused():
    with pytest.raises(StrictDataclassError, match="`eos_token_id` is 64000"):
        FlexTokPriorConfig(eos_token_id=64000)


def test_the_sampling_loop_returns_hidden_states_when_asked():
    prior = make_prior("class")
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_hidden_states": True}
    output = prior.generate(start(), **make_condition(prior.config), generator=torch.Generator(), **options)
    assert len(output.hidden_states) == 3
    assert all(len(step) == prior.config.num_hidden_layers + 1 for step in output.hidden_states)


# `Trainer`


def make_rows(prior):
    ids = [VOCABULARY, *range(NUM_TOKENS)]
    condition = {name: value[0] for name, value in make_condition(prior.config).items()}
    return [{"input_ids": ids, "labels": ids, **condition}] * 4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_trains_and_measures_a_loss(prior, tmp_path, smoothing):
    arguments = TrainingArguments(
        tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, max_steps=1, label_smoothing_factor=smoothing
    )
    trainer = Trainer(prior, arguments, train_dataset=make_rows(prior), eval_dataset=make_rows(prior))
    assert trainer.label_names == ["labels"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_peft_trains_the_prior_as_a_causal_lm(prior):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(prior, peft.LoraConfig(r=2, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    inputs = make_inputs(prior)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
