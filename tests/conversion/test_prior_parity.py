"""The prior gives the numbers of the official code, on tiny random checkpoints in the official layout."""

import json

import paths
import pytest
import torch
from official_checkpoints import write_tokenizer
from safetensors.torch import load_file

from flextok_hf import FlexTokPipeline, FlexTokPriorForCausalLM
from flextok_hf.conversion.convert import convert_checkpoint


FIXTURES = paths.FIXTURES / "prior"
GUIDANCE_SCALE = {"t2i": 3.0, "c2i": 1.5}
# Tokenizers with matching numbers of codes and tokens, to build pipelines
TOKENIZERS = {"t2i": {"levels": [8, 6, 5], "registers": 24}, "c2i": {"levels": [20, 15], "registers": 20}}


class Golden:
    """One recorded checkpoint: our model and pipeline, the expected tensors, and the conditions of both halves."""

    def __init__(self, name, folder):
        self.name = name
        self.meta = json.loads((FIXTURES / name / "meta.json").read_text())
        self.expected = load_file(FIXTURES / name / "expected.safetensors")
        tokenizer, _, _ = write_tokenizer(folder / "tokenizer", **TOKENIZERS[name])
        if name == "t2i":  # loaded as a pipeline
            self.pipe = FlexTokPipeline.from_original(str(tokenizer), str(FIXTURES / name))
            self.model = self.pipe.prior
        else:  # a prior on its own: converted, loaded, saved and loaded again
            convert_checkpoint(folder / "converted", prior=str(FIXTURES / name / "model.safetensors"))
            FlexTokPriorForCausalLM.from_pretrained(folder / "converted").save_pretrained(folder / "saved")
            self.model = FlexTokPriorForCausalLM.from_pretrained(folder / "saved")
            self.pipe = FlexTokPipeline.from_original(str(tokenizer), str(FIXTURES / name))
        self.tokens = self.expected["tokens"]
        self.input_ids = self.model.prepend_bos(self.tokens[:, :-1])
        self.guidance_scale = GUIDANCE_SCALE[name]
        self.released = {"class_zero_guidance": True} if name == "c2i" else {}

    def condition(self, half):
        """Arguments of the model, from the recorded text states."""
        if self.name == "c2i":
            labels = torch.tensor(self.meta["labels"])
            return {"class_labels": labels if half == "cond" else torch.full_like(labels, -1)}
        return {
            "encoder_hidden_states": self.expected[f"t5_last_hidden_{half}"],
            "encoder_attention_mask": self.expected[f"text_attention_mask_{half}"],
        }

    def guided(self, **options):
        """Generate tokens with the recorded guidance, prompts encoded by the pipeline; without the start token."""
        _, conditions = self.pipe.encode_condition(self.meta["prompts"], self.meta["labels"], 1)
        output = self.model.generate(**conditions, guidance_scale=self.guidance_scale, **options)
        return output[:, 1:] if torch.is_tensor(output) else output


@pytest.fixture(scope="module", params=["t2i", "c2i"])
def golden(request, tmp_path_factory):
    return Golden(request.param, tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def text_golden(tmp_path_factory):
    return Golden("t2i", tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def class_golden(tmp_path_factory):
    return Golden("c2i", tmp_path_factory.mktemp("official"))


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("half", ["cond", "uncond"])
@torch.no_grad()
def test_text_encoder_and_projector_match(text_golden, half):
    prompts = text_golden.meta["prompts"] if half == "cond" else [""] * 2
    states, mask = text_golden.pipe.encode_prompt(prompts)

    # the official code pads to a fixed length, the pipeline to the longest prompt
    length = mask.shape[1]
    recorded_mask = text_golden.expected[f"text_attention_mask_{half}"]
    assert mask.equal(recorded_mask[:, :length]) and not recorded_mask[:, length:].any()
    is_text = mask.bool()
    recorded = text_golden.expected[f"t5_last_hidden_{half}"][:, :length]
    close(states[is_text], recorded[is_text], 2e-5)
    projected = text_golden.expected[f"text_embeddings_{half}"]
    close(text_golden.model.project_text(states)[is_text], projected[:, :length][is_text], 2e-5)
    close(text_golden.model.project_text(text_golden.expected[f"t5_last_hidden_{half}"]), projected, 2e-5)
    ids = text_golden.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.equal(text_golden.expected[f"text_input_ids_{half}"])
    bias = torch.where(recorded_mask.bool(), 0.0, float("-inf"))
    assert bias.equal(text_golden.expected[f"text_bias_row0_{half}"])


@pytest.mark.parametrize("half", ["cond", "uncond"])
@torch.no_grad()
def test_every_stage_matches(golden, half):
    stages = {}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: stages.update({name: output}))
        for name, module in [(f"block{i}", block) for i, block in enumerate(golden.model.blocks)]
        + [("trunk_out", golden.model.norm)]
    ]
    condition = golden.condition(half)
    positions = torch.arange(golden.input_ids.shape[1])
    embeddings = golden.model.embed(
        golden.model.token_embedding(golden.input_ids), positions[None], condition.get("class_labels")
    )

    logits = golden.model(golden.input_ids, **condition).logits
    for hook in hooks:
        hook.remove()

    close(embeddings, golden.expected[f"input_embeddings_{half}"], 2e-5)
    for name, output in stages.items():
        states = output[0] if isinstance(output, tuple) else output  # a block returns its attention weights too
        close(states, golden.expected[f"{name}_{half}"], 1e-4)
    close(logits, golden.expected[f"logits_{half}"], 1e-4)


