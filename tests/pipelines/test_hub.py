"""Loading by name from a Hub and its cache, pushing, and loading folders with damaged weights."""

import base64
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from official_checkpoints import write_prior, write_tokenizer
from paths import FIXTURES, PHOTO, ROOT
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file
from tiny_models import make_decoder
from transformers import T5Config, T5EncoderModel

from flextok_hf.models.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.pipelines.pipeline_flextok import FlexTokPipeline


T5_FOLDER = FIXTURES / "prior" / "t2i" / "text_encoder"

# Runs in a fresh process, first online and then offline; prints one line of results
LOADS = """
import json, logging
import torch
from flextok_hf import FlexTokPipeline

def run(pipe, **condition):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipe(**condition, num_inference_steps=1, generator=generator, output_type="latent")
    return output.token_ids.tolist(), round(output.images.double().sum().item(), 3), str(pipe.decoder.dtype)

plain = FlexTokPipeline.from_pretrained("user/tiny")
older = FlexTokPipeline.from_pretrained("user/tiny", revision="older")
half = FlexTokPipeline.from_pretrained("user/tiny", variant="fp16", dtype=torch.float16)
results = [run(pipe, prompt="a red circle") for pipe in (plain, older)]
results.append(half.encoder.register_tokens.double().sum().item())
text = FlexTokPipeline.from_original("user/official", "user/text-prior")
classes = FlexTokPipeline.from_original("user/official", "user/class-prior", revision="older", prior_revision="older")
other = FlexTokPipeline.from_original("user/official", "user/text-prior", text_encoder="user/other-t5")
results += [run(text, prompt="two flamingos"), run(classes, class_labels=[2]), run(other, prompt="two flamingos")]
print(json.dumps(results))
"""

PUSH = """
from flextok_hf import FlexTokPipeline

pipe = FlexTokPipeline.from_pretrained("model")
print(pipe.push_to_hub("user/pushed", token="hf_of_the_test"))
"""
SAVE_AND_PUSH = """
pipe.save_pretrained("again", push_to_hub=True, repo_id="user/pushed", token="hf_of_the_test")
"""


PARTS = """
import json
from flextok_hf import FlexTokEncoder, FlexTokFlowDecoder, FlexTokPipeline, FlexTokPriorForCausalLM

parts = {"encoder": FlexTokEncoder, "decoder": FlexTokFlowDecoder, "prior": FlexTokPriorForCausalLM}
sums, names = [], []
for name, kind in parts.items():
    for options in ({}, {"revision": "older"}):
        model = kind.from_pretrained("user/tiny", subfolder=name, **options)
        sums.append(round(sum(one.double().sum().item() for one in model.parameters()), 6))
        names.append(model.config["_name_or_path"] if name == "decoder" else model.name_or_path)
names.append(FlexTokPipeline.from_pretrained("user/tiny").config._name_or_path)
errors = []
decoder = lambda name: FlexTokFlowDecoder.from_pretrained(name, subfolder="decoder")
for load in (decoder, FlexTokPipeline.from_pretrained):
    for name in ("user/index", "user/lacking", "user/sizes"):
        try:
            load(name)
        except (ValueError, OSError) as error:
            errors.append(str(error))
print(json.dumps([sums, names, errors]))
"""


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Mimics the Hub for `server.repositories`: names -> revisions -> folders; there is always a `main`."""

    def do_HEAD(self):  # noqa: N802, the name that http.server expects
        self.answer(with_body=False)

    def do_GET(self):  # noqa: N802
        self.answer(with_body=True)

    def do_POST(self):  # noqa: N802
        """Handle the requests of `push_to_hub`: a new repository, a card to validate, the files of a commit."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(path)
        address = f"http://127.0.0.1:{self.server.server_port}/user/pushed"
        status, answer = 200, {}
        if path == "/api/repos/create":
            answer = {"url": address}
        elif path == "/api/validate-yaml":
            status, answer = self.validate(json.loads(body)["content"])
        elif path == "/api/models/user/pushed/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]}
        elif path == "/api/models/user/pushed/commit/main":
            files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            commit = commit_of("user/pushed", "main")
            answer = {"commitUrl": f"{address}/commit/{commit}", "commitOid": commit}
        else:
            status = 404
        self.send_json(status, answer)

    @staticmethod
    def validate(card):
        """Check that a card's metadata is readable and has the right types, as the Hub does."""
        data = ModelCard(card).data.to_dict()
        errors = [key for key in ("license", "library_name", "pipeline_tag") if not isinstance(data.get(key, ""), str)]
        errors += [tag for tag in data.get("tags", []) if not isinstance(tag, str)]
        answer = {"errors": [{"message": f"wrong type: {key}"} for key in errors]}
        answer["warnings"] = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        return (400 if errors else 200), answer

    def send_json(self, status, answer):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, with_body):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
        revisions = self.server.repositories.get(repository, {})
        commits = {commit_of(repository, name): folder for name, folder in revisions.items()}
        folder = revisions.get(revision) or commits.get(revision)
        headers, body, code = {}, b"{}", 404
        if folder is None:
            headers["X-Error-Code"] = "RevisionNotFound" if revisions else "RepoNotFound"
        else:
            commit = next(commit for commit, other in commits.items() if other == folder)
            headers["X-Repo-Commit"] = commit
            files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
            content = self.content(path, repository, commit, parts, files)
            if content is None:
                headers["X-Error-Code"] = "EntryNotFound"
            else:
                body, code = content, 200
                headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send_response(code)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def content(self, path, repository, commit, parts, files):
        """A file, the list of files, or the description of a repository; `None` if it does not exist."""
        if not path.startswith("/api/"):
            name = "/".join(parts[4:])
            return files[name].read_bytes() if name in files else None
        if parts[2:3] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": commit}
                for name, file in files.items()
            ]
            return json.dumps(entries).encode()
        siblings = [{"rfilename": name} for name in files]
        return json.dumps({"id": repository, "sha": commit, "siblings": siblings, "tags": []}).encode()

    def log_message(self, *arguments):
        pass


