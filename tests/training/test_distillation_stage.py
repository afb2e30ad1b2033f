"""Distillation as a stage: what it saves, resume, several processes, official checkpoints."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from official_checkpoints import write_tokenizer
from safetensors.torch import load_file
from tiny_models import make_class_pipeline
from training_processes import assert_same_state, die_after, errors, run

from flextok_hf.conversion.convert import convert_checkpoint
from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline
from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.training.checkpoints import list_checkpoints
from flextok_hf.training.distillation_arguments import DistillationArguments
from flextok_hf.training.distillation_stage import train_distillation
from flextok_hf.training.stages import train_tokenizer
from flextok_hf.training.starting_points import load_tokenizer


pytestmark = pytest.mark.slow


def arguments_for(folder, teacher, **changes):
    schedule = {"max_train_steps": 4, "lr_warmup_steps": 1, "ema_decay": 0.9, "checkpointing_steps": 2}
    schedule |= {"logging_steps": 1, "validation_steps": 0, "max_train_samples": 24, "train_batch_size": 4}
    return DistillationArguments(output_dir=str(folder), pretrained_tokenizer=str(teacher), **{**schedule, **changes})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a tiny pipeline with a prior for classes."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    make_class_pipeline().save_pretrained(folder)
    return folder


def losses(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    return torch.tensor([[entry["loss"], entry["mean_velocity_error"]] for entry in entries])


def test_the_saved_pipeline_is_the_teachers_with_another_decoder(teacher, tmp_path):
    options = {"validation_steps": 4, "num_validation_images": 2, "min_guidance_scale": 1.0, "max_guidance_scale": 8.0}
    folder = train_distillation(arguments_for(tmp_path / "run", teacher, **options))
    source, pipe = FlexTokPipeline.from_pretrained(teacher), FlexTokPipeline.from_pretrained(folder)
    config = pipe.decoder.config
    assert pipe.decoder.predicts_mean and list(config.guidance_range) == [1.0, 8.0] and config.interval_blocks == 1
    for name in ("encoder", "prior"):
        old, new = getattr(source, name).state_dict(), getattr(pipe, name).state_dict()
        assert old.keys() == new.keys() and all(new[key].equal(tensor) for key, tensor in old.items())
    old, new = source.decoder.state_dict(), pipe.decoder.state_dict()
    changed = {key for key, tensor in old.items() if not new[key].equal(tensor)}
    assert "velocity_proj.weight" in changed
    pipe.set_progress_bar_config(disable=True)
    assert pipe.choose_steps(None, [1]) == 4
    assert len(pipe(class_labels=[0, 2], max_tokens=2).images) == 2
    card = (folder / "README.md").read_text()
    assert "Stage `distillation`" in card and "4 steps" in card and "from 1 to 8" in card
    assert (tmp_path / "run" / "validation-4.png").is_file()


def test_a_converted_official_checkpoint_is_distilled(tmp_path):
    checkpoint, _, _ = write_tokenizer(tmp_path / "official")
    convert_checkpoint(tmp_path / "teacher", checkpoint, is_quiet=True)
    options = {"cache_latents": True, "max_train_steps": 2, "export_dtype": "bfloat16"}
    pipe = FlexTokPipeline.from_pretrained(
        train_distillation(arguments_for(tmp_path / "run", tmp_path / "teacher", **options))
    )
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(3, pipe.resolution, pipe.resolution, generator=torch.Generator().manual_seed(0))
    teacher = FlexTokPipeline.from_pretrained(tmp_path / "teacher")
    assert pipe.decoder.predicts_mean and list(pipe.decoder.config.guidance_range) == [7.5, 7.5]
    assert pipe.decoder.config.max_timestep == teacher.decoder.config.max_timestep
    assert pipe.detokenize(teacher.tokenize(image), output_type="pt").images.isfinite().all()


def test_training_on_starts_from_the_flow_decoder_saved_beside_a_distilled_one(teacher, tmp_path):
    folder = train_distillation(arguments_for(tmp_path / "run", teacher, max_train_steps=1))
    own = FlexTokFlowDecoder.from_pretrained(teacher, subfolder="decoder").state_dict()
    beside = FlexTokFlowDecoder.from_pretrained(folder, subfolder="flow_decoder").state_dict()
    assert all(weight.equal(beside[name]) for name, weight in own.items())
    options = {"output_dir": str(tmp_path / "on"), "pretrained_tokenizer": str(folder), "freeze_encoder": True}
    pipe, _ = load_tokenizer(TokenizerArguments(**options), None)
    assert not pipe.decoder.predicts_mean
    assert all(weight.equal(own[name]) for name, weight in pipe.decoder.state_dict().items())


def test_an_adapter_learns_to_take_few_steps_and_becomes_part_of_the_weights(teacher, tmp_path):
    options = {"lora_rank": 2, "lora_targets": ["decoder.to_q"], "learning_rate": 0.01}
    folder = train_distillation(arguments_for(tmp_path / "run", teacher, **options))
    before = FlexTokFlowDecoder.from_pretrained(teacher, subfolder="decoder").state_dict()
    after = FlexTokFlowDecoder.from_pretrained(folder, subfolder="decoder").state_dict()
    assert after.keys() - before.keys() == {"guidance_proj.weight"} and after["guidance_proj.weight"].any()
    changed = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert changed == {name for name in before if name.endswith("to_q.weight")}
    ranks = [torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3).item() for name in changed]
    assert max(ranks) == 2
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert all("lora" in name or "guidance_proj" in name for name in saved)


def test_a_distilled_tokenizer_without_its_flow_decoder_is_trained_neither_on_nor_again(teacher, tmp_path):
    folder = train_distillation(arguments_for(tmp_path / "run", teacher, max_train_steps=1))
    shutil.rmtree(folder / "flow_decoder")
    with pytest.raises(ValueError, match="`pretrained_tokenizer` .* is distilled"):
        train_distillation(arguments_for(tmp_path / "again", folder))
    options = {"output_dir": str(tmp_path / "on"), "pretrained_tokenizer": str(folder), "freeze_encoder": True}
    with pytest.raises(ValueError, match="`pretrained_tokenizer` .* is distilled"):
        train_tokenizer(TokenizerArguments(**options))


def test_a_killed_distillation_of_two_processes_resumes_to_bitwise_the_same_result(teacher, tmp_path):
    whole = arguments_for(tmp_path / "whole", teacher, gradient_accumulation_steps=2)
    killed = replace(whole, output_dir=str(tmp_path / "killed"))
    assert run(lambda: train_distillation(whole), tmp_path / "whole", 2) == [0, 0], errors(tmp_path / "whole")
    run(lambda: die_after(2, train_distillation, killed), tmp_path / "killed", 2)
    assert [path.name for path in list_checkpoints(tmp_path / "killed")] == ["checkpoint-2"]
    resumed = replace(killed, resume_from_checkpoint="latest")
    assert run(lambda: train_distillation(resumed), tmp_path / "killed", 2) == [0, 0], errors(tmp_path / "killed")
    assert_same_state(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    assert losses(tmp_path / "whole").equal(losses(tmp_path / "killed"))


def test_two_processes_have_the_loss_curve_of_one(teacher, tmp_path):
    one = arguments_for(tmp_path / "one", teacher, train_batch_size=6)
    two = replace(one, output_dir=str(tmp_path / "two"), train_batch_size=3)
    assert run(lambda: train_distillation(one), tmp_path / "one") == [0], errors(tmp_path / "one")
    assert run(lambda: train_distillation(two), tmp_path / "two", num_processes=2) == [0, 0], errors(tmp_path / "two")
    torch.testing.assert_close(losses(tmp_path / "two")[:, 0], losses(tmp_path / "one")[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"min_guidance_scale": 1.0, "max_guidance_scale": 2.0}, "`max_guidance_scale`"),
        ({"resolution": 32}, "`resolution`"),
        ({"pretrained_tokenizer": "nowhere"}, "`pretrained_tokenizer`"),
        ({"interval_blocks": 3}, "`interval_blocks`"),
        ({"buckets": True, "train_data": ["somewhere"]}, "`buckets`"),
    ],
)
def test_options_that_do_not_fit_the_teacher_are_refused(teacher, tmp_path, changes, name):
    with pytest.raises(ValueError, match=name):
        train_distillation(replace(arguments_for(tmp_path / "run", teacher), **changes))
