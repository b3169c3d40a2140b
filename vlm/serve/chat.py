"""`/v1/chat/completions`: tickets into an answer or a stream, and what happens when somebody leaves."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from vlm.config import GenerationConfig
from vlm.serve.engine import Engine, Piece, Place, Ticket
from vlm.serve.errors import APIError
from vlm.serve.pictures import Desk, Question
from vlm.serve.schemas import (
    AnswerMessage,
    AttentionMaps,
    AttentionRequest,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChoiceLogprobs,
    TokenLogprob,
    Usage,
    refuse_unsupported,
)
from vlm.serve.settings import Settings

T = TypeVar("T")
_GRACE = 30.0
"""Seconds that a slow reader gets after the deadline."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` until it ends or the client hangs up, which cancels it.

    Raises:
        ClientGone: the client hung up first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def generations(chat: ChatRequest, question: Question, settings: Settings) -> list[GenerationConfig]:
    """How each of the `n` answers is decoded; lengths are cut to what the context leaves."""
    asked = chat.max_completion_tokens or chat.max_tokens or settings.default_new_tokens
    room = settings.context - question.prompt_tokens
    config = GenerationConfig(
        max_new_tokens=min(asked, room, settings.max_new_tokens),
        # OpenAI's default is 1; this model is at its best when greedy, so nothing said means 0.
        temperature=chat.temperature or 0.0,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        stop=chat.stops(),
    )
    seed = secrets.randbits(48) if chat.seed is None else chat.seed % 2**48
    return [replace(config, seed=seed + number) for number in range(chat.n or 1)]


class Conversing:
    """Answers chat requests with one engine."""

    def __init__(self, engine: Engine, desk: Desk, settings: Settings, model_id: str) -> None:
        self._engine = engine
        self._desk = desk
        self._settings = settings
        self.model_id = model_id

    def check(self, chat: ChatRequest) -> None:
        """Refuse what can be refused before anything is opened.

        Raises:
            APIError: 404 `model_not_found`, 400 `unsupported_parameter`.
        """
        self._check_model(chat.model)
        refuse_unsupported(chat)

    def _check_model(self, name: str) -> None:
        if name != self.model_id:
            message = f"This server has no model of that name; it serves {self.model_id!r}."
            raise APIError(404, message, code="model_not_found", param="model")

    async def respond(
        self, chat: ChatRequest, receive: Receive, opened: Callable[[], None] = lambda: None
    ) -> Response:
        """The whole answer, or a stream whose first piece is there; `opened` is called once the pictures are.

        Raises:
            APIError: anything that the client is told with a status.
            ClientGone: the client hung up.
        """
        self.check(chat)
        place = self._engine.admit(chat.n or 1)
        try:
            head = await while_connected(receive, self._begin(chat, place, opened))
        except BaseException:
            place.__exit__(None, None, None)
            raise
        if isinstance(head, Response):
            place.__exit__(None, None, None)
            return head
        return EventStream(head, place, seconds=self._settings.deadline + _GRACE)

    async def look(self, asked: AttentionRequest, receive: Receive) -> AttentionMaps:
        """Where an answer came from.

        Raises:
            APIError: as `respond`.
            ClientGone: the client hung up.
        """
        self._check_model(asked.model)
        with self._engine.admit(1) as place:
            return await while_connected(receive, self._look(asked, place))

    async def _look(self, asked: AttentionRequest, place: Place) -> AttentionMaps:
        from vlm.serve.attention import where_it_looked

        async with _until(place.deadline):
            question = await self._desk.question(asked.messages, asked.answer)
            if question.prompt_tokens > (most := self._settings.attention_tokens):
                message = f"The conversation and its answer have {question.prompt_tokens} tokens; "
                message += f"where an answer came from is told of at most {most}."
                raise APIError(400, message, code="context_length_exceeded", param="messages")
            return AttentionMaps(
                images=await self._engine.run(lambda: where_it_looked(self._engine.model, question))
            )

    async def _begin(
        self, chat: ChatRequest, place: Place, opened: Callable[[], None]
    ) -> Response | AsyncIterator[bytes]:
        async with _until(place.deadline):
            question = await self._desk.question(chat.messages)
        opened()
        tickets = place.submit(question, generations(chat, question, self._settings))
        if chat.stream:
            stream = _frames(chat, tickets, self.model_id)
            return _chained(await anext(stream), stream)
        answer = await _collect(chat, tickets, self.model_id)
        return JSONResponse(answer.model_dump())


