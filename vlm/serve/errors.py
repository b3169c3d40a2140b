"""Every refusal in the shape that OpenAI's clients read: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import http
import json
from collections.abc import Mapping
from typing import Any

CODES = {
    400: "bad_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_request",
    429: "server_overloaded",
    500: "internal_error",
    503: "not_ready",
    504: "deadline_exceeded",
}


class APIError(Exception):
    """A refusal with a status, a string code that programs can match and a sentence for people."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or CODES.get(status, "error")
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        return error_body(self.status, self.message, code=self.code, param=self.param)


def error_type(status: int) -> str:
    """OpenAI's coarse class of an error."""
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape; `code` defaults to the status's usual one."""
    found = code or CODES.get(status) or http.HTTPStatus(status).name.lower()
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": found}}


def error_bytes(error: APIError) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """Body and headers for the places below the framework, where bytes are all there is."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    return body, [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def overloaded(waiting: int, slots: int) -> APIError:
    """429 with a pause that grows with the queue, 1 to 5 seconds."""
    pause = max(1, min(5, 1 + waiting // max(1, slots)))
    message = "The server has as many requests as it can hold; try again shortly."
    return APIError(429, message, headers={"retry-after": str(pause)})
