"""The engine behind the real routes, with tiny models: many strangers at once, and failures inside."""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

pytest.importorskip("fastapi")

from vlm.bench import serve as bench
from vlm.bench.serve import FLAT, Reply, growing, growth, judge
from vlm.bench.serve import ask as ask_patiently

if TYPE_CHECKING:
    from vlm.model import VLM

STRANGERS = 500
WORDS = ("a", "dog", "runs", "on", "the", "grass", "while", "man", "in", "red", "shirt", "water")


def stranger(number: int, make: Any) -> dict[str, Any]:
    """The request of this number: pictures, words and length of its own; some have several turns."""
    dice = random.Random(number)
    urls = [make.url(number + STRANGERS * place) for place in range(dice.choice((1, 1, 1, 2, 3)))]
    messages = [make.user(" ".join(dice.choices(WORDS, k=dice.randint(1, 12))), *urls)]
    if dice.random() < 0.3:
        messages += [{"role": "assistant", "content": dice.choice(WORDS)}, make.user(dice.choice(WORDS))]
    return {"model": "model", "messages": messages, "logprobs": True, "max_tokens": dice.randint(2, 8)}


@pytest.mark.slow
def test_500_strangers_at_once_get_the_answers_that_they_get_alone(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any
) -> None:
    requests = [stranger(number, make) for number in range(STRANGERS)]
    with served(make_tiny()) as client:
        alone = [ask_patiently(client, request)[0] for request in requests]
        with ThreadPoolExecutor(48) as pool:
            together = list(pool.map(lambda request: ask_patiently(client, request)[0], requests))
    verdicts = Counter(map(judge, alone, together))
    assert verdicts["wrong"] == verdicts["lost"] == 0
    assert verdicts["equal"] >= STRANGERS - 5  # the rest are near ties
    # Had answers been swapped, it would have been seen: hardly two are alike.
    assert len({reply.tokens for reply in alone}) > STRANGERS * 0.95


def test_a_judge_that_tells_them_apart() -> None:
    said = Reply(200, "ab", (("a", -1.0), ("b", -0.5)))
    assert judge(said, said) == "equal"
    assert judge(said, Reply(200, "ac", (("a", -1.0), ("c", -0.5004)))) == "near-tie"
    assert judge(said, Reply(200, "ac", (("a", -1.0), ("c", -0.6)))) == "wrong"
    assert judge(said, Reply(500)) == "lost"


@pytest.mark.parametrize(("name", "allowed"), FLAT.items())
def test_growth_from_the_second_fifth_to_the_last(name: str, allowed: int) -> None:
    steady = {"rss_mib": 900, "threads": 20, "descriptors": 60}
    base = steady[name]

    def grown(*levels: int, count: int = 21) -> dict[str, int]:
        """Of a run whose fifths end with these values, and hold less before."""
        samples = [{**steady, name: base - 9}] * (count - 1)
        return growing(growth([s for level in levels for s in (*samples, {**steady, name: level})]))

    assert grown(base - 5, base, base, base, base) == {}
    assert grown(base, base, base, base, base + allowed) == {}
    assert grown(base, base, base, base, base + allowed + 1) == {name: allowed + 1}
    # What warms up in the first fifth, and what is given back, is no growth.
    assert grown(0, base, base + 999, base + 999, base) == {}
    assert grown(0, base, base, base, base + 999) == {name: 999}
    assert grown(0, base, base, base, base + 999, count=1) == {name: 999}


def test_fifths_hold_every_sample() -> None:
    for count in range(1, 23):
        fifths = growth([{"threads": number} for number in range(count)])["threads"]
        assert len(fifths) == 5
        assert fifths == sorted(fifths)
        assert fifths[-1] == count - 1


