"""Test helper: small official checkpoints to damage, and a check that converting them fails and leaves no files.

The fixtures are available to all tests through `conftest.py`.
"""

import json
import shutil
import struct

import pytest
import yaml
from official_checkpoints import write_prior, write_tokenizer
from paths import FIXTURES
from safetensors import safe_open
from safetensors.torch import save_file

from flextok_hf.conversion.convert import convert_checkpoint


WEIGHTS = "model.safetensors"
REGISTERS = "encoder.module_dict.enc_register_module.registers"
NORM = "models.ar_image_model.trunk.blocks.1.norm_2.weight"
T5_FOLDER = FIXTURES / "prior" / "t2i" / "text_encoder"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, where a command that was run by mistake would leave a file."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(place):
    return write_tokenizer(place / "tokenizer")[0]


@pytest.fixture
def tokenizer_file(place):
    return write_tokenizer(place / "tokenizer", is_single_file=True)[0]


@pytest.fixture
def prior(place):
    return write_prior(place / "prior", classes=5)[0]


@pytest.fixture
def text_prior(place):
    """A text prior with its text encoder beside it."""
    folder, _, _ = write_prior(place / "prior", text_dim=48)
    shutil.copytree(T5_FOLDER, folder / "text_encoder")
    return folder


def refuse(place, message, tokenizer=None, prior=None, **options):
    """Check that conversion fails with this message, which must be short, and leaves no files."""
    sources = [None if one is None else str(one) for one in (tokenizer, prior)]
    before = sorted(place.rglob("*"))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        convert_checkpoint(place / "ours", *sources, **options)
    assert sorted(place.rglob("*")) == before
    assert len(str(caught.value)) < 1200


EVIL = {"_target_": "os.system", "command": "touch evil"}


def edit_json(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_yaml(path, change):
    config = yaml.safe_load(path.read_text())
    change(config["model"]["meta_model"]["models"])
    path.write_text(yaml.safe_dump(config))


def read_weights(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def edit_weights(path, change):
    tensors, metadata = read_weights(path)
    change(tensors)
    save_file(tensors, path, metadata)


def write_header(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
