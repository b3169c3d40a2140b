"""Requests made from the OpenAPI schema itself: no 5xx, no undocumented status, on every route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 15
ROUTES = {
    "GET /health", "GET /ready", "GET /metrics", "GET /v1/models", "GET /v1/models/{model}", "GET /v1/page",
    "POST /v1/chat/completions", "POST /v1/attention", "POST /v1/feedback",
}  # fmt: skip


def short(case: Any) -> None:
    """Keep what the model is asked to write short, and name the model, or nothing gets past its name."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(case.body.get(name), int) and case.body[name] > 2:
                case.body[name] = 2
        if isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2:
            case.body["model"] = "model"


def check_every_route(server: Any, headers: dict[str, str]) -> None:
    """Requests that fit the schema, and requests that do not, for every route."""
    document = httpx.get(f"{server.url}/openapi.json", headers=server.headers).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    visited = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        visited.add(f"{operation.method.upper()} {operation.path}")
        for mode in GenerationMode:
            if mode is GenerationMode.POSITIVE or operation.body:
                send(operation.as_strategy(generation_mode=mode), headers)
    assert visited == ROUTES


def send(cases: Any, headers: dict[str, str]) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=cases)
    def check(case: Any) -> None:
        short(case)
        case.validate_response(case.call(headers=headers, timeout=120), checks=CHECKS)

    check()


def test_without_keys(server: Any) -> None:
    check_every_route(server, {})


@pytest.fixture(scope="module")
def locked(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vlm.serve.keys import add_key

    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    key = add_key(path, "schema")
    return start("--api-key-file", str(path), key=key)


def test_with_a_key(locked: Any) -> None:
    check_every_route(locked, locked.headers)


def test_without_the_key(locked: Any) -> None:
    check_every_route(locked, {})