def commit_of(repository, revision):
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """A local Hub, initially empty."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.repositories, server.requests, server.commits = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fill(hub, folder, tiny_pipeline):
    """Put our pipelines and official checkpoints on the Hub."""
    for name, pipe in (("main", tiny_pipeline), ("older", make_pipeline_with_other_weights(tiny_pipeline))):
        pipe.save_pretrained(folder / "tiny" / name)
    half = FlexTokPipeline.from_pretrained(folder / "tiny" / "main", dtype=torch.float16)
    half.save_pretrained(folder / "tiny" / "main", variant="fp16")
    for seed, name in enumerate(("main", "older")):
        official, _, _ = write_tokenizer(folder / "official" / name, seed=seed)
        config = json.loads((official / "config.json").read_text())
        config["vae"].update(hf_hub_path="user/vae", scaling_factor=None)
        (official / "config.json").write_text(json.dumps(config))
        (folder / "vae").mkdir(exist_ok=True)
        shutil.move(official / "vae_config.json", folder / "vae" / "config.json")
        write_prior(folder / "class-prior" / name, classes=3, seed=seed)
    text_prior, _, _ = write_prior(folder / "text-prior", text_dim=48)
    config = yaml.safe_load((text_prior / "config.yaml").read_text())
    config["model"]["meta_model"]["models"]["text_encoder"]["t5_embedder"]["hf_hub_path"] = "user/t5"
    (text_prior / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(T5_FOLDER, folder / "other-t5")
    T5EncoderModel(T5Config.from_pretrained(T5_FOLDER)).save_pretrained(folder / "other-t5")
    hub.repositories = {
        f"user/{name}": {revision: folder / name / revision for revision in ("main", "older")}
        for name in ("tiny", "official", "class-prior")
    }
    hub.repositories |= {f"user/{name}": {"main": folder / name} for name in ("vae", "text-prior", "other-t5")}
    hub.repositories["user/t5"] = {"main": T5_FOLDER}


def make_pipeline_with_other_weights(pipe):
    components = {**pipe.components, "decoder": make_decoder()}
    with torch.no_grad():
        components["decoder"].velocity_proj.bias.add_(1.0)
    return FlexTokPipeline(**components)


def run_program(program, folder, endpoint, **environment):
    """Run Python in a fresh process with its own cache; return its last line of output."""
    variables = {
        "HF_HOME": str(folder / "home"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    source = str(ROOT / "src")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    search_path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**inherited, "PYTHONPATH": search_path, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_pipelines_and_official_checkpoints_load_by_name_from_the_hub_and_then_offline(hub, tiny_pipeline, tmp_path):
    fill(hub, tmp_path / "repositories", tiny_pipeline)
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    online = run_program(LOADS, tmp_path, endpoint)
    plain, older, half_registers, text, classes, other = json.loads(online)

    generator = torch.Generator().manual_seed(0)
    local = tiny_pipeline("a red circle", num_inference_steps=1, generator=generator, output_type="latent")
    assert plain[0] == older[0] == local.token_ids.tolist()
    assert plain[1] == pytest.approx(local.images.double().sum().item(), abs=1e-2) and plain[1] != older[1]
    assert half_registers == tiny_pipeline.encoder.register_tokens.half().double().sum().item()
    assert any(path.endswith("decoder/diffusion_pytorch_model.fp16.safetensors") for path in hub.requests)

    assert len(text[0][0]) == len(classes[0][0]) == 6 and text[2] == classes[2] == "torch.float32"
    assert text[0] != other[0]
    weights = [path.split("/")[2:5:2] for path in hub.requests if path.endswith("/model.safetensors")]
    names = {commit_of(f"user/{name}", revision): revision for name, _ in weights for revision in ("main", "older")}
    fetched = {(name, names.get(revision, revision)) for name, revision in weights if name != "tiny"}
    wanted = {("official", "main"), ("official", "older"), ("class-prior", "older"), ("text-prior", "main")}
    assert fetched == wanted | {("t5", "main"), ("other-t5", "main")}

    num_requests = len(hub.requests)
    assert run_program(LOADS, tmp_path, endpoint, HF_HUB_OFFLINE="1") == online
    assert len(hub.requests) == num_requests


@pytest.mark.slow
def test_models_on_the_hub_are_checked_like_folders(hub, tiny_pipeline, tmp_path):
    older = make_pipeline_with_other_weights(tiny_pipeline)
    for name, pipe in (("main", tiny_pipeline), ("older", older)):
        pipe.save_pretrained(tmp_path / "tiny" / name)
    for name in ("index", "lacking", "sizes"):
        shutil.copytree(tmp_path / "tiny" / "main", tmp_path / name)
    weights = load_file(tmp_path / "lacking" / "decoder" / WEIGHTS)
    del weights["mask_token"]
    save_file(weights, tmp_path / "lacking" / "decoder" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / "sizes" / "decoder" / "config.json").read_text())
    (tmp_path / "sizes" / "decoder" / "config.json").write_text(json.dumps({**config, "num_registers": 2 * 10**7}))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, f"../../{WEIGHTS}")}
    shard = WEIGHTS.replace(".", "-00001-of-00001.")
    (tmp_path / "index" / "decoder" / WEIGHTS).rename(tmp_path / "index" / "decoder" / shard)
    (tmp_path / "index" / "decoder" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    hub.repositories = {"user/tiny": {name: tmp_path / "tiny" / name for name in ("main", "older")}}
    hub.repositories |= {f"user/{name}": {"main": tmp_path / name} for name in ("index", "lacking", "sizes")}

    endpoint = f"http://127.0.0.1:{hub.server_port}"
    online = run_program(PARTS, tmp_path, endpoint)
    sums, names, errors = json.loads(online)
    parts = [getattr(pipe, name) for name in ("encoder", "decoder", "prior") for pipe in (tiny_pipeline, older)]
    expected = [sum(one.double().sum().item() for one in part.parameters()) for part in parts]
    assert sums == pytest.approx(expected, abs=1e-5) and set(names) == {"user/tiny"}
    assert len(errors) == 6
    for error, word in zip(errors, 2 * [f"../../{WEIGHTS}", "lacks weights: mask_token", "num_registers"]):
        assert word in error
    num_requests = len(hub.requests)
    assert run_program(PARTS, tmp_path, endpoint, HF_HUB_OFFLINE="1") == online
    assert len(hub.requests) == num_requests


@pytest.mark.slow
def test_what_is_missing_on_the_hub_or_in_the_cache_is_named(hub, tmp_path):
    hub.repositories["user/empty"] = {"main": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"pickle")
    program = """
