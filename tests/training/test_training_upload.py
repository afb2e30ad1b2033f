"""Uploading a trained model, to a fake Hub on localhost."""

import base64
import http.server
import json
import threading

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load as load_tensors
from test_training_loop import all_weights, tokenizer_arguments

from flextok_hf.training.loop import Trainer
from flextok_hf.training.stages import train_tokenizer


class UploadHandler(http.server.BaseHTTPRequestHandler):
    """Accepts commits like the Hub, with all files as plain content."""

    def do_POST(self):  # noqa: N802, name required by http.server
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        repository = f"{self.server.user}/{self.server.name}" if self.server.name else None
        address = f"http://127.0.0.1:{self.server.server_port}/{repository}"
        if self.headers["Authorization"] != "Bearer secret":
            return self.answer(401, {"error": "who are you?"})
        if self.path == "/api/repos/create":
            self.server.name = json.loads(body)["name"]
            address = f"http://127.0.0.1:{self.server.server_port}/{self.server.user}/{self.server.name}"
            return self.answer(200, {"url": address, "name": f"{self.server.user}/{self.server.name}"})
        if self.server.is_full:
            return self.answer(413, {"error": "no room"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == f"/api/models/{repository}/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path == f"/api/models/{repository}/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{address}/commit/{'0' * 40}", "commitOid": "0" * 40})
        return self.answer(404, {})

    def do_GET(self):  # noqa: N802
        if self.path.endswith("/auth-check/write") and self.headers["Authorization"] != "Bearer secret":
            return self.answer(403, {"error": "not yours"})
        self.answer(200, {"siblings": [], "sha": "0" * 40, "id": f"{self.server.user}/{self.server.name}"})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), UploadHandler)
    server.user, server.name, server.files, server.is_full = "someone", None, {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()


@pytest.mark.parametrize("name", [None, "someone/shapes"])
def test_a_trained_model_is_uploaded_whole_with_its_card(hub, tmp_path, name):
    folder = train_tokenizer(
        tokenizer_arguments(tmp_path / "my_run", max_train_steps=1, push_to_hub=True, hub_model_id=name)
    )
    assert hub.name == ("shapes" if name else "my_run")
    assert set(hub.files) == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    uploaded = load_tensors(hub.files["encoder/model.safetensors"])
    assert all((uploaded[key] == tensor).all() for (_, key), tensor in all_weights(folder / "encoder").items())
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.pipeline_tag == "image-to-image" and card.data.library_name == "flextok_hf"
    assert f'from_pretrained("someone/{hub.name}")' in card.text


def test_a_missing_permission_shows_before_the_first_step(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a training step was run"))
    with pytest.raises(ValueError, match="`push_to_hub` cannot upload to 'someone/shapes': 403 Forbidden"):
        train_tokenizer(tokenizer_arguments(tmp_path, push_to_hub=True, hub_model_id="someone/shapes"))


def test_a_failed_upload_keeps_the_model_on_disk(hub, tmp_path):
    hub.is_full = True
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
        train_tokenizer(tokenizer_arguments(tmp_path, max_train_steps=1, push_to_hub=True))
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
