"""What importing the package does and does not do, each in a fresh interpreter."""

import subprocess
import sys

import pytest


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_classes_know_the_models_once_the_package_is_imported():
    program = """
import flextok_hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
encoder = AutoConfig.for_model("flextok_encoder")
prior = AutoConfig.for_model("flextok_prior")
print(AutoModel._model_mapping[type(encoder)].__name__, AutoModelForCausalLM._model_mapping[type(prior)].__name__)
"""
    assert run_python(program) == "FlexTokEncoder FlexTokPriorForCausalLM"


def test_the_command_starts_without_loading_pytorch():
    program = """
import sys
sys.argv = ["bin/flextok", "--help"]
from flextok_hf import cli
cli.build_parser().format_help()
print([name for name in ("torch", "transformers", "diffusers", "PIL") if name in sys.modules])
"""
    assert run_python(program) == "[]"


def test_auto_classes_know_the_models_in_a_program_called_flextok_once_it_uses_one():
    program = """
import sys
sys.argv = ["flextok.py"]
from flextok_hf import FlexTokPriorForCausalLM
from transformers import AutoModelForCausalLM
print(FlexTokPriorForCausalLM in AutoModelForCausalLM._model_mapping.values())
"""
    assert run_python(program) == "True"


def test_every_public_name_can_be_imported():
    import flextok_hf

    assert all(getattr(flextok_hf, name) is not None for name in flextok_hf.__all__)


def test_an_unknown_name_is_an_attribute_error():
    import flextok_hf

    with pytest.raises(AttributeError, match="no attribute 'FlexTok'"):
        flextok_hf.FlexTok
