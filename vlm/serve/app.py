"""The routes. `create_app` puts the layers together; `main` runs it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from vlm import __version__
from vlm.images import Limits
from vlm.serve.chat import ClientGone, Conversing, while_connected
from vlm.serve.errors import APIError, error_body
from vlm.serve.feedback import FeedbackFull, FeedbackStore
from vlm.serve.gate import Gate
from vlm.serve.limits import BodyLimit
from vlm.serve.metrics import CONTENT_TYPE, Metrics
from vlm.serve.schemas import (
    AttentionMaps,
    AttentionRequest,
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    FeedbackRequest,
    FeedbackStored,
    ModelCard,
    ModelList,
    PageConfig,
    Status,
)
from vlm.serve.static import page_routes

if TYPE_CHECKING:
    from vlm.serve.engine import Engine
    from vlm.serve.keys import Keys
    from vlm.serve.pictures import Desk
    from vlm.serve.settings import Settings

M = TypeVar("M", bound=BaseModel)
_ANYWHERE = (400, 401, 403, 405, 408, 429, 500)  # 400 and 408: what is no HTTP, or comes too slowly
_WITH_BODY = (413, 415, 422)
_PART_TYPE = "The type of a part should be text or image_url"


def create_app(
    engine: Engine, desk: Desk, *, settings: Settings, keys: Keys | None, metrics: Metrics, model_id: str
) -> Any:
    """The whole server as an ASGI application; starts and stops the engine with its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        desk.close()

    app = FastAPI(
        title="vlm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan,
        description="Questions about pictures, in OpenAI's format.", redirect_slashes=False,
    )  # fmt: skip
    bounds = (settings.feedback_entries, settings.feedback_bytes)
    store = (
        FeedbackStore(settings.feedback, max_entries=bounds[0], max_bytes=bounds[1])
        if settings.feedback
        else None
    )
    conversing = Conversing(engine, desk, settings, model_id)
    _add_status(app, engine, metrics)
    _add_models(app, model_id, settings, store is not None)
    _add_chat(app, conversing, settings)
    _add_feedback(app, store, desk, settings)
    _add_errors(app)
    page = page_routes()
    app.router.routes.extend(page)
    app.openapi = _schema(app, keys is not None)  # type: ignore[method-assign]
    open_paths = ["/health", *(route.path for route in page)]
    limited = BodyLimit(app, settings)
    return Gate(limited, settings=settings, keys=keys, metrics=metrics, open_paths=open_paths)


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in sorted({*statuses, *_ANYWHERE})}


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _schema(app: FastAPI, locked: bool) -> Callable[[], dict[str, Any]]:
    """OpenAPI with the request bodies, which are parsed by hand (see `_parse`)."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, bodies = models_json_schema(
                [(body, "validation") for body in (ChatRequest, FeedbackRequest, AttentionRequest)],
                ref_template="#/components/schemas/{model}",
            )
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(bodies["$defs"])
            if locked:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi


async def _parse(request: Request, model: type[M], settings: Settings) -> M:
    """The body as a model; its bytes are forgotten at once.

    The framework's own parsing would hold several copies of a picture for as long as its answer takes, and
    build any tree that 32 MiB of brackets describe.

    Raises:
        APIError: 415, 400 `invalid_json`, 422 `invalid_request`.
    """
    body = request.scope["vlm.body"]
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise APIError(415, "Send the body as application/json.")
        if sum(map(body.data.count, b"{[,")) > settings.max_structure:
            raise APIError(400, "The body holds too many values.", code="invalid_json")
        return model.model_validate_json(body.data)
    except ValidationError as error:
        raise _explained(error) from None
    finally:
        body.forget()


def _explained(error: ValidationError) -> APIError:
    """The complaint that reaches deepest, without the value it is about.

    What fits none of several shapes is complained of once for each; the shape that was meant is the one of
    which most was understood, down to a value of the right type.
    """
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    if complaints[0]["type"] == "json_invalid":
        return APIError(400, "The body is not valid JSON.", code="invalid_json")
    told = max(complaints, key=lambda one: (len(_path(one["loc"])), not one["type"].endswith("_type")))
    where = ".".join(map(str, _path(told["loc"])))[:200]
    # pydantic's own words quote the value.
    said = _PART_TYPE if told["type"].startswith("union_tag_") else told["msg"]
    return APIError(422, f"{where}: {said}" if where else said, param=where or None)


def _path(place: tuple[int | str, ...]) -> list[int | str]:
    """A place in the body, without the names that pydantic puts in for the shapes that it tried."""
    path: list[int | str] = []
    for step, before in zip(place, (None, *place), strict=False):
        branch = isinstance(step, str) and not step.isidentifier()
        part_type = isinstance(before, int) and path[-2:-1] == ["content"]
        if not branch and not part_type:
            path.append(step)
    return path


def _add_status(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health", responses=_documented())
    async def health() -> Status:
        """Whether the process answers."""
        return Status()

    @app.get("/ready", responses=_documented(503))
    async def ready() -> Status:
        """Whether questions can be answered."""
        if not engine.alive:
            raise APIError(503, "The model is not running.")
        return Status()

    @app.get("/metrics", responses={**_documented(), 200: {"content": {"text/plain": {}}}})
    async def numbers() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE)


def _add_models(app: FastAPI, model_id: str, settings: Settings, feedback: bool) -> None:
    card = ModelCard(id=model_id, created=int(time.time()), owned_by="vlm")

    @app.get("/v1/models", responses=_documented())
    async def models() -> ModelList:
        """The models that can be asked: one."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}", responses=_documented(404))
    async def model(model: str) -> ModelCard:
        """One model."""
        if model != model_id:
            raise APIError(
                404, "This server has no model of that name.", code="model_not_found", param="model"
            )
        return card

    @app.get("/v1/page", responses=_documented())
    async def page() -> PageConfig:
        """What the page may offer."""
        return PageConfig(
            model=model_id, feedback=feedback, attention=True, max_images=settings.max_images,
            max_image_bytes=settings.max_image_bytes, max_body=settings.max_body, max_text=settings.max_text,
            # The bound of the format that has the lowest.
            max_pixels=min(settings.max_pixels, Limits().max_webp_pixels),
        )  # fmt: skip