class EventStream(Response):
    """Server-sent events; the client's leaving ends them, and they end by themselves after a while."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], place: Place, *, seconds: float) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._place = place
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            try:
                async with asyncio.timeout(self._seconds):
                    await while_connected(receive, self._send_all(send))
            except (ClientGone, TimeoutError):
                return  # nobody reads: what is sent now goes nowhere, and the place is free again

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def _until(deadline: float) -> AsyncIterator[None]:
    """Ends what is inside at a point of the monotonic clock.

    Raises:
        APIError: 504.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            yield
    except TimeoutError:
        raise APIError(504, "The answer was not ready before the server's deadline.") from None


def _frame(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for frame in rest:
        yield frame


async def _merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several answers, in the order they come."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def pump(index: int, ticket: Ticket) -> None:
        try:
            async for piece in ticket:
                queue.put_nowait((index, piece))
            queue.put_nowait(None)
        except APIError as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


def _logprob(token: bytes, piece: Piece) -> TokenLogprob:
    """One token; bytes that are no text by themselves are written as OpenAI writes them, `\\xf0\\x9f`."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        text = "".join(f"\\x{byte:02x}" for byte in token)
    return TokenLogprob(token=text, logprob=piece.logprob, bytes=list(token))


async def _collect(chat: ChatRequest, tickets: Sequence[Ticket], model_id: str) -> ChatCompletion:
    pieces: list[list[Piece]] = [[] for _ in tickets]
    async for index, piece in _merged(tickets):
        pieces[index].append(piece)
    choices = [
        Choice(
            index=index,
            message=AnswerMessage(content="".join(piece.text for piece in answer)),
            logprobs=ChoiceLogprobs(content=[_logprob(p.token, p) for p in answer if p.token is not None])
            if chat.logprobs
            else None,
            finish_reason=answer[-1].finish_reason or "stop",
        )
        for index, answer in enumerate(pieces)
    ]
    usage = _usage(tickets, sum(map(len, pieces)))
    return ChatCompletion(
        id=_new_id(), created=int(time.time()), model=model_id, choices=choices, usage=usage
    )


def _usage(tickets: Sequence[Ticket], completion: int) -> Usage:
    prompt = tickets[0].question.prompt_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _new_id() -> str:
    return "chatcmpl-" + secrets.token_hex(12)


async def _frames(chat: ChatRequest, tickets: Sequence[Ticket], model_id: str) -> AsyncIterator[bytes]:
    """The stream's frames. An error before the first piece is raised; after it, it becomes the last frame."""
    head = {
        "id": _new_id(),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model_id,
    }
    with_usage = bool(chat.stream_options and chat.stream_options.include_usage)
    tail = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: dict[str, Any], piece: Piece | None = None) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if piece is not None:
            choice["finish_reason"] = piece.finish_reason
            if chat.logprobs and piece.token is not None:
                entry = _logprob(piece.token, piece).model_dump()
                choice["logprobs"] = {"content": [entry], "refusal": None}
        return _frame({**head, "choices": [choice], **tail})

    counted = 0
    begun: set[int] = set()
    try:
        async for index, piece in _merged(tickets):
            counted += 1
            if index not in begun:
                begun.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if piece.text or piece.finish_reason or chat.logprobs:
                yield chunk(index, {"content": piece.text} if piece.text else {}, piece)
    except APIError as error:
        if not begun:
            raise
        yield _frame(error.body())
        return
    if with_usage:
        yield _frame({**head, "choices": [], "usage": _usage(tickets, counted).model_dump()})
    yield b"data: [DONE]\n\n"
