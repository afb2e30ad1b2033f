"""Loading by name from a Hub and from its cache, and from folders with damaged weights."""

import base64
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from flextok_hf.modeling_decoder import FlexTokFlowDecoder
from flextok_hf.pipeline_flextok import FlexTokPipeline


REPOSITORY, COMMIT = "user/tiny", "0123456789abcdef0123456789abcdef01234567"
DRAW = """
import torch
from flextok_hf import FlexTokPipeline

pipe = FlexTokPipeline.from_pretrained("user/tiny")
pipe.set_progress_bar_config(disable=True)
output = pipe("a red circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
print("ids", output.token_ids.tolist())
"""

PUSH = """
from flextok_hf import FlexTokPipeline

pipe = FlexTokPipeline.from_pretrained("model")
pipe.push_to_hub("user/tiny", token="hf_of_the_test")
"""
SAVE_AND_PUSH = """
pipe.save_pretrained("again", push_to_hub=True, repo_id="user/tiny", token="hf_of_the_test")
"""


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for one repository, the folder `server.folder`."""

    def do_HEAD(self):  # noqa: N802, the name that http.server looks for
        self.answer(with_body=False)

    def do_GET(self):  # noqa: N802
        self.answer(with_body=True)

    def do_POST(self):  # noqa: N802
        """Take what `push_to_hub` sends: a new repository, a card to validate, the files of a commit."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(path)
        api = f"/api/models/{REPOSITORY}"
        address = f"http://127.0.0.1:{self.server.server_port}/{REPOSITORY}"
        status, answer = 200, {}
        if path == "/api/repos/create":
            answer = {"url": address}
        elif path == "/api/validate-yaml":
            status, answer = self.validate(json.loads(body)["content"])
        elif path == f"{api}/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]}
        elif path == f"{api}/commit/main":
            files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            answer = {"commitUrl": f"{address}/commit/{COMMIT}", "commitOid": COMMIT}
        else:
            status = 404
        self.send_json(status, answer)

    @staticmethod
    def validate(card):
        """Check a card's metadata as the Hub does: readable, and of the right types."""
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
        files = {file.relative_to(self.server.folder).as_posix(): file for file in self.server.folder.rglob("*.*")}
        files = {name: file for name, file in files.items() if file.is_file()}
        api, resolve = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/"
        name = path.removeprefix(resolve).partition("/")[2] if path.startswith(resolve) else None
        headers = {"X-Repo-Commit": COMMIT}
        if name in files:
            body = files[name].read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        elif path.startswith(f"{api}/tree/"):
            sizes = {name: file.stat().st_size for name, file in files.items()}
            body = json.dumps(
                [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
            ).encode()
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            body = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": []}).encode()
        else:
            body, headers["X-Error-Code"] = b"{}", "EntryNotFound"
        self.send_response(404 if "X-Error-Code" in headers else 200)
        for header, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tiny_pipeline, tmp_path):
    """A Hub on this machine that holds the tiny pipeline."""
    tiny_pipeline.save_pretrained(tmp_path / "repository")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.folder, server.requests, server.commits = tmp_path / "repository", [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_program(program, folder, endpoint, **environment):
    """Run Python in a fresh process with its own cache; returns its last line."""
    variables = {
        "HF_HOME": str(folder / "home"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    source = str(Path(__file__).parents[1] / "src")
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
    return next(reversed(result.stdout.splitlines()), "")


@pytest.mark.slow
def test_a_pipeline_loads_by_name_from_the_hub_and_then_offline(hub, tiny_pipeline, tmp_path):
    generator = torch.Generator().manual_seed(0)
    token_ids = tiny_pipeline("a red circle", num_inference_steps=1, generator=generator).token_ids
    expected = f"ids {token_ids.tolist()}"
    assert run_program(DRAW, tmp_path, f"http://127.0.0.1:{hub.server_port}") == expected
    assert any(path.endswith("/decoder/diffusion_pytorch_model.safetensors") for path in hub.requests)

    num_requests = len(hub.requests)
    assert run_program(DRAW, tmp_path, f"http://127.0.0.1:{hub.server_port}", HF_HUB_OFFLINE="1") == expected
    assert len(hub.requests) == num_requests


@pytest.mark.slow
def test_a_pipeline_is_pushed_with_a_valid_card_of_its_own(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model_card.yaml").write_text("title: A tiny model\nlicense: mit\n")
    (tmp_path / "repository" / "README.md").unlink()  # there is no card on the Hub yet
    run_program(PUSH + SAVE_AND_PUSH, tmp_path, f"http://127.0.0.1:{hub.server_port}")
    assert "/api/validate-yaml" in hub.requests and len(hub.commits) == 2
    for pushed in hub.commits:
        card = ModelCard(pushed["README.md"].decode())
        assert card.data.library_name == "flextok_hf" and card.data.license == "mit"
        assert "# A tiny model" in card.text and 'from_pretrained("user/tiny")' in card.text
        names = {"model_index.json", "model_card.yaml", "encoder/model.safetensors", f"decoder/{WEIGHTS}"}
        assert names <= set(pushed)
        stored = load_bytes(pushed[f"decoder/{WEIGHTS}"])
        assert all(torch.equal(stored[key], value) for key, value in tiny_pipeline.decoder.state_dict().items())


@pytest.mark.slow
def test_a_card_that_somebody_wrote_on_the_hub_stays(hub, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "repository" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
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


def test_a_decoder_with_a_cut_off_weight_file_is_refused(folder):
    content = (folder / "decoder" / WEIGHTS).read_bytes()
    (folder / "decoder" / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=f"{WEIGHTS}|checkpoint file"):
        FlexTokPipeline.from_pretrained(folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_decoder_with_missing_weights_is_refused_by_name(folder, low_cpu_mem_usage):
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