import json
from flextok_hf import FlexTokPipeline

messages = []
for arguments in (
    {"tokenizer": "user/nothing"},
    {"tokenizer": "user/empty", "revision": "v7"},
    {"tokenizer": "user/empty"},
    {"tokenizer": "user/other", "local_files_only": True},
):
    try:
        FlexTokPipeline.from_original(**arguments)
    except (ValueError, OSError) as error:
        messages.append(f"{type(error).__name__}: {error}")
print(json.dumps(messages))
"""
    messages = json.loads(run_program(program, tmp_path, f"http://127.0.0.1:{hub.server_port}"))
    kinds = [message.partition(":")[0] for message in messages]
    assert kinds == [
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "FileNotFoundError",
        "LocalEntryNotFoundError",
    ]
    assert "has no `model.safetensors`, the only" in messages[2]
    assert not any(path.endswith("pytorch_model.bin") for path in hub.requests)


@pytest.mark.slow
def test_a_pipeline_is_pushed_with_its_own_valid_card(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model_card.yaml").write_text("title: A tiny model\nlicense: mit\n")
    hub.repositories["user/pushed"] = {"main": tmp_path / "empty"}
    run_program(PUSH + SAVE_AND_PUSH, tmp_path, f"http://127.0.0.1:{hub.server_port}")
    assert "/api/validate-yaml" in hub.requests and len(hub.commits) == 2
    for pushed in hub.commits:
        card = ModelCard(pushed["README.md"].decode())
        assert card.data.library_name == "flextok_hf" and card.data.license == "mit"
        assert "# A tiny model" in card.text and 'from_pretrained("user/pushed")' in card.text
        names = {"model_index.json", "model_card.yaml", "encoder/model.safetensors", f"decoder/{WEIGHTS}"}
        assert names <= set(pushed)
        stored = load_bytes(pushed[f"decoder/{WEIGHTS}"])
        assert all(torch.equal(stored[key], value) for key, value in tiny_pipeline.decoder.state_dict().items())
    for name, content in pushed.items():
        (tmp_path / "empty" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "empty" / name).write_bytes(content)
    shutil.copyfile(PHOTO, tmp_path / "photo.jpg")
    code = card.text.partition("```python\n")[2].partition("```")[0] + "print(image.size == few.size == (16, 16))"
    assert run_program(code, tmp_path, f"http://127.0.0.1:{hub.server_port}") == "True", "the code of the card runs"


@pytest.mark.slow
def test_an_existing_card_on_the_hub_is_kept(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    hub.repositories["user/pushed"] = {"main": tmp_path / "pushed"}
    (tmp_path / "pushed").mkdir()
    (tmp_path / "pushed" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    run_program(PUSH, tmp_path, f"http://127.0.0.1:{hub.server_port}")
    assert "# Mine" in hub.commits[0]["README.md"].decode()


# Damaged folders


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_tokenizer_pipeline, tmp_path):
    tiny_tokenizer_pipeline.save_pretrained(tmp_path)
    return tmp_path


def test_a_decoder_without_its_weight_file_is_refused(folder):
    (folder / "decoder" / WEIGHTS).unlink()
    with pytest.raises(OSError, match=WEIGHTS.removesuffix(".safetensors")):
        FlexTokPipeline.from_pretrained(folder)


def test_a_decoder_with_a_truncated_weight_file_is_refused(folder):
    content = (folder / "decoder" / WEIGHTS).read_bytes()
    (folder / "decoder" / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=f"{WEIGHTS}|checkpoint file"):
        FlexTokPipeline.from_pretrained(folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_missing_decoder_weights_are_named(folder, low_cpu_mem_usage):
    weights = load_file(folder / "decoder" / WEIGHTS)
    del weights["velocity_proj.weight"], weights["mask_token"]
    save_file(weights, folder / "decoder" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="mask_token, velocity_proj.weight"):
        FlexTokFlowDecoder.from_pretrained(folder / "decoder", low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(ValueError, match="mask_token, velocity_proj.weight"):
        FlexTokPipeline.from_pretrained(folder)


def test_a_decoder_reports_how_it_was_loaded(folder):
    decoder, report = FlexTokFlowDecoder.from_pretrained(folder / "decoder", output_loading_info=True)
    assert isinstance(decoder, FlexTokFlowDecoder)
    assert report["missing_keys"] == []
