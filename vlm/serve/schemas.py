"""The shapes of requests and answers: OpenAI's, the part of them that this model can honour.

Fields that OpenAI does not know are ignored, as front ends add their own; fields that it knows and this
server cannot honour (`tools`, penalties, ...) are refused by `refuse_unsupported` instead of ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from vlm.serve.errors import APIError

Text = Annotated[str, Field(max_length=200_000)]


def _worded(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "It must hold more than blanks")
    return text


Worded = AfterValidator(_worded)
"""Refuses a text of blanks alone."""


class Strict(BaseModel):
    """A request's piece: no coercion ("true" is not true), no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class TextPart(Strict):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageURL(Strict):
    """A `data:` URL, or an https URL of a host that the server allows."""

    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Strict):
    """A picture among the words."""

    type: Literal["image_url"]
    image_url: ImageURL


class RefusalPart(Strict):
    """An answer that another model refused; passed over."""

    type: Literal["refusal"]
    refusal: Text


Part = Annotated[TextPart | ImagePart | RefusalPart, Field(discriminator="type")]


class Message(Strict):
    """One turn; `system` and `developer` words go before the first user's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Text | Annotated[list[Part], Field(max_length=64)] | None, Field(validate_default=True)
    ] = None

    @field_validator("content")
    @classmethod
    def _nothing_of_the_assistant_alone(
        cls, content: str | list[Part] | None, seen: ValidationInfo
    ) -> str | list[Part] | None:
        if seen.data.get("role") == "assistant":
            return content
        if content is None:
            raise PydanticCustomError("nothing", "Input should be text or a list of parts")
        if not isinstance(content, str) and not content:
            raise PydanticCustomError("nothing", "The list should have at least 1 item")
        if isinstance(content, list) and any(isinstance(part, RefusalPart) for part in content):
            raise PydanticCustomError("refusal", "Only an assistant's message may hold a refusal")
        return content


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None


class ChatRequest(Strict):
    """The body of `POST /v1/chat/completions`."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=128)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=64)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=4)]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=4)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    logit_bias: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    modalities: list[str] | None = None
    function_call: Any = None
    web_search_options: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings, none or several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def refuse_unsupported(request: ChatRequest) -> None:
    """Raise 400 for a parameter that would change the answer in a way this server cannot.

    Raises:
        APIError: 400 `unsupported_parameter`, naming it.
    """
    wanted = {
        "tools": bool(request.tools),
        "functions": bool(request.functions),
        "tool_choice": request.tool_choice not in (None, "none", "auto"),
        "response_format": (request.response_format or {}).get("type", "text") != "text",
        "logit_bias": bool(request.logit_bias),
        "frequency_penalty": bool(request.frequency_penalty),
        "presence_penalty": bool(request.presence_penalty),
        "top_logprobs": bool(request.top_logprobs),
        "modalities": request.modalities not in (None, ["text"]),
        "function_call": request.function_call not in (None, "none", "auto"),
        "web_search_options": request.web_search_options is not None,
        "audio": request.audio is not None,
        "prediction": request.prediction is not None,
        "reasoning_effort": request.reasoning_effort not in (None, "none"),
        "verbosity": request.verbosity not in (None, "medium"),
    }
    for name, asked in wanted.items():
        if asked:
            message = f"This model does not support the parameter {name!r} with this value."
            raise APIError(400, message, code="unsupported_parameter", param=name)


class FeedbackRequest(Strict):
    """The body of `POST /v1/feedback`: what was asked and answered, and what the person thought of it."""

    consent: bool
    messages: Annotated[list[Message], Field(min_length=1, max_length=128)]
    answer: Annotated[str, Field(min_length=1, max_length=20_000), Worded]
    verdict: Literal["up", "down"]
    correction: Annotated[str, Field(min_length=1, max_length=2_000), Worded] | None = None
    model: Annotated[str, Field(max_length=200)] = ""

    @field_validator("correction")
    @classmethod
    def _only_of_a_bad_answer(cls, correction: str | None, seen: ValidationInfo) -> str | None:
        if correction is not None and seen.data.get("verdict") == "up":
            raise PydanticCustomError("liked", "An answer that was liked needs no correction")
        return correction


class AttentionRequest(Strict):
    """The body of `POST /v1/attention`: a conversation and the answer that was given to it."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=128)]
    answer: Annotated[str, Field(min_length=1, max_length=20_000)]


class HeatMap(BaseModel):
    """How much an answer leans on each cell of a picture's grid, row by row; the values add up to 1."""

    rows: int
    columns: int
    values: list[float]


class AttentionMaps(BaseModel):
    """One map for each picture, in the order they were sent."""

    images: list[HeatMap]


class Usage(BaseModel):
    """Tokens read and written; an image of a soft-token adapter counts its tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    """One token of the answer with the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Any] = []


class ChoiceLogprobs(BaseModel):
    """The answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """One model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models that can be asked."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """Answer of `/health` and `/ready`."""

    status: Literal["ok"] = "ok"


class PageConfig(BaseModel):
    """What the page may offer."""

    model: str
    feedback: bool
    attention: bool
    max_images: int
    max_image_bytes: int
    max_body: int
    max_pixels: int
    max_text: int


class FeedbackStored(BaseModel):
    """The number under which an opinion was stored."""

    id: int


class ErrorDetail(BaseModel):
    """One refusal."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Every refusal's body."""

    error: ErrorDetail
