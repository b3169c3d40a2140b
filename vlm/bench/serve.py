"""`vlm bench serve`: what the server does under load, measured.

    vlm bench serve crossing   mixed requests at once must equal their answers alone
    vlm bench serve load       many clients for minutes: nothing lost, nothing wrong, nothing growing
    vlm bench serve speedup    16 questions at once against one after another

Every job prints one JSON object; the first two exit with 1 when an answer is lost or wrong, `load` when the
server's memory, threads or descriptors have grown, and `speedup` below 4 times.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlm.errors import VLMError
from vlm.options import add_common, apply_common, common_words, make_parser, positive

QUESTIONS = (
    "What is in the picture?", "Describe the picture.", "What colour is it?", "Is there an animal?",
    "How many things are there?", "Where was this taken?",
)  # fmt: skip
LEAST_SPEEDUP = 4.0
"""How many times sooner the engine must be with 16 questions."""
LONG_WORDS = 300
"""Words of a load's long prompts: a few of them are always being read beside everybody else's answers."""
NEAR_TIE = 1e-3
"""Two tokens whose log-probabilities differ by less may change places with the batch's last bits."""
SAMPLES = 100
"""How often a load looks at the server's resources: twenty times in each fifth of the run."""
FLAT = {"rss_mib": 32, "threads": 4, "descriptors": 8}
"""How much more than in its second fifth a run may hold in its last and still count as flat.

Memory: what the allocator keeps of the largest batch so far. 20 KiB lost with each of five answers a second
are more in ten minutes, and so are the features of 300 pictures. Threads and descriptors: a pool that fills
late, and connections that are made anew before the old ones are closed.
"""


@dataclass(frozen=True)
class Reply:
    """One answer: its status (0: the connection broke), text, and tokens with their log-probabilities."""

    status: int
    text: str = ""
    tokens: tuple[tuple[str, float], ...] = ()


def main(argv: list[str]) -> int:
    """Run one measurement."""
    parser = make_parser("vlm bench serve", "Measure the server.")
    parser.add_argument("job", nargs="?", choices=("crossing", "load", "speedup"), default="speedup")
    parser.add_argument("--json", action="store_true", help="no difference: it is always one JSON object")
    parser.add_argument("--adapter", default="default", help="a shipped adapter, a folder or a hub id")
    parser.add_argument("--requests", type=positive, default=500, help="crossing: how many (default: 500)")
    parser.add_argument("--clients", type=positive, default=32, help="clients at once (default: 32)")
    parser.add_argument("--minutes", type=float, default=10, help="load: how long (default: 10)")
    add_common(parser)
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        parser.error("--minutes must be more than 0")
    apply_common(args)
    result, fine = {"crossing": crossing, "load": load, "speedup": speedup}[args.job](args)
    print(json.dumps(result, indent=2))
    return 0 if fine else 1


def request(number: int) -> dict[str, Any]:
    """The chat request of this number: its own picture, question and length."""
    rng = random.Random(number)
    picture = sample_picture(number)
    url = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": rng.choice(QUESTIONS)},
    ]
    return {
        "model": "bench", "messages": [{"role": "user", "content": parts}], "logprobs": True,
        "max_tokens": rng.randint(4, 24), "temperature": 0,
    }  # fmt: skip


def long_request(number: int) -> dict[str, Any]:
    """The request of this number with a prompt that is read in several slices."""
    body = request(number)
    words = random.Random(number).choices(QUESTIONS[0].split(), k=LONG_WORDS)
    body["messages"][0]["content"][1]["text"] = " ".join(words)
    return body


def sample_picture(number: int) -> bytes:
    """A JPEG unlike any other number's: a random part of one of the page's sample pictures."""
    from importlib.resources import files

    from PIL import Image

    rng = random.Random(number)
    folder = files("vlm.serve") / "page" / "samples"
    name = rng.choice(sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".jpg")))
    with Image.open(BytesIO((folder / name).read_bytes())) as image:
        width, height = image.size
        side = rng.randint(120, min(width, height))
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        part = image.crop((left, top, left + side, top + side)).rotate(rng.choice((0, 90, 180, 270)))
        out = BytesIO()
        part.save(out, "JPEG", quality=90)
    return out.getvalue()


@contextmanager
def running_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """`vlm serve` in a process of its own: its address and process id."""
    command = [sys.executable, "-m", "vlm", "serve", "--adapter", args.adapter, "--name", "bench"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--quiet", *common_words(args)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving on "):
            raise VLMError("the server did not start; its own message stands above")
        url = line.removeprefix("serving on ").strip()
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(150)


def ask(client: Any, body: dict[str, Any], retries: int = 1000) -> tuple[Reply, int]:
    """One answer and how many times the server said 429 before it."""
    import httpx

    refused = 0
    try:
        reply = client.post("/v1/chat/completions", json=body)
        while reply.status_code == 429 and refused < retries:
            refused += 1
            time.sleep(float(reply.headers["retry-after"]) * (0.5 + random.random()))
            reply = client.post("/v1/chat/completions", json=body)
    except httpx.TransportError:
        return Reply(0), refused
    if reply.status_code != 200:
        return Reply(reply.status_code), refused
    choice = reply.json()["choices"][0]
    tokens = tuple((token["token"], token["logprob"]) for token in choice["logprobs"]["content"])
    return Reply(200, choice["message"]["content"], tokens), refused