class Force:
    """A logits processor that allows only the recorded tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        """Mask all but one token per row."""
        chosen = self.tokens[:, input_ids.shape[1] - 1 : input_ids.shape[1]]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("kind", ["nocfg", "cfg", "cfg_intended"])
def test_logits_of_forced_tokens_match_at_every_step(golden, kind, options):
    if kind == "cfg_intended" and golden.name == "t2i":
        kind = "cfg"  # the same where there are no classes
    if kind == "cfg":
        options = {**options, **golden.released}
    if kind == "nocfg":
        golden_scale, golden.guidance_scale = golden.guidance_scale, 1.0
    forced = {"logits_processor": [Force(golden.tokens)], "output_logits": True, "return_dict_in_generate": True}
    output = golden.guided(**options, **forced)
    if kind == "nocfg":
        golden.guidance_scale = golden_scale
    assert output.sequences[:, 1:].equal(golden.tokens)
    close(torch.stack(output.logits, dim=1), golden.expected[f"step_logits_{kind}"], 1e-4)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_ids_match_exactly(golden, options):
    assert golden.guided(**options, **golden.released).equal(golden.expected["greedy_cfg"])
    unguided = golden.model.generate(**golden.condition("cond"), **options)[:, 1:]
    assert unguided.equal(golden.expected["greedy_nocfg"])
    if golden.name == "c2i":
        assert golden.guided(**options).equal(golden.expected["greedy_cfg_intended"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sampled_ids_match_exactly(golden):
    ids = golden.guided(do_sample=True, generator=seeded(), **golden.released)
    assert ids.equal(golden.expected["sampled_t1_seed0"])


def test_filtered_sampled_ids_match_exactly(golden):
    filters = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}
    ids = golden.guided(do_sample=True, generator=seeded(), **filters, **golden.released)
    assert ids.equal(golden.expected["sampled_t08_k20_p09_seed0"])


def test_a_prefix_is_continued_exactly(golden):
    inputs = golden.model.prepend_bos(golden.tokens[:, :5])
    assert golden.guided(inputs=inputs, **golden.released).equal(golden.expected["greedy_cfg_prefix"])


def branch(golden, scores, log_probs, sequences, chosen):
    """Tokens and log-probabilities of sequences whose last token is replaced by each of `chosen` (B, n)."""
    last = scores.log_softmax(dim=-1).gather(1, chosen)  # (B, n)
    total = (log_probs[:, :-1].sum(dim=1, keepdim=True) + last).flatten()[:, None]
    kept = sequences[:, None, 1:-1].expand(-1, chosen.shape[1], -1)
    return torch.cat([kept, chosen[..., None]], dim=-1).flatten(0, 1), total


def test_branches_on_the_most_likely_last_tokens_match(golden):
    output = golden.guided(max_new_tokens=6, return_log_probs=True, output_scores=True, **golden.released)
    chosen = output.scores[-1].topk(4).indices
    tokens, log_probs = branch(golden, output.scores[-1], output.log_probs, output.sequences, chosen)
    assert tokens.equal(golden.expected["greedy_branch4_n6"])
    close(log_probs, golden.expected["greedy_branch4_n6_logp"], 1e-4)


def test_branches_on_sampled_last_tokens_match(golden):
    """The official code draws the last token of a call several times, without replacement."""
    options = {"do_sample": True, **golden.released}
    generator = seeded(3)
    golden.guided(max_new_tokens=7, generator=generator, **options)  # leaves the generator right before the last draw
    wanted = {"return_log_probs": True, "output_scores": True}
    output = golden.guided(max_new_tokens=8, generator=seeded(3), **wanted, **options)
    probabilities = output.scores[-1].softmax(dim=-1)
    chosen = torch.multinomial(probabilities, 5, replacement=False, generator=generator)
    tokens, log_probs = branch(golden, output.scores[-1], output.log_probs, output.sequences, chosen)
    assert tokens.equal(golden.expected["sampled_branch5_n8_seed3"])
    close(log_probs, golden.expected["sampled_branch5_n8_seed3_logp"], 1e-4)


def test_the_pipeline_uses_the_options_and_guidance_of_its_prior(class_golden, monkeypatch):
    """The option reaches the prior, and the guidance scale comes from the checkpoint."""
    pipe, labels = class_golden.pipe, class_golden.meta["labels"]
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "latent", "temperature": 1e-4}
    intended = pipe(class_labels=labels, generator=seeded(), **options).token_ids
    monkeypatch.setattr(pipe.prior.generation_config, "class_zero_guidance", True, raising=False)
    released = pipe(class_labels=labels, generator=seeded(), **options).token_ids
    assert intended.equal(class_golden.expected["greedy_cfg_intended"])
    assert released.equal(class_golden.expected["greedy_cfg"])


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 0.0), (0.7, 0, 0.0), (1.0, 10, 0.0), (1.0, 0, 0.8), (1.3, 25, 0.6), (1.0, 0, 0.0001), (1.0, 1, 0.0),
])  # fmt: skip
def test_filtered_probabilities_match(golden, temperature, top_k, top_p):
    model, logits = golden.model, golden.expected["filter_in"][:, 0]
    options, _ = model.resolve_generation_options(
        None, {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    )
    processor = model._get_logits_processor(options, input_ids_seq_length=1, logits_processor=[], model_kwargs={})

    probs = processor(model.prepend_bos(golden.tokens), logits).softmax(dim=-1)

    close(probs, golden.expected[f"filter_t{temperature}_k{top_k}_p{top_p}"], 1e-6)
