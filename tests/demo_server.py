"""`flextok demo` in its own process, for tests that send requests to it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


START_S = 240


class Server:
    """`flextok demo` in its own process."""

    def __init__(self, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        self.log = folder / "log.txt"
        environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "images"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "flextok_hf.cli", "demo", "--port", str(port), "--device", "cpu", *options]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        deadline = time.monotonic() + START_S
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def memory_mb(self) -> float:
        """Return the resident memory of the server."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the server is gone")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