def judge(alone: Reply, together: Reply) -> str:
    """`equal`, `near-tie`, `wrong`, or `lost` for an answer that did not come."""
    if together.status != 200 or alone.status != 200:
        return "lost"
    if alone.text == together.text:
        return "equal"
    for (first, likely), (second, other) in zip(alone.tokens, together.tokens, strict=False):
        if first != second:
            return "near-tie" if abs(likely - other) < NEAR_TIE else "wrong"
    return "wrong"


def _client(url: str) -> Any:
    import httpx

    return httpx.Client(base_url=url, timeout=300)


def _alone(url: str, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
    with _client(url) as client:
        return [ask(client, body)[0] for body in bodies]


def crossing(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Distinct requests, each alone and then many at once."""
    bodies = [request(number) for number in range(args.requests)]
    with running_server(args) as (url, _):
        alone = _alone(url, bodies)
        started = time.monotonic()
        with ThreadPoolExecutor(args.clients) as pool, _client(url) as client:
            together = list(pool.map(lambda body: ask(client, body)[0], bodies))
        seconds = time.monotonic() - started
    verdicts = Counter(judge(one, other) for one, other in zip(alone, together, strict=True))
    result = {"requests": len(bodies), "clients": args.clients, "seconds": round(seconds, 1), **verdicts}
    return result, not verdicts["wrong"] and not verdicts["lost"]


def load(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Many clients for minutes, every answer compared, memory, threads and descriptors sampled."""
    bodies = [*(request(number) for number in range(62)), long_request(62), long_request(63)]
    with running_server(args) as (url, pid):
        alone = _alone(url, bodies)
        samples: list[dict[str, int]] = []
        verdicts: Counter[str] = Counter()
        seconds: list[float] = []
        refused = [0]
        end = time.monotonic() + 60 * args.minutes

        def one_client(number: int) -> None:
            rng = random.Random(number)
            with _client(url) as client:
                while time.monotonic() < end:
                    index = rng.randrange(len(bodies))
                    started = time.monotonic()
                    reply, turned_away = ask(client, bodies[index])
                    seconds.append(time.monotonic() - started)
                    verdicts[judge(alone[index], reply)] += 1
                    refused[0] += turned_away

        threads = [threading.Thread(target=one_client, args=(number,)) for number in range(args.clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            samples.append(_resources(pid))
            time.sleep(60 * args.minutes / SAMPLES)
    ordered, fifths = sorted(seconds), growth(samples)
    grown = growing(fifths)
    for name, more in grown.items():
        print(f"{name} has grown by {more} (flat: at most {FLAT[name]})", file=sys.stderr)
    result = {
        "clients": args.clients, "minutes": args.minutes, "answers": len(seconds), "refused_429": refused[0],
        **verdicts, "answers_per_second": round(len(seconds) / (60 * args.minutes), 2),
        "seconds_median": round(ordered[len(ordered) // 2], 2),
        "seconds_99": round(ordered[int(len(ordered) * 0.99)], 2), **fifths, "flat": not grown,
    }  # fmt: skip
    return result, not verdicts["wrong"] and not verdicts["lost"] and not grown


def _resources(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "rss_mib": int(fields["VmRSS"].split()[0]) // 1024,
        "threads": int(fields["Threads"]),
        "descriptors": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
    }


def growth(samples: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """The highest value of each resource in each fifth of the run."""
    cuts = [len(samples) * fifth // 5 for fifth in range(6)]
    parts = [samples[begin : max(begin + 1, end)] for begin, end in pairwise(cuts)]
    return {name: [max(sample[name] for sample in part) for part in parts] for name in samples[0]}


def growing(fifths: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """What is not `FLAT`, and by how much its last fifth is above the second; the first one warms up."""
    grown = {name: highest[-1] - highest[1] for name, highest in fifths.items()}
    return {name: more for name, more in grown.items() if more > FLAT[name]}


def speedup(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """16 one-image questions of exactly 64 new tokens, one after another and then through the server."""
    import socket

    import torch
    import uvicorn

    from vlm.model import VLM
    from vlm.serve.main import build
    from vlm.serve.settings import Settings

    model = VLM.from_pretrained(args.adapter, device=args.device, dtype=args.dtype, offline=args.offline)
    model.pack()  # as everything that answers more than one question does
    # The end of the answer is never chosen, so that both ways write 64 tokens.
    model.language.added_ids = (*model.language.added_ids, model.language.frame.end)
    pictures = [sample_picture(number) for number in range(16)]
    model.ask([pictures[0]], QUESTIONS[0], max_new_tokens=4)
    started = time.monotonic()
    alone = [model.ask([picture], QUESTIONS[0], max_new_tokens=64).text for picture in pictures]
    one_by_one = time.monotonic() - started

    listener = socket.create_server(("127.0.0.1", 0))
    app = build(model, Settings(), None, model_id="bench")
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    bodies = [{**request(number), "max_tokens": 64} for number in range(16)]
    for body in bodies:
        body["messages"][0]["content"][1]["text"] = QUESTIONS[0]
    with _client(url) as client, ThreadPoolExecutor(16) as pool:
        client.get("/ready").raise_for_status()
        started = time.monotonic()
        together = list(pool.map(lambda body: ask(client, body)[0].text, bodies))
        at_once = time.monotonic() - started
    server.should_exit = True
    thread.join()
    same = sum(one == other.strip() for one, other in zip(alone, together, strict=True))
    result = {
        "threads": torch.get_num_threads(),
        "one_by_one_seconds": round(one_by_one, 2), "at_once_seconds": round(at_once, 2),
        "times_sooner": round(one_by_one / at_once, 2), "equal_answers": same,
    }  # fmt: skip
    return result, one_by_one / at_once >= LEAST_SPEEDUP