def _add_chat(app: FastAPI, conversing: Conversing, settings: Settings) -> None:
    answers = _documented(*_WITH_BODY, 404, 503, 504)
    answers[200] = {"model": ChatCompletion, "content": {"text/event-stream": {"schema": {"type": "string"}}}}

    @app.post("/v1/chat/completions", responses=answers, openapi_extra=_body("ChatRequest"))
    async def chat(request: Request) -> Response:
        """Answer the last user's message, whole or as a stream."""
        asked = await _parse(request, ChatRequest, settings)
        return await conversing.respond(asked, request.receive, request.scope["vlm.body"].release)

    @app.post(
        "/v1/attention",
        responses=_documented(*_WITH_BODY, 404, 503, 504),
        openapi_extra=_body("AttentionRequest"),
    )
    async def attention(request: Request) -> AttentionMaps:
        """Which parts of its pictures an answer leans on."""
        return await conversing.look(await _parse(request, AttentionRequest, settings), request.receive)


def _add_feedback(app: FastAPI, store: FeedbackStore | None, desk: Desk, settings: Settings) -> None:
    @app.post("/v1/feedback", responses=_documented(*_WITH_BODY, 404), openapi_extra=_body("FeedbackRequest"))
    async def feedback(request: Request) -> FeedbackStored:
        """Store what a person thought of an answer, with the pictures and words it was about."""
        opinion = await _parse(request, FeedbackRequest, settings)
        if store is None:
            raise APIError(404, "This server does not collect feedback.", code="feedback_off")
        if not opinion.consent:
            message = "Feedback is stored only with the person's consent."
            raise APIError(403, message, code="consent_required", param="consent")

        async def keep() -> int:
            conversation, pictures = await desk.originals(opinion.messages, 1024)
            return await desk.run(
                lambda: store.add(
                    conversation, pictures, opinion.answer, opinion.verdict, opinion.correction, opinion.model
                )
            )

        try:
            return FeedbackStored(id=await while_connected(request.receive, keep()))
        except FeedbackFull:
            raise APIError(403, "The feedback store is full.", code="feedback_full") from None


def _add_errors(app: FastAPI) -> None:
    """Everything that can be raised, in OpenAI's shape."""

    @app.exception_handler(APIError)
    async def refused(request: Request, error: APIError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        message = {404: "There is nothing here.", 405: "This route does not take that method."}
        body = error_body(error.status_code, message.get(error.status_code, str(error.detail)))
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(500, "The server failed to answer; the error is logged."), 500)
