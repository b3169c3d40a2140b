"""Real servers over real sockets: `vlm serve` as its own process on real weights, one for a test session, and
tiny models served from a thread, where a test must see or break what is inside.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A running server: where it is, its process, and what it logged."""

    url: str
    process: subprocess.Popen[str]
    key: str = ""
    log: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def chat(self, **body: object) -> httpx.Response:
        """One question by plain HTTP."""
        body = {"model": "model", "max_tokens": 8, "temperature": 0, **body}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=self.headers, timeout=120)

    def metric(self, name: str) -> float:
        """One number of /metrics."""
        text = httpx.get(f"{self.url}/metrics", headers=self.headers).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))

    def memory(self) -> int:
        """Resident bytes of the process."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly initialised adapter whose gates are open, so that pictures change the answers.

    `VLM_TEST_ADAPTER` names the folder of another one (of the one that ships, when screenshots are renewed).
    """
    if given := os.environ.get("VLM_TEST_ADAPTER"):
        return Path(given)
    import torch

    from vlm.checkpoint import build_model, save_adapter
    from vlm.config import FlamingoConfig, ModelConfig
    from vlm.errors import WeightsError

    folder = tmp_path_factory.mktemp("adapter") / "model"
    torch.manual_seed(7)
    try:
        model = build_model(ModelConfig(flamingo=FlamingoConfig(gate_init=0.5)), offline=True)
    except WeightsError as missing:
        pytest.skip(f"the frozen weights are not here: {missing}")
    save_adapter(model, folder)
    return folder


def launch(adapter: Path, *options: str, key: str = "") -> Server:
    """Start `vlm serve` and wait until it answers."""
    command = [
        sys.executable,
        "-m",
        "vlm",
        "serve",
        "--adapter",
        str(adapter),
        "--name",
        "model",
        "--port",
        "0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--offline", "--threads", "1", "--answer-tokens", "24", *options],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    server = Server("", process, key)
    assert process.stdout and process.stderr
    threading.Thread(target=lambda: server.log.extend(process.stderr or ()), daemon=True).start()
    first = process.stdout.readline()
    if not first.startswith("serving on "):
        process.wait(10)
        pytest.fail(f"the server did not start:\n{''.join(server.log)}")
    server.url = first.removeprefix("serving on ").strip()
    httpx.get(f"{server.url}/health").raise_for_status()
    return server


@pytest.fixture(scope="session")
def start(adapter: Path) -> Iterator[Callable[..., Server]]:
    """Starts further servers with options of their own; all end with the session."""
    started: list[Server] = []

    def begin(*options: str, key: str = "") -> Server:
        started.append(launch(adapter, *options, key=key))
        return started[-1]

    yield begin
    for server in started:
        with contextlib.suppress(ProcessLookupError):
            server.process.kill()
        server.process.wait(10)


@pytest.fixture(scope="session")
def server(start: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The session's server: no key, feedback on."""
    return start("--feedback", str(tmp_path_factory.mktemp("feedback") / "opinions.db"))


@contextmanager
def served(model: Any, settings: Any = None, *, started: bool = True) -> Iterator[httpx.Client]:
    """A client of a loaded model, served from a thread; unless `started`, its engine stands still."""
    uvicorn = pytest.importorskip("uvicorn")
    import torch

    from vlm.serve.main import build
    from vlm.serve.settings import Settings

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products are slower with more
    app = build(model, settings or Settings(), None, model_id="model")
    lifespan = "on" if started else "off"
    config = uvicorn.Config(app, ws="none", lifespan=lifespan, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(max_connections=256)) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        torch.set_num_threads(threads)
    assert not thread.is_alive()


@pytest.fixture(name="served", scope="session")
def served_() -> Callable[..., Any]:
    """`with served(model, settings) as client`: see above."""
    return served


class Make:
    """Pictures and messages for requests."""

    @staticmethod
    def picture(seed: int, side: int = 64) -> Image.Image:
        """A picture unlike any other seed's: big coloured squares."""
        noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((side, side), Image.Resampling.NEAREST)

    @staticmethod
    def png(image: Image.Image) -> bytes:
        out = BytesIO()
        image.save(out, "PNG")
        return out.getvalue()

    @staticmethod
    def data_url(content: bytes, kind: str = "image/png") -> str:
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"

    @classmethod
    def url(cls, seed: int) -> str:
        """A picture of this seed as a data: URL."""
        return cls.data_url(cls.png(cls.picture(seed)))

    @staticmethod
    def user(question: str, *urls: str) -> dict[str, object]:
        """A user's message: pictures, then words."""
        parts: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium."""
    from browsing import BROWSER, FLAGS, playwright

    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page in a browser context of its own; complaints of the browser fail the test."""
    from browsing import expect

    contexts = []
    complaints: list[str] = []
    foreign: list[str] = []

    def open_page(url: str = server.url, **options: Any) -> Any:
        context = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        expect.set_options(timeout=120_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Content Security" in m.text else None)
        home = (url, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(home) else foreign.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert foreign == []


@pytest.fixture
def files(tmp_path: Path, make: Any) -> Callable[[int], Path]:
    """`files(seed)`: a picture of its own look to choose on the page."""

    def write(seed: int) -> Path:
        path = tmp_path / f"picture-{seed}.png"
        path.write_bytes(make.png(make.picture(seed, 240)))
        return path

    return write
