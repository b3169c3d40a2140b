"""`vlm serve --memory`: captions of remembered pictures are told behind a picture like theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from vlm.data.remember import adapter_features, remember

ROOT = Path(__file__).parents[2]
CAPTIONS = {1: "a red cup on a table", 2: "two dogs run on the grass"}
STRANGE = 77


@pytest.fixture(scope="module")
def remembered(adapter: Path, make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory of two captioned pictures, told of to pictures that are all but the same."""
    folder = tmp_path_factory.mktemp("captioned")
    lines = []
    for seed, caption in CAPTIONS.items():
        (folder / f"{seed}.png").write_bytes(make.png(make.picture(seed)))
        lines.append(json.dumps({"file_name": f"{seed}.png", "caption": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    memory = tmp_path_factory.mktemp("remembered") / "memory"
    done = remember(folder, memory, adapter_features(str(adapter), offline=True), count=1, least=0.999)
    assert done.new == len(CAPTIONS)
    return memory


@pytest.fixture(scope="module")
def reminded(start: Callable[..., Any], remembered: Path) -> Any:
    return start("--memory", str(remembered))


def said(server: Any, *parts: Any) -> tuple[int, str, list[float]]:
    """Prompt tokens, text and log-probabilities of an answer."""
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    reply = server.chat(messages=[{"role": "user", "content": content}], logprobs=True)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    likely = [token["logprob"] for token in choice["logprobs"]["content"]]
    return reply.json()["usage"]["prompt_tokens"], choice["message"]["content"], likely


def shown(make: Any, seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": make.url(seed)}}


def test_what_is_remembered_is_told_behind_its_picture(server: Any, reminded: Any, make: Any) -> None:
    one, two, strange = (shown(make, seed) for seed in (1, 2, STRANGE))
    first, second = (f"Similar pictures show: {caption}.\n" for caption in CAPTIONS.values())
    # A server without the memory that is told the very same words answers the very same.
    tokens, text, likely = said(reminded, one, "What is it?")
    plainly = said(server, one, first, "What is it?")
    assert (tokens, text) == plainly[:2]
    assert likely == pytest.approx(plainly[2], abs=1e-3)
    assert tokens > said(server, one, "What is it?")[0] + 5
    # Each picture is told its own, wherever it stands, and one that is like none is told nothing.
    several = said(reminded, two, "Compare it with", strange, "and with", one, "please.")
    plainly = said(server, two, second, "Compare it with", strange, "and with", one, first, "please.")
    assert several[:2] == plainly[:2]
    assert several[2] == pytest.approx(plainly[2], abs=1e-3)


def test_a_strange_picture_is_answered_as_without_a_memory(server: Any, reminded: Any, make: Any) -> None:
    with_it, without = (said(one, shown(make, STRANGE), "What is it?") for one in (reminded, server))
    assert with_it[:2] == without[:2]
    assert with_it[2] == pytest.approx(without[2], abs=1e-3)


def test_where_it_looked_with_a_memory(reminded: Any, make: Any) -> None:
    import httpx

    body = {"model": "model", "messages": [make.user("What?", make.url(1))], "answer": "a cup"}
    (found,) = httpx.post(f"{reminded.url}/v1/attention", json=body, timeout=60).json()["images"]
    assert sum(found["values"]) == pytest.approx(1)


def test_captions_of_the_memory_are_in_no_log_and_no_metric(reminded: Any, make: Any) -> None:
    import httpx

    said(reminded, shown(make, 1), "What is it?")
    told = "".join(reminded.log) + httpx.get(f"{reminded.url}/metrics").text
    assert "/v1/chat/completions" in told
    assert not any(caption in told for caption in CAPTIONS.values())


def test_a_memory_that_is_not_there_is_one_line(adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vlm", "serve", "--adapter", str(adapter), "--port", "0", "--offline"]
    done = subprocess.run(
        [*command, "--memory", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "serving on" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "holds no memory" in errors[0]
    assert "Traceback" not in done.stderr