def test_a_load_on_a_server_that_forgets_to_close_files_fails(
    make_tiny: Callable[..., VLM],
    served: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left: list[int] = []

    @contextmanager
    def leaking(_: argparse.Namespace) -> Iterator[tuple[str, int]]:
        with served(make_tiny()) as client:
            ended = threading.Event()

            def leak() -> None:
                while not ended.wait(0.02):
                    left.append(os.open(os.devnull, os.O_RDONLY))

            thread = threading.Thread(target=leak)
            thread.start()
            try:
                yield str(client.base_url), os.getpid()
            finally:
                ended.set()
                thread.join()

    honest = bench.request
    monkeypatch.setattr(bench, "LONG_WORDS", 20)
    monkeypatch.setattr(bench, "running_server", leaking)
    monkeypatch.setattr(bench, "request", lambda number: {**honest(number), "model": "model"})
    try:
        result, fine = bench.load(argparse.Namespace(clients=4, minutes=0.05))
    finally:
        for file in left:
            os.close(file)
    assert not fine
    assert result["flat"] is False
    assert result["descriptors"][-1] - result["descriptors"][1] > FLAT["descriptors"]
    assert "descriptors has grown by" in capsys.readouterr().err
    assert result["answers"] == result["equal"] + result.get("near-tie", 0) > 0


@pytest.fixture(scope="module")
def client(make_tiny: Callable[..., VLM], served: Callable[..., Any]) -> Iterator[httpx.Client]:
    """A tiny model's server, for requests that leave it as it was."""
    with served(make_tiny()) as client:
        yield client


def chat(make: Any, **more: Any) -> dict[str, Any]:
    return {"model": "model", "messages": [make.user("What?", make.url(1))], "max_tokens": 8, **more}


def frames(text: str) -> list[Any]:
    """The events of a stream; "[DONE]" stays a word."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def test_a_stream_has_the_log_probabilities_of_the_whole_answer(
    tiny_model: VLM, served: Callable[..., Any], make: Any
) -> None:
    with served(tiny_model) as client:
        asked = chat(make, logprobs=True, n=2, temperature=1.0, top_p=0.9, seed=5)
        whole = client.post("/v1/chat/completions", json=asked).json()
        reply = client.post("/v1/chat/completions", json={**asked, "stream": True})
    *chunks, done = frames(reply.text)
    assert done == "[DONE]"
    told: dict[int, list[Any]] = {0: [], 1: []}
    ends: dict[int, str] = {}
    for (choice,) in (chunk["choices"] for chunk in chunks):
        told[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    for choice in whole["choices"]:
        assert told[choice["index"]] == choice["logprobs"]["content"]
        assert ends[choice["index"]] == choice["finish_reason"]


def test_every_token_has_its_own_bytes(client: httpx.Client) -> None:
    """Warm enough to write halves of characters, which are no text by themselves."""
    body = {"model": "model", "messages": [{"role": "user", "content": "😀😀 猫 Ω"}], "logprobs": True}
    body |= {"temperature": 2, "seed": 5, "max_tokens": 24}
    reply = client.post("/v1/chat/completions", json=body).json()
    choice = reply["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == reply["usage"]["completion_tokens"] - (choice["finish_reason"] == "stop")
    spelled = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert spelled.decode(errors="replace").strip() == choice["message"]["content"]
    halves = [entry for entry in entries if entry["token"].startswith("\\x")]
    assert halves
    for entry in entries:
        if entry in halves:
            assert entry["token"] == "".join(f"\\x{byte:02x}" for byte in entry["bytes"])
        else:
            assert entry["token"].encode() == bytes(entry["bytes"])


LONG = "a dog runs on the grass while the man in the red shirt is standing " * 7
"""More than a hundred tokens of the tiny vocabulary, of which it can read 256."""


def test_prompts_of_many_slices_are_answered_as_alone(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [LONG, "What?", LONG[:300], "a", LONG[5:200], "on the grass"]
    bodies = [
        {**chat(make, logprobs=True), "messages": [make.user(text, make.url(number))]}
        for number, text in enumerate(texts)
    ]
    with served(make_tiny()) as client:
        alone = [ask_patiently(client, body)[0] for body in bodies]
        monkeypatch.setattr("vlm.serve.engine.SLICE", 16)
        with ThreadPoolExecutor(len(bodies)) as pool:
            together = list(pool.map(lambda body: ask_patiently(client, body)[0], bodies * 3))
    assert Counter(map(judge, alone * 3, together)).keys() <= {"equal", "near-tie"}


def test_a_long_prompt_holds_nobody_up_and_is_dropped_with_its_client(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model that takes 20 ms a token: the long prompt takes seconds, a slice a third of one."""
    model = make_tiny()
    monkeypatch.setattr("vlm.serve.engine.SLICE", 16)

    def slow(_: object, args: Any, kwargs: Any) -> None:
        time.sleep(0.02 * (args[0] if args else kwargs["hidden_states"]).shape[1])

    def running() -> int:
        lines = client.get("/metrics").text.splitlines()
        return int(float(next(line for line in lines if line.startswith("vlm_answers_running ")).split()[1]))

    long = {"model": "model", "messages": [{"role": "user", "content": LONG}], "max_tokens": 2}
    with served(model) as client:
        hook = model.language.layers[0].register_forward_pre_hook(slow, with_kwargs=True)
        with ThreadPoolExecutor(1) as pool:
            started = time.monotonic()
            whole = pool.submit(client.post, "/v1/chat/completions", json=long)
            time.sleep(0.2)
            short = client.post("/v1/chat/completions", json={**chat(make), "max_tokens": 2})
            assert short.status_code == 200 and not whole.done()
            assert whole.result().status_code == 200
        assert time.monotonic() - started > 2
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=long, timeout=0.5)
        end = time.monotonic() + 1
        while running() and time.monotonic() < end:
            time.sleep(0.02)
        assert running() == 0
        hook.remove()


