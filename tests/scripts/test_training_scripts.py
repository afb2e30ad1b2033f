"""The scripts around training: cost estimates, ablations and training curves."""

import importlib.util
import json
import sys

import pytest
import yaml
from paths import SCRIPTS
from training_processes import SMALL_DATA, SMALL_TOKENIZER

from flextok_hf.training.arguments import TokenizerArguments
from flextok_hf.utils.option_parsing import parse_arguments


def load_script(name):
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look up their module
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    options = {"output_dir": str(tmp_path / "runs"), "train_data": ["synthetic"], "validation_steps": 0}
    options |= {**SMALL_DATA, **SMALL_TOKENIZER, "max_train_steps": 4, "logging_steps": 2, "lr_warmup_steps": 1}
    path = tmp_path / "tokenizer.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def test_the_estimate_matches_the_model(config, capsys, monkeypatch):
    script = load_script("estimate_cost")
    monkeypatch.setattr(sys, "argv", ["estimate_cost", "tokenizer", str(config), "--num_processes", "3"])
    script.main()
    header, _, row = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert len(header) == len(row) == len(script.HEADER)
    arguments = parse_arguments(TokenizerArguments, ["--config", str(config)])
    work = script.tokenizer_work(arguments, script.torch.float32)
    assert float(row[1]) == pytest.approx(script.count_weights(work) / 1e6, abs=0.06)
    assert script.estimate("tokenizer", config, 3)[3] == "0.0"  # 48 images
    # extrapolating from one and two blocks is right for three
    three = script.replace(arguments, encoder_num_layers=3, decoder_num_layers=3)
    measured = script.activation_bytes(script.tokenizer_work(three, script.torch.bfloat16))
    assert script.estimate_activations("tokenizer", three) == pytest.approx(measured, rel=0.02)


def test_ablations_change_one_thing_and_resume_where_they_stopped(config, tmp_path, monkeypatch, capsys):
    script = load_script("ablate_tokenizer")
    monkeypatch.setattr(script, "NUM_IMAGES", 4)
    names = ["baseline", "joint_lengths", script.SAME_WORK, "dropped_tokens_removed"]
    command = ["ablate", "--config", str(config), "--seeds", "0", "1", "--output", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", [*command, "--variants", *names])
    script.main()
    record = json.loads((tmp_path / "results" / "figures.json").read_text())
    assert record["seeds"] == [0, 1] and list(record["results"]) == names
    assert all(len(runs) == 2 and runs[0] != runs[1] for runs in record["results"].values())
    options = json.loads((tmp_path / "runs" / f"{script.SAME_WORK}-0" / "arguments.json").read_text())
    assert options["joint_lengths"] and options["max_train_steps"] in (2, 3)  # of 4: the decoder runs twice
    table = (tmp_path / "results" / "table.md").read_text()
    assert all(f"| {name} | " in table for name in names) and "psnr_4" in table

    monkeypatch.setattr(script, "train_tokenizer", lambda *_: pytest.fail("a finished run was repeated"))
    script.main()
    assert json.loads((tmp_path / "results" / "figures.json").read_text())["results"] == record["results"]

    options = yaml.safe_load(config.read_text())
    for name, value in {"max_train_steps": 6, "seed": 0, "fsq_levels": [5, 5]}.items():
        config.write_text(yaml.safe_dump(options | {name: value, "learning_rate": 0.002}))
        with pytest.raises(ValueError, match="baseline-0 holds a run with other .*learning_rate"):
            script.main()


def test_validation_data_alone_is_refused_and_not_ignored(config, tmp_path, monkeypatch, capsys):
    script = load_script("ablate_tokenizer")
    command = ["ablate", "--config", str(config), "--output", str(tmp_path), "--validation_data", "held_out"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "--train_data" in capsys.readouterr().err


def test_curves_are_plotted_of_what_the_logs_have(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    script = load_script("plot_training")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 3)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
    command = ["plot", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(tmp_path / "curves.png")]
    monkeypatch.setattr(sys, "argv", [*command, "--figures", "loss"])
    script.main()
    assert (tmp_path / "curves.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", [*command, "--figures", "speed"])
    with pytest.raises(SystemExit, match="No log has speed. Available: loss"):
        script.main()
