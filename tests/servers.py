"""Programs under test that serve a page on this machine, and the browser that looks at it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
OFFLINE |= {"PIP_NO_INDEX": "1", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}
OFFLINE |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "PYTHONUNBUFFERED": "1"}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class HostError(RuntimeError):
    """A request was refused, or the program has ended; the text has what it said."""


class Server:
    """A program in the folder `root` that serves HTTP on a free port, and prints into the file `log`."""

    def __init__(self, root: Path, log: Path) -> None:
        self.root, self.log = root, log
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def launch(self, python: Path, *arguments: str, **environment: str) -> None:
        given = {"cwd": self.root, "stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        with self.log.open("wb") as log:
            command, env = [str(python), *arguments], {**os.environ, **OFFLINE, **environment}
            self._process = subprocess.Popen(command, env=env, stdout=log, **given)

    @contextmanager
    def running(self) -> Iterator[Any]:
        try:
            self.start()
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        if self._process is not None:
            # its own session: it may have started children
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
                try:
                    self._process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(self._process.pid, signal.SIGKILL)
                    self._process.wait(10)
            self._process = None

    def console(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, done: Callable[[], Any], patience: float = 300) -> Any:
        """Wait until `done` returns something, and return that."""
        end = time.monotonic() + patience
        while not (found := done()):
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > end:
                raise HostError(f"it {'ended' if ended else 'did not answer'}:\n{self.console()[-3000:]}")
            time.sleep(0.05)
        return found

    def call(self, path: str, body: Mapping[str, Any] | None = None, timeout: float = 600, **headers: str) -> Any:
        """GET, or POST with a body, as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise HostError(f"{error.code}: {error.read()[:4000].decode(errors='replace')}") from None


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window; where there is none, the test is skipped."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync.sync_playwright() as playwright:
        if path is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
