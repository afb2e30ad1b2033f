"""Damage to saved models, ours and in the official formats: what a broken download or a hostile author may leave."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from outcomes import judge
from safetensors.torch import load_file, save_file

from flextok_hf import FlexTokPipeline


# Values to put in the place of a setting.
SETTINGS: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**30, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", "x", "a" * 10_000,
    "\ud800", "../../etc/passwd", "/dev/zero", [], [None], [1, 2], [[]], {}, {"a": 1}, {"_target_": "os.system"},
]  # fmt: skip
JUNK = [
    b"", b"\0", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe\x00", b"\x80\x04\x95", b"[" * 100_000,
    b'{"a":' * 50_000, b"!!python/object:os.system {}", b"# only a comment\n", b"\xef\xbb\xbf{}", b"NaN",
]  # fmt: skip


def change_setting(path: Path, draw: random.Random) -> str:
    """Replace, remove or add one setting of a JSON or YAML file, at any depth."""
    is_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
    groups = [content]
    for group in groups:  # grows while it is read
        children = group.values() if isinstance(group, dict) else group
        groups += [child for child in children if isinstance(child, dict | list) and child]
    group = draw.choice([group for group in groups if group])
    key = draw.choice(sorted(group, key=str)) if isinstance(group, dict) else draw.randrange(len(group))
    kind = draw.choice(["replace", "replace", "replace", "remove", "add"])
    value = draw.choice(SETTINGS)
    if kind == "remove":
        del group[key]
    elif kind == "add" and isinstance(group, dict):
        group["unknown"] = value
    else:
        group[key] = value
    path.write_text(json.dumps(content) if is_json else yaml.safe_dump(content))
    return f"{path.name}: {kind} {key!r}, {str(value)[:20]!r}"


def change_bytes(path: Path, draw: random.Random) -> str:
    """Truncate, overwrite, extend or replace a file."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(["truncate", "flip", "start", "extend", "junk"])
    if kind == "truncate":
        content = content[: draw.randrange(len(content))]
    elif kind == "flip":
        for _ in range(draw.choice([1, 4, 64])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "start":  # where a safetensors file has its header
        for _ in range(4):
            content[draw.randrange(min(64, len(content)))] = draw.randrange(256)
    elif kind == "extend":
        content += draw.randbytes(draw.choice([1, 100, 10_000]))
    else:
        content = bytearray(draw.choice(JUNK))
    path.write_bytes(content)
    return f"{path.name}: {kind}"


def change_tensors(path: Path, draw: random.Random) -> str:
    """Drop, rename, reshape, cast, add or fill a tensor of a safetensors file."""
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = draw.choice(["drop", "rename", "reshape", "transpose", "cast", "add", "fill", "shrink"])
    if kind == "rename":
        tensors[f"{name}x"] = tensor
    elif kind == "reshape":
        tensors[name] = tensor.reshape(-1, 1)
    elif kind == "transpose":
        tensors[name] = tensor.t().contiguous() if tensor.ndim == 2 else tensor[None]
    elif kind == "cast":
        tensors[name] = tensor.to(draw.choice([torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16]))
    elif kind == "add":
        tensors |= {name: tensor, "unknown.weight": torch.zeros(3)}
    elif kind == "fill":
        tensors[name] = torch.full_like(tensor, draw.choice([float("nan"), float("inf"), -float("inf")]))
    elif kind == "shrink":
        tensors[name] = tensor[:0].clone() if tensor.ndim else tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name}: {kind} {name}"


def change_header(path: Path, draw: random.Random) -> str:
    """Write another header into a safetensors file, whose data stay."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = draw.choice([name for name in header if name != "__metadata__"])
    key = draw.choice(["dtype", "shape", "data_offsets"])
    values = {"dtype": ["F99", 3, None, "BOOL", "F8_E4M3"], "shape": [[-1], [2**40], [], "x", [2**63], [1.5]]}
    header[name][key] = draw.choice(values.get(key, [[0, 2**50], [8, 4], [-1, 4], [], [0], None]))
    text = json.dumps(header).encode()
    size = draw.choice([len(text)] * 3 + [0, 2**62, len(text) + 1])
    path.write_bytes(struct.pack("<Q", size) + text + data)
    return f"{path.name}: header {name}.{key} = {header[name][key]!r}, length {size}"


def change_file(path: Path, draw: random.Random) -> str:
    """Remove a file, or put something in its place that is no regular file, or is far too large."""
    links = ["device", "missing link", "endless link"]
    kind = draw.choice([*links, "remove", "folder", "pipe", "sparse", "pickle", "index"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "missing link":
        path.symlink_to("nowhere")
    elif kind == "endless link":
        path.symlink_to(path.name)
    elif kind == "sparse":
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", 2**33))
            file.truncate(20 * 2**30)
    elif kind == "pickle":
        torch.save({"x": torch.zeros(1)}, path.with_suffix(".bin"))
    elif kind == "index":
        names = {"x": draw.choice(["../x.safetensors", "/etc/passwd", path.name, "", None, 3])}
        path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return f"{path.name}: {kind}"


def damage(folder: Path, draw: random.Random, spare: Path | None = None) -> tuple[Path, str]:
    """Damage one file of a folder, but not `spare`; returns its path and what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md" and path != spare)
    path = draw.choice(files)
    kinds: list[Callable[[Path, random.Random], str]] = [change_bytes, change_file]
    if path.suffix in (".json", ".yaml"):
        kinds += [change_setting] * 6
    if path.suffix == ".safetensors":
        kinds += [change_tensors] * 4 + [change_header] * 2
    return path, f"{path.parent.relative_to(folder)}/{draw.choice(kinds)(path, draw)}"


def judge_folder(original: Path, scratch: Path, load: Callable[[Path], FlexTokPipeline], seed: int) -> tuple[str, str]:
    """Damage a copy of a saved model, load and use it; returns what was done, and what is wrong or an empty string.

    A model that loads must also run, or say why not.
    """
    copy = scratch / f"model{seed}"
    shutil.copytree(original, copy)
    draw = random.Random(seed)
    path, done = damage(copy, draw)
    if draw.random() < 0.2:
        done += f", {damage(copy, draw, spare=path)[1]}"

    def use() -> list:
        pipe = load(copy)
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        side = pipe.resolution
        token_ids = pipe.tokenize(torch.full((3, side, side), 0.5))
        images = pipe.detokenize(token_ids, num_inference_steps=1, output_type="pt").images
        results = [token_ids, images]
        if pipe.prior is not None:
            condition = {"prompt": "a cat"} if pipe.prior.config.text_hidden_size else {"class_labels": 1}
            results.append(pipe.generate_tokens(**condition, max_tokens=2))
        return results

    # an error names the folder, a file in it, or a component
    parts = ["encoder", "decoder", "prior", "VAE", "tokenizer"]
    names = [str(copy), *parts, *{path.name for path in original.rglob("*")}]
    problem = judge(use, names, (ValueError, TypeError, OSError))
    shutil.rmtree(copy)
    return done, problem or ""
