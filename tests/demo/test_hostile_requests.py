"""The demo against hostile requests to Gradio's API, on loopback: no file outside the upload folder is read, every
request gets a sentence, and the server keeps working.
"""

import json
import math
import os
import random
import re
import time
from urllib.parse import quote

import pytest
from demo_server import Server
from paths import PHOTO
from PIL import Image


pytest.importorskip("gradio")
pytest.importorskip("fcntl")  # named pipes
httpx = pytest.importorskip("httpx")

from flextok_hf.demo.server import MAX_BODY_BYTES, NOT_UNDERSTOOD  # noqa: E402
from flextok_hf.demo.uploads import MAX_PHOTO_BYTES, NOT_UPLOADED  # noqa: E402


ANSWER_S = 30
MEMORY_GROWTH_MB = 64  # allocators keep some pages
MARK = {"_type": "gradio.FileData"}
SENTENCE = re.compile(r"[A-Z][^\n]*\.")


@pytest.fixture(scope="module")
def server(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tiny_pipeline.save_pretrained(folder / "model")
    server = Server(folder, "--model", str(folder / "model"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """Paths outside the upload folder, readable for the server; a pipe blocks who opens it."""
    folder = tmp_path_factory.mktemp("secrets")
    Image.new("RGB", (40, 40), "red").save(folder / "secret.png")
    (folder / "text.png").write_text("not an image")
    os.mkfifo(folder / "pipe.png")
    return [str(folder / name) for name in ("secret.png", "text.png", "pipe.png", "missing.png", "")]


class Visitor:
    """Sends requests to Gradio's API as the page does, or as it never would."""

    def __init__(self, server):
        self.http = httpx.Client(base_url=server.url + "gradio_api", timeout=ANSWER_S)
        config = self.http.get(server.url + "config").json()
        self.functions = {fn["api_name"]: fn["id"] for fn in config["dependencies"]}
        self.number = 0

    def upload(self, path=PHOTO):
        with open(path, "rb") as file:
            (name,) = self.http.post("/upload", files={"files": ("photo.jpg", file)}).json()
        return {"path": name, "meta": MARK}

    def post(self, route, body):
        content = json.dumps(body)  # unlike httpx also NaN and lone surrogates
        return self.http.post(route, content=content, headers={"content-type": "application/json"})

    def run(self, function, data, **body):
        """Join the queue; returns whether the job succeeded and its output or error."""
        self.number += 1
        session = f"visitor {self.number}"
        index = self.functions.get(function, function)
        answer = self.post("/queue/join", {"data": data, "fn_index": index, "session_hash": session, **body})
        if answer.status_code != 200:
            return False, answer.json().get("error") or answer.json()["detail"]
        with self.http.stream("GET", "/queue/data", params={"session_hash": session}) as messages:
            for line in messages.iter_lines():
                message = json.loads(line.removeprefix("data:") or "{}")
                if message.get("msg") == "process_completed":
                    output = message["output"]
                    return message["success"], output["data"] if message["success"] else output["error"]
        raise AssertionError("no answer")


@pytest.fixture(scope="module")
def visitor(server):
    return Visitor(server)


def photos_of(path):
    """Return every way to name a file that Gradio might follow."""
    url = "http://127.0.0.1:9/photo.png"
    return [
        {"path": path},
        {"path": path, "meta": MARK},
        {"path": path, "meta": None},
        {"path": path, "meta": MARK, "is_stream": True},
        {"path": path, "meta": MARK, "orig_name": "photo.svg", "mime_type": "image/svg+xml"},
        {"path": path, "url": path, "meta": MARK},
        {"path": f"file://{path}", "meta": MARK},
        {"path": url, "meta": MARK},
        {"path": None, "url": url, "meta": MARK},
        {"url": "data:image/png;base64,AAAA", "meta": MARK},
        {"photo": {"path": path, "meta": MARK}},
        [{"path": path, "meta": MARK}],
        path,
    ]


def test_no_file_outside_the_upload_folder_is_read_and_no_answer_tells_whether_it_exists(visitor, secrets):
    upload = visitor.upload()["path"]
    answers = set()
    for path in [*secrets, f"{upload}/../../../{secrets[0]}"]:
        start = time.monotonic()
        answers |= {visitor.run("reconstruct", [photo, 1, 0, False]) for photo in photos_of(path)}
        assert time.monotonic() - start < ANSWER_S
    for path in [secrets[0], "/etc/passwd", "/proc/self/environ", "/dev/zero", "\0", "x" * 9999]:
        answers.add(visitor.run("vary", [{"path": path}, 1, "", 0, False]))
    assert answers == {(False, NOT_UPLOADED)}


def test_links_pipes_and_folders_inside_the_upload_folder_are_not_read(visitor, secrets):
    upload = visitor.upload()["path"]
    folder = os.path.dirname(upload)
    os.symlink(secrets[0], os.path.join(folder, "link.png"))
    os.mkfifo(os.path.join(folder, "pipe.png"))
    for name in ("link.png", "pipe.png", "", "missing.png", f"../{'x' * 300}"):
        data = [{"path": os.path.join(folder, name), "meta": MARK}, 1, 0, False]
        assert visitor.run("reconstruct", data)[1] in (NOT_UPLOADED, NOT_UNDERSTOOD), name
    assert visitor.run("reconstruct", [{"path": upload, "meta": MARK}, 1, 0, False])[0]


def test_files_outside_the_upload_folder_are_not_served_and_addresses_are_not_fetched(visitor, secrets):
    addresses = ["http://127.0.0.1:9/x", "https://example.org/", "http:%2F%2Fexample.org", "HTTP://example.org"]
    for path in [*secrets[:-1], "/etc/passwd", *addresses]:
        answer = visitor.http.get(f"/file={path}")
        assert answer.status_code in (403, 404) and "not an image" not in answer.text, path
    for route in ("proxy=https://example.org/", "component_server", "process_recording", "vibe-edit", "vibe-code/"):
        assert visitor.http.post(f"/{route}", json={}).status_code == 404, route
        assert visitor.http.get(f"/{route}").status_code == 404, route


@pytest.mark.parametrize(
    "function, data, words",
    [
        ("reconstruct", [None, 1, 0, False], "Choose a photo"),
        ("reconstruct", [], "takes 4 inputs, got 0"),
        ("reconstruct", [None, 1, 0, False, 5], "takes 4 inputs, got 5"),
        ("generate", [None] * 5, "Enter a prompt"),
        ("generate", ["a cat", None, 0, 1, 1], "number of tokens"),
        ("generate", ["a cat", "3", 0, 1, 1], "number of tokens"),
        ("generate", ["a cat", True, 0, 1, 1], "number of tokens"),
        ("generate", ["a cat", 10**400, 0, 1, 1], "number of tokens"),
        ("generate", ["a cat", 3, None, 1, 1], "The seed"),
        ("generate", ["a cat", 3, -1, 1, 1], "The seed"),
        ("generate", ["a cat", 3, 0, "x", 1], "Guidance"),
        ("generate", ["a cat", 3, 0, 1, 10**6], "Guidance"),
        ("generate", ["a cat", 3, 0, 1, [1]], "Reload the page"),
        ("generate", [{"path": "x"}, 3, 0, 1, 1], "Reload the page"),
        ("generate", ["c" * 501, 3, 0, 1, 1], "501 characters"),
        ("run_replace", [None, None, 1, 1, 0], "no tokens to change"),
        ("run_replace", [[1, 2, 3], [16, 16], 1, 1, 0], "no tokens to change"),  # the state is the server's
        ("load_example", [10**6], "Reload the page"),
        ("load_example", [None], "Reload the page"),
        ("choose", [None], "Reload the page"),
        (10**6, [None], "Reload the page"),
        (-1, [None], "Reload the page"),
    ],
)
def test_wrong_requests_get_one_sentence(visitor, function, data, words):
    succeeded, message = visitor.run(function, data, event_data={"index": "x"})
    assert not succeeded and words in message and SENTENCE.fullmatch(message), message


def test_large_bodies_are_refused(visitor):
    headers = {"content-type": "application/json"}
    body = b'{"data": ["' + b"c" * MAX_BODY_BYTES + b'"]}'
    assert visitor.http.post("/queue/join", content=body, headers=headers).status_code == 413
    assert visitor.http.post("/queue/join", content=iter([body]), headers=headers).status_code == 400  # in parts
    photos = [("files", (f"{number}.png", bytes(MAX_PHOTO_BYTES // 2))) for number in range(3)]
    assert visitor.http.post("/upload", files=photos).status_code == 413
    (name,) = visitor.http.post("/upload", files=[("files", ("a.png", bytes(MAX_PHOTO_BYTES - 9)))]).json()
    assert os.path.getsize(name) == MAX_PHOTO_BYTES - 9


def hostile_request(visitor, draw, paths):
    """Send one random request and return its answer as text."""
    values = [
        None,
        True,
        0,
        -1,
        1,
        2.5,
        10**400,
        math.nan,
        "",
        "a cat",
        "\ud800",
        [],
        [1],
        {},
        {"path": paths[0]},
        "x" * 9999,
    ]
    values += [photo for path in paths for photo in photos_of(path)]
    kind = draw.randrange(8)
    if kind < 5:
        function = draw.choice([*visitor.functions, draw.randrange(-5, 30)])
        data = [draw.choice(values) for _ in range(draw.randrange(7))]
        body = {"event_data": draw.choice(values), "trigger_id": draw.choice([None, 0, 5, 10**6])}
        body |= draw.choice([{}, {"batched": True}, {"simple_format": True}])
        return str(visitor.run(function, data, **body))
    if kind == 5:
        name = draw.choice([*filter(None, visitor.functions), "nothing"])
        data = [draw.choice(values) for _ in range(draw.randrange(7))]
        return visitor.post(f"/{draw.choice(['run', 'call', 'call/v2'])}/{name}", {"data": data}).text
    if kind == 6:
        return visitor.http.get(f"/{draw.choice(['file=', 'file/', 'proxy='])}{quote(draw.choice(paths))}").text
    content = draw.choice([b"", b"{", b"[]", b"\xff" * 99, b'{"data": [null], "fn_index": "0"}', b"--x\r\n\r\n--x--"])
    route = draw.choice(["/queue/join", "/upload", "/cancel", "/reset", "/component_server", "/call/generate"])
    kinds = ["application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain"]
    return visitor.http.post(route, content=content, headers={"content-type": draw.choice(kinds)}).text


def loop(server, visitor, secrets, count, seed):
    """Send `count` hostile requests; check each answer, then the memory, the log, and that a visitor is served."""
    draw = random.Random(seed)
    paths = [*secrets, "/etc/passwd", "/proc/self/environ", "/dev/zero", "http://127.0.0.1:9/x", "..", "\0"]
    photo = visitor.upload()
    assert visitor.run("reconstruct", [photo, 6, 0, False])[0]
    for _ in range(20):  # warm up: threads and allocators
        hostile_request(visitor, draw, paths)
    before = server.memory_mb()
    for number in range(count):
        start = time.monotonic()
        answer = hostile_request(visitor, draw, paths)
        assert time.monotonic() - start < ANSWER_S, (seed, number)
        assert "Traceback" not in answer and "root:" not in answer and '"error":null' not in answer, (seed, number)
        assert "{'error': None}" not in answer and "(False, None)" not in answer, (seed, number)
    growth = server.memory_mb() - before
    print(f"\n{count} hostile requests, memory {growth:+.0f} MB")
    assert growth < MEMORY_GROWTH_MB
    assert "Traceback" not in server.log.read_text(), server.log.read_text()[-3000:]
    succeeded, (_, image, facts) = visitor.run("reconstruct", [photo, 6, 0, False])
    assert succeeded and "6 tokens" in facts and visitor.http.get(image["url"]).status_code == 200


def test_hostile_requests_are_answered_and_leave_the_server_working(server, visitor, secrets):
    loop(server, visitor, secrets, 100, seed=0)


@pytest.mark.slow
def test_a_thousand_hostile_requests_leave_memory_and_server_as_they_were(server, visitor, secrets):
    loop(server, visitor, secrets, 1000, seed=1)
