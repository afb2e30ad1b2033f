"""`flextok info`: the models known by name are complete, with calls that work; what is fastest on this machine."""

import json
import re
import shlex

import pytest
from paths import ROOT

from flextok_hf import FlexTokPipeline, cli, embedded_model, list_models
from flextok_hf.utils import tuning


PAGE = (ROOT / "docs" / "migration.md").read_text()


def test_every_model_has_a_name_a_size_a_license_and_a_call():
    models = list_models()
    assert len({model["name"] for model in models}) == len(models) == 11
    assert all(set(model) == {"name", "parameters", "license", "call"} and all(model.values()) for model in models)


def test_the_official_models_are_those_of_the_migration_page():
    table = PAGE[PAGE.index("## Released models") : PAGE.index("Verified,")]
    documented = set(re.findall(r"`((?:flextok_d|FlexAR|GridAR)[\w-]+)`", table))
    assert {model["name"].removeprefix("EPFL-VILAB/") for model in list_models()[1:]} == documented


@pytest.mark.parametrize("name", [model["name"] for model in list_models()[1:]])
def test_the_names_of_official_models_lead_to_the_call_that_reads_their_format(name):
    with pytest.raises(ValueError, match="official format.*from_original"):
        FlexTokPipeline.from_pretrained(name)


def test_the_size_and_the_call_of_the_embedded_model_hold():
    entry = list_models()[0]
    pipe = eval(entry["call"], {"FlexTokPipeline": FlexTokPipeline, "embedded_model": embedded_model})
    parts = [pipe.vae, pipe.encoder, pipe.decoder, pipe.prior, pipe.text_encoder]
    total = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert entry["parameters"] == f"{total / 1e6:.1f} M"


@pytest.mark.parametrize("model", [model for model in list_models() if model["call"].startswith("flextok ")])
def test_commands_in_the_list_parse(model):
    assert cli.build_parser().parse_args(shlex.split(model["call"])[1:]).prior == model["name"]


def test_the_command_lists_the_same_models(capsys):
    assert cli.main(["info", "--models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list_models()
    assert cli.main(["info", "--models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *(model["name"] for model in list_models())]


def test_listing_models_and_describing_one_exclude_each_other(capsys):
    assert cli.main(["info", "--models", "--model", "a/b"]) == 2
    assert "`--models`" in capsys.readouterr().err


def test_info_lists_the_fastest_ways_on_this_machine(take, capsys):
    cli.main(["info", "--machine"])
    assert "nothing timed yet" in capsys.readouterr().out
    tuning.loop_times("product, of a test", 2, 1000, lambda: {"library": 2.0, "packed": 1.0, "packing": 0.1})
    cli.main(["info", "--machine", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts == {"machine": tuning.machine(), "tuning": "on", "fastest": {"product, of a test": "packed"}}