def test_grounds_are_told_of_so_many_tokens(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any
) -> None:
    from vlm.serve.settings import Settings

    body = {"model": "model", "messages": [make.user("What?", make.url(1))], "answer": "a dog"}
    with served(make_tiny(), Settings(attention_tokens=64)) as client:
        assert client.post("/v1/attention", json=body).status_code == 200
        refused = client.post("/v1/attention", json={**body, "answer": "a dog runs " * 30})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_narrow_nucleus_is_greedy(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any
) -> None:
    def said(**more: Any) -> str:
        reply = client.post("/v1/chat/completions", json=chat(make, seed=1, **more)).json()
        return str(reply["choices"][0]["message"]["content"])

    with served(make_tiny()) as client:
        greedy = said(temperature=0)
        assert said(temperature=2, top_p=1e-6) == greedy
        assert said(temperature=2) != greedy


def failing_after(model: VLM, steps: int) -> Any:
    """From the given call on, the language model's last layer fails as a device that gave up would."""
    calls = [0]

    def fail(*_: object) -> None:
        calls[0] += 1
        if calls[0] > steps:
            raise RuntimeError("zebrafish-7231")

    return model.language.layers[-1].register_forward_pre_hook(fail)


def test_a_failure_in_mid_stream_is_an_error_frame_and_the_next_is_answered(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any
) -> None:
    model = make_tiny()
    with served(model) as client:
        whole = client.post("/v1/chat/completions", json=chat(make)).json()["choices"][0]["message"]
        hook = failing_after(model, 3)
        broken = client.post("/v1/chat/completions", json=chat(make, stream=True))
        hook.remove()
        assert broken.status_code == 200
        *said, last = frames(broken.text)
        assert said and all("choices" in frame for frame in said)
        assert last["error"]["code"] == "internal_error" and last["error"]["type"] == "server_error"
        hook = failing_after(model, 0)
        refused = client.post("/v1/chat/completions", json=chat(make))
        hook.remove()
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "internal_error")
        assert "zebrafish" not in broken.text + refused.text
        again = client.post("/v1/chat/completions", json=chat(make)).json()["choices"][0]["message"]
        assert again == whole


REFUSAL = {"type": "refusal", "refusal": "No."}


@pytest.mark.parametrize(
    "nothing",
    [{"content": ""}, {"content": None}, {"content": " \n"}, {"content": [{"type": "text", "text": ""}]},
     {"content": []}, {"content": [REFUSAL]}, {"content": None, "refusal": "No."}, {}],
)  # fmt: skip
def test_an_answer_of_no_words_is_passed_over(
    client: httpx.Client, make: Any, nothing: dict[str, Any]
) -> None:
    first, second = make.user("What?", make.url(1)), make.user("And now?")
    empty = {"role": "assistant", **nothing}
    asked = {"model": "model", "max_tokens": 4}
    plain, passed = (
        client.post("/v1/chat/completions", json={**asked, "messages": messages})
        for messages in ([first, second], [first, empty, second, empty])
    )
    assert passed.status_code == 200
    assert passed.json()["choices"] == plain.json()["choices"]
    assert passed.json()["usage"] == plain.json()["usage"]


USER: dict[str, Any] = {"role": "user"}


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": "https://x"}]}]},
         "messages.0.content.0.image_url", "object"),
        ({"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": ""}}]}]},
         "messages.0.content.0.image_url.url", "at least 1 character"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": "x"}, {"type": "input_audio"}]}]},
         "messages.0.content.1", "text or image_url"),
        ({"messages": [{**USER, "content": [{"text": "x"}]}]}, "messages.0.content.0", "text or image_url"),
        ({"messages": [{**USER, "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
        ({"messages": [{**USER, "content": None}]}, "messages.0.content", "text or a list of parts"),
        ({"messages": [{**USER, "content": []}]}, "messages.0.content", "at least 1 item"),
        ({"messages": [USER]}, "messages.0.content", "text or a list of parts"),
        ({"messages": [{**USER, "content": [REFUSAL]}]}, "messages.0.content", "Only an assistant's"),
        ({"messages": [{"role": "text", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"stop": list("abcde")}, "stop", "at most 4 items"),
        ({"stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ],
)  # fmt: skip
def test_a_complaint_is_about_what_is_wrong(
    client: httpx.Client, change: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": "model", "messages": [{**USER, "content": "x"}], **change}
    reply = client.post("/v1/chat/completions", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (422, "invalid_request", param)
    assert error["message"].startswith(f"{param}: ") and said in error["message"]


def test_an_engine_that_stands_still_is_503(
    make_tiny: Callable[..., VLM], served: Callable[..., Any], make: Any
) -> None:
    with served(make_tiny(), started=False) as client:
        assert client.get("/health").status_code == 200
        for reply in (client.get("/ready"), client.post("/v1/chat/completions", json=chat(make))):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
