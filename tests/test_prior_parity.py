"""The prior computes what the official one does, on tiny random checkpoints in the official layout."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5EncoderModel

from flextok_hf.configuration_prior import FlexTokPriorConfig
from flextok_hf.modeling_prior import FlexTokPriorForCausalLM


FIXTURES = Path(__file__).parent / "fixtures" / "prior"
GUIDANCE_SCALE = {"t2i": 3.0, "c2i": 1.5}


def read_config(folder):
    """Translate an official `config.yaml`, read as data, to our configuration."""
    models = yaml.safe_load((folder / "config.yaml").read_text())["model"]["meta_model"]["models"]
    image_model = models["ar_image_model"]
    preprocessor, trunk = image_model["preprocessor"], image_model["trunk"]
    attention = trunk.get("self_attn_target") or trunk["attn_target"]
    width, multiple_of = trunk["embed_dim"], trunk["ffn_target"].get("multiple_of", 256)
    intermediate_size = multiple_of * -(-int(2 * trunk["mlp_ratio"] * width / 3) // multiple_of)
    return FlexTokPriorConfig(
        codebook_size=preprocessor["codebook_size"],
        hidden_size=width,
        num_hidden_layers=trunk["num_blocks"],
        num_attention_heads=attention["num_heads"],
        intermediate_size=intermediate_size,
        max_position_embeddings=preprocessor["token_grid_size"][0],
        rms_norm_eps=trunk["norm_layer"]["eps"],
        qk_norm="qk_norm" in attention,
        text_hidden_size=models["text_encoder"]["mlp"]["text_dim"] if "text_encoder" in models else None,
        num_classes=preprocessor.get("num_classes"),
    )


def map_state_dict(official, config):
    """Rename and join official tensors to ours; every official tensor must be used."""
    left = dict(official)

    def take(name):
        return left.pop(f"models.{name}")

    image_model = "ar_image_model"
    start = take(f"{image_model}.preprocessor.sos_token_embed").reshape(1, -1)
    ours = {
        "token_embedding.weight": torch.cat([take(f"{image_model}.preprocessor.embedding.weight"), start]),
        "position_embedding.weight": take(f"{image_model}.preprocessor.positional_embedding"),
        "norm.weight": take(f"{image_model}.trunk.post_trunk_norm.weight"),
        "head.weight": take(f"{image_model}.head.linear.weight"),
    }
    has_text = config.text_hidden_size is not None
    if has_text:
        for layer in ("fc1", "fc2"):
            ours[f"text_projector.{layer}.weight"] = take(f"text_encoder.mlp.{layer}.weight")
    if config.num_classes is not None:
        ours["class_embedding.weight"] = take(f"{image_model}.preprocessor.cls_embedding.weight")
    norms = ["self_attention_norm", *["cross_attention_norm"] * has_text, "mlp_norm"]
    for index in range(config.num_hidden_layers):
        theirs, block = f"{image_model}.trunk.blocks.{index}", f"blocks.{index}"
        attention = f"{theirs}.self_attn" if has_text else f"{theirs}.attn"
        if f"models.{attention}.qkv.weight" in left:
            ours[f"{block}.self_attention.qkv_proj.weight"] = take(f"{attention}.qkv.weight")
        else:
            parts = [take(f"{attention}.{name}_proj.weight") for name in "qkv"]
            ours[f"{block}.self_attention.qkv_proj.weight"] = torch.cat(parts)
        ours[f"{block}.self_attention.out_proj.weight"] = take(f"{attention}.proj.weight")
        if config.qk_norm:
            ours[f"{block}.self_attention.query_norm.weight"] = take(f"{attention}.q_norm.weight")
            ours[f"{block}.self_attention.key_norm.weight"] = take(f"{attention}.k_norm.weight")
        if has_text:
            ours[f"{block}.cross_attention.query_proj.weight"] = take(f"{theirs}.cross_attn.Wq.weight")
            key_value = [take(f"{theirs}.cross_attn.{name}.weight") for name in ("Wk", "Wv")]
            ours[f"{block}.cross_attention.key_value_proj.weight"] = torch.cat(key_value)
            ours[f"{block}.cross_attention.out_proj.weight"] = take(f"{theirs}.cross_attn.proj.weight")
        gate_up = [take(f"{theirs}.mlp.{name}.weight") for name in ("fc1", "fc3")]
        ours[f"{block}.mlp.gate_up_proj.weight"] = torch.cat(gate_up)
        ours[f"{block}.mlp.down_proj.weight"] = take(f"{theirs}.mlp.fc2.weight")
        for number, name in enumerate(norms, start=1):
            ours[f"{block}.{name}.weight"] = take(f"{theirs}.norm_{number}.weight")
    assert not left, f"unused official tensors: {sorted(left)}"
    return ours


class Golden:
    """One recorded checkpoint: our model with its weights, the expected tensors, and the conditions of both halves."""

    def __init__(self, name):
        folder = FIXTURES / name
        self.name, self.folder = name, folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.expected = load_file(folder / "expected.safetensors")
        config = read_config(folder)
        self.model = FlexTokPriorForCausalLM(config).eval()
        self.model.load_state_dict(map_state_dict(load_file(folder / "model.safetensors"), config), strict=True)
        self.tokens = self.expected["tokens"]
        self.input_ids = self.model.prepend_bos(self.tokens[:, :-1])
        self.guidance_scale = GUIDANCE_SCALE[name]
        self.intended = "_intended" if name == "c2i" else ""

    def condition(self, half):
        if self.name == "c2i":
            labels = torch.tensor(self.meta["labels"])
            return {"class_labels": labels if half == "cond" else torch.full_like(labels, -1)}
        return {
            "encoder_hidden_states": self.expected[f"t5_last_hidden_{half}"],
            "encoder_attention_mask": self.expected[f"text_attention_mask_{half}"],
        }

    def guided(self, **options):
        """Write tokens under the recorded guidance; returns them without the start."""
        if self.name == "t2i":
            negative = self.condition("uncond")
            options["negative_encoder_hidden_states"] = negative["encoder_hidden_states"]
            options["negative_encoder_attention_mask"] = negative["encoder_attention_mask"]
        sequences = self.model.generate(**self.condition("cond"), guidance_scale=self.guidance_scale, **options)
        return sequences[:, 1:] if torch.is_tensor(sequences) else sequences


@pytest.fixture(scope="module", params=["t2i", "c2i"])
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def text_golden():
    return Golden("t2i")


def close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("half", ["cond", "uncond"])
@torch.no_grad()
def test_text_encoder_and_projector_match(text_golden, half):
    folder = text_golden.folder / "text_encoder"
    prompts = text_golden.meta["prompts"] if half == "cond" else [""] * 2
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), T5EncoderModel.from_pretrained(folder).eval()
    batch = tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")

    states = encoder(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state

    assert batch.input_ids.equal(text_golden.expected[f"text_input_ids_{half}"])
    close(states, text_golden.expected[f"t5_last_hidden_{half}"], 2e-5)
    close(text_golden.model.project_text(states), text_golden.expected[f"text_embeddings_{half}"], 2e-5)


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
    embeddings = golden.model.embed(golden.input_ids, positions, condition.get("class_labels"))

    logits = golden.model(golden.input_ids, **condition).logits
    for hook in hooks:
        hook.remove()

    close(embeddings, golden.expected[f"input_embeddings_{half}"], 2e-5)
    for name, output in stages.items():
        close(output, golden.expected[f"{name}_{half}"], 1e-4)
    close(logits, golden.expected[f"logits_{half}"], 1e-4)


@torch.no_grad()
def test_guided_logits_match_at_every_step(golden):
    conditional = golden.model(golden.input_ids, **golden.condition("cond")).logits
    unconditional = golden.model(golden.input_ids, **golden.condition("uncond")).logits

    guided = unconditional + golden.guidance_scale * (conditional - unconditional)

    close(conditional, golden.expected["step_logits_nocfg"], 1e-4)
    close(guided, golden.expected[f"step_logits_cfg{golden.intended}"], 1e-4)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_greedy_ids_match_exactly(golden, options):
    assert golden.guided(**options).equal(golden.expected[f"greedy_cfg{golden.intended}"])
    unguided = golden.model.generate(**golden.condition("cond"), **options)[:, 1:]
    assert unguided.equal(golden.expected["greedy_nocfg"])


def test_sampled_ids_match_exactly(text_golden):
    generator = torch.Generator().manual_seed(0)
    ids = text_golden.guided(do_sample=True, generator=generator)
    assert ids.equal(text_golden.expected["sampled_t1_seed0"])


def test_filtered_sampled_ids_match_exactly(text_golden):
    generator = torch.Generator().manual_seed(0)
    ids = text_golden.guided(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, generator=generator)
    assert ids.equal(text_golden.expected["sampled_t08_k20_p09_seed0"])


def test_a_prefix_is_continued_exactly(text_golden):
    inputs = text_golden.model.prepend_bos(text_golden.tokens[:, :5])
    assert text_golden.guided(inputs=inputs).equal(text_golden.expected["greedy_cfg_prefix"])


def test_log_probabilities_of_the_best_continuation_match(text_golden):
    output = text_golden.guided(max_new_tokens=6, return_log_probs=True)

    best = text_golden.expected["greedy_branch4_n6"][::4]  # rows are grouped by prompt, the best first
    assert output.sequences[:, 1:].equal(best)
    close(output.log_probs.sum(dim=1, keepdim=True), text_golden.expected["greedy_branch4_n6_logp"][::4], 1e-4)


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 0.0), (0.7, 0, 0.0), (1.0, 10, 0.0), (1.0, 0, 0.8), (1.3, 25, 0.6), (1.0, 0, 0.0001), (1.0, 1, 0.0),
])  # fmt: skip
def test_filters_leave_the_official_probabilities(text_golden, temperature, top_k, top_p):
    model, logits = text_golden.model, text_golden.expected["filter_in"][:, 0]
    options, _ = model.resolve_generation_options(
        None, {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    )
    processor = model._get_logits_processor(options, input_ids_seq_length=1, logits_processor=[], model_kwargs={})

    probs = processor(model.prepend_bos(text_golden.tokens), logits).softmax(dim=-1)

    close(probs, text_golden.expected[f"filter_t{temperature}_k{top_k}_p{top_p}"], 1e-6)
