"""The API as programs use it: the official client, over real sockets, against the real model."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["model"]
    assert client.models.retrieve("model").object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_a_whole_answer(client: Any, make: Any) -> None:
    answer = client.chat.completions.create(
        model="model",
        messages=[make.user("What is it?", make.url(1))],
        max_completion_tokens=6,
        logprobs=True,
    )
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens).strip() == choice.message.content.strip()
    assert all(token.logprob <= 0 and math.isfinite(token.logprob) for token in tokens)


def test_a_stream_says_what_the_whole_answer_says(client: Any, make: Any) -> None:
    request = {"model": "model", "messages": [make.user("What is it?", make.url(1))], "max_tokens": 8}
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_no_usage_unless_asked(client: Any) -> None:
    chunks = client.chat.completions.create(
        model="model", messages=[{"role": "user", "content": "Hello"}], max_tokens=2, stream=True
    )
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_pictures_change_the_answer(server: Any, make: Any) -> None:
    def logprobs(seed: int) -> list[float]:
        reply = server.chat(messages=[make.user("What is it?", make.url(seed))], logprobs=True).json()
        return [token["logprob"] for token in reply["choices"][0]["logprobs"]["content"]]

    assert logprobs(1) == pytest.approx(logprobs(1), abs=1e-3)
    assert logprobs(1) != pytest.approx(logprobs(2), abs=1e-3)


def test_several_pictures_and_turns(client: Any, make: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        make.user("Compare them.", make.url(1), make.url(2)),
        {"role": "assistant", "content": "They differ."},
        make.user("How?", make.url(3)),
    ]
    answer = client.chat.completions.create(model="model", messages=messages, max_tokens=4)
    assert answer.usage.prompt_tokens > 20


def test_n_answers_with_seeds(client: Any, make: Any) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.chat.completions.create(
            model="model", messages=[make.user("Tell me a story.", make.url(1))],
            n=3, temperature=1.5, seed=seed, max_tokens=8,
        )  # fmt: skip
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = texts(11)
    assert len(set(first)) > 1
    assert texts(11) == first
    assert texts(12) != first


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: Any, make: Any) -> None:
    request = {"model": "model", "messages": [make.user("Describe it.", make.url(5))], "max_tokens": 12}
    text = client.chat.completions.create(**request).choices[0].message.content
    stop = text.split()[2]
    stopped = client.chat.completions.create(**request, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)].strip()
    assert stopped.finish_reason == "stop"


def test_typed_special_tokens_stay_text(server: Any) -> None:
    plain = server.chat(messages=[{"role": "user", "content": "x"}], max_tokens=1).json()["usage"]
    typed = server.chat(messages=[{"role": "user", "content": "<|im_end|><image>"}], max_tokens=1).json()[
        "usage"
    ]
    assert typed["prompt_tokens"] - plain["prompt_tokens"] > 4


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"messages": []}, 422, "invalid_request"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 422, "invalid_request"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, "context_length_exceeded"),
        ({"temperature": 3}, 422, "invalid_request"),
        ({"temperature": "1"}, 422, "invalid_request"),
        ({"n": 0}, 422, "invalid_request"),
        ({"n": 99}, 422, "invalid_request"),
        ({"max_tokens": 0}, 422, "invalid_request"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter"),
        ({"frequency_penalty": 1}, 400, "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter"),
        ({"function_call": {"name": "f"}}, 400, "unsupported_parameter"),
        ({"web_search_options": {}}, 400, "unsupported_parameter"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, 400, "unsupported_parameter"),
        ({"prediction": {"type": "content", "content": "x"}}, 400, "unsupported_parameter"),
        ({"reasoning_effort": "high"}, 400, "unsupported_parameter"),
        ({"verbosity": "low"}, 400, "unsupported_parameter"),
    ],
)
def test_refusals(server: Any, change: dict[str, Any], status: int, code: str) -> None:
    reply = server.chat(**{"messages": [{"role": "user", "content": "x"}], **change})
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"].startswith("req-")


def test_what_leaves_the_answer_as_it_is_is_taken(server: Any, make: Any) -> None:
    message = make.user("What is it?", make.url(1))
    for detail in ("auto", "low", "high", "original"):
        message["content"][0]["image_url"]["detail"] = detail
        neutral = {"function_call": "none", "tool_choice": "auto", "reasoning_effort": "none"}
        neutral |= {"verbosity": "medium", "prediction": None, "audio": None, "user": "me", "store": False}
        assert server.chat(messages=[message], max_tokens=1, **neutral).status_code == 200


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,aGVsbG8=", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64,%%%", "invalid_image"),
        ("data:image/png,plain", "invalid_image"),
        ("data:,", "invalid_image"),
        ("https://example.com/cat.jpg", "image_url_not_allowed"),
        ("http://127.0.0.1/cat.jpg", "image_url_not_allowed"),
        ("file:///etc/passwd", "image_url_not_allowed"),
        ("/etc/passwd", "image_url_not_allowed"),
    ],
)
def test_bad_pictures(server: Any, make: Any, url: str, code: str) -> None:
    reply = server.chat(messages=[make.user("What is it?", url)])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)
    assert "passwd" not in reply.text


def test_too_many_pictures(server: Any, make: Any) -> None:
    reply = server.chat(messages=[make.user("How many?", *[make.url(1)] * 9)])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_json"),
        (b"\xff\xfe", {}, 400, "invalid_json"),
        (b'{"model": "\\ud800"}', {}, 400, "invalid_json"),
        (b"[" * 40_000, {}, 400, "invalid_json"),
        (b"[" * 100_000, {}, 400, "invalid_json"),
        (b"[" + b"{}," * 100_000 + b"{}]", {}, 400, "invalid_json"),
        (b"null", {}, 422, "invalid_request"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (b"", {}, 400, "invalid_json"),
    ],
    ids=["cut", "no-utf8", "surrogate", "deep", "deeper", "wide", "null", "text", "empty"],
)
def test_bad_bodies(server: Any, content: bytes, headers: dict[str, str], status: int, code: str) -> None:
    reply = httpx.post(
        f"{server.url}/v1/chat/completions", content=content,
        headers={"Content-Type": "application/json", **headers},
    )  # fmt: skip
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("POST", "/nothing", 404), ("DELETE", "/health", 405),
     ("GET", "/v1/chat/completions", 405), ("OPTIONS", "/v1/models", 405), ("GET", "/page/../main.py", 404),
     ("GET", "/page/%2e%2e/main.py", 404), ("GET", "//health", 404), ("BREW", "/health", 405)],
)  # fmt: skip
def test_every_status_has_the_shape(server: Any, method: str, path: str, status: int) -> None:
    reply = httpx.request(method, server.url + path)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_health_ready_metrics_schema(server: Any) -> None:
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path).json() == {"status": "ok"}
    metrics = httpx.get(f"{server.url}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'route="/v1/chat/completions"' in metrics.text
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert "ChatRequest" in schema["components"]["schemas"]


def test_a_foreign_host_name_is_refused(server: Any) -> None:
    reply = httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")
    assert "access-control-allow-origin" not in reply.headers


def test_where_an_answer_came_from(server: Any, make: Any) -> None:
    body = {
        "model": "model",
        "messages": [make.user("What?", make.url(1), make.url(2))],
        "answer": "a red square",
    }
    reply = httpx.post(f"{server.url}/v1/attention", json=body, timeout=60)
    maps = reply.json()["images"]
    assert [len(one["values"]) for one in maps] == [one["rows"] * one["columns"] for one in maps]
    assert len(maps) == 2 and maps[0]["values"] != maps[1]["values"]
    for one in maps:
        assert sum(one["values"]) == pytest.approx(1)
        assert min(one["values"]) >= 0 and max(one["values"]) > 2 / len(one["values"])
    assert httpx.post(f"{server.url}/v1/attention", json={**body, "model": "x"}).status_code == 404
    assert httpx.post(f"{server.url}/v1/attention", json={**body, "answer": ""}).status_code == 422


def waits_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_frees_the_slot_within_a_second(server: Any, make: Any, stream: bool) -> None:
    body = json.dumps(
        {"model": "model", "messages": [make.user("Tell a long story.", make.url(3))], "max_tokens": 1000,
         "temperature": 2, "stream": stream}
    ).encode()  # fmt: skip
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert waits_for(lambda: server.metric("vlm_answers_running ") == 1, 20)
    assert waits_for(lambda: server.metric("vlm_answers_running ") == 0, 1.0)


def test_strangers_in_one_batch_get_their_own_answers(server: Any, make: Any) -> None:
    def ask(seed: int) -> tuple[str, list[float]]:
        request = {
            "messages": [make.user(f"Question {seed % 5}?", make.url(seed))],
            "max_tokens": 3 + seed % 4,
        }
        (choice,) = server.chat(**request, logprobs=True).json()["choices"]
        return choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]

    seeds = range(100, 112)
    alone = [ask(seed) for seed in seeds]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, seeds))
    for (text, numbers), (other, others) in zip(alone, together, strict=True):
        assert text == other
        assert numbers == pytest.approx(others, abs=2e-3)
