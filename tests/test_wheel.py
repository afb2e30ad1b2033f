"""The package builds, and what is built works without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from paths import ROOT
from PIL import Image


BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")


def run(*words, cwd, **environment):
    result = subprocess.run(
        list(map(str, words)), cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from the source distribution, which is built from a copy of what belongs to the package."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "src", checkout / "src", ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=checkout)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=next((folder / "unpacked").iterdir()))
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*") if path.is_file()]
    expected = {path.as_posix() for path in files if not IGNORED("", path.parts)}
    assert names == expected
    assert {"flextok_command.py", "flextok_hf/py.typed", "flextok_hf/embedded_model/model_index.json"} <= names


@pytest.mark.slow
def test_an_installed_wheel_generates_an_image_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    run(sys.executable, *install, cwd=tmp_path)
    place = {"PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    where = "import flextok_hf; print(flextok_hf.embedded_model())"
    assert Path(run(sys.executable, "-c", where, cwd=tmp_path, **place).strip()).is_relative_to(target)
    words = ("generate", "a cat", "--max-tokens", "2", "--num-inference-steps", "1", "--output", "cat.png")
    run(target / "bin" / "flextok", *words, cwd=tmp_path, **place)
    assert Image.open(tmp_path / "cat.png").size == (128, 128)
