"""What the server accepts, in the shape of OpenAI's API.

Each request passes through :mod:`.fields` first, which takes what changes nothing and refuses what the server cannot
do, so the models here only know what it can.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from lolcats.inference.engine.sampling import SamplingParams
from lolcats.inference.server import fields
from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.messages import Message, Tool, settled_message
from lolcats.inference.server.strict import TEXT_OR_LIST, Int, Strict, Text

MOST_STOPS, MOST_BIASES, MOST_LOGPROBS = 64, 1024, 20
MOST_TOKENS, MOST_PROMPTS, MOST_MESSAGES = 1 << 20, 1024, 1 << 14

Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=MOST_TOKENS, fail_fast=True)]
Texts = Annotated[list[Text], Field(max_length=MOST_PROMPTS, fail_fast=True)]


def _prompt_form(value: Any) -> str:
    """Names in angle brackets are left out of error messages."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else 0
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


class StreamOptions(Strict):
    include_usage: bool = False


class Generation(Strict):
    """The fields that both kinds of completion have; the last three are vLLM's."""

    model: Text
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: Annotated[Int, Field(ge=1, le=16)] = 1
    stop: Annotated[
        Annotated[Stop, Tag("<text>")] | Annotated[list[Stop], Field(max_length=MOST_STOPS), Tag("<list>")],
        TEXT_OR_LIST,
    ] = []  # noqa: RUF012 frozen
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=MOST_BIASES)
    response_format: dict[str, Any] = Field({"type": "text"})
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    top_k: Annotated[Int, Field(ge=-1, lt=2**31)] = 0
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)

    @model_validator(mode="after")
    def _complete(self) -> Generation:
        if not all(token.isascii() and token.isdigit() and str(int(token[:10])) == token for token in self.logit_bias):
            raise ValueError("logit_bias: expected token ids as keys")
        if self.response_format.get("type") not in ("text", "json_object", "json_schema"):
            raise ValueError("response_format.type: expected text, json_object or json_schema")
        return self

    @property
    def tokens_field(self) -> tuple[str, int | None]:
        """How many tokens are asked for, and in which field."""
        return "max_tokens", self.max_tokens

    @property
    def wanted_logprobs(self) -> tuple[int | None, int | None]:
        """For tokens of the answer, and of the prompt."""
        raise NotImplementedError

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """Parameters of one choice; choices of one seed differ, and do so reproducibly."""
        logprobs, prompt_logprobs = self.wanted_logprobs
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(Generation):
    prompt: Annotated[
        Annotated[Text, Tag("<text>")] | Annotated[Texts, Tag("<texts>")] | Annotated[Tokens, Tag("<ids>")]
        | Annotated[Annotated[list[Tokens], Field(max_length=MOST_PROMPTS, fail_fast=True)], Tag("<lists>")],
        Discriminator(_prompt_form),
    ]  # fmt: skip
    logprobs: Annotated[Int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Int = 1

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo, or there is nothing to answer")
        if self.best_of not in (1, self.n):
            raise ValueError("best_of: not supported; leave it out or send n")
        return self

    @property
    def wanted_logprobs(self) -> tuple[int | None, int | None]:
        return self.logprobs, self.logprobs if self.echo else None

    @property
    def prompts(self) -> list[str | list[int]]:
        form = _prompt_form(self.prompt)
        return list(self.prompt) if form in ("<texts>", "<lists>") else [self.prompt]  # type: ignore[arg-type,list-item]


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    tools: list[Tool] = []  # noqa: RUF012 frozen
    tool_choice: Any = "auto"

    @model_validator(mode="after")
    def _possible(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        if self.tool_choice not in ("auto", "none"):
            raise ValueError('tool_choice: not supported; leave it out or send "auto" or "none"')
        return self

    @property
    def tokens_field(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def wanted_logprobs(self) -> tuple[int | None, int | None]:
        return self.top_logprobs if self.logprobs else None, None


Body = TypeVar("Body", CompletionRequest, ChatRequest)
TABLES: dict[type, tuple[fields.Table, ...]] = {
    CompletionRequest: (fields.COMPLETION, fields.SHARED),
    ChatRequest: (fields.CHAT, fields.SHARED),
}


def parse(kind: type[Body], given: Any) -> Body:
    """A request out of parsed JSON.

    Raises:
        ApiError: 400, naming the field as the client wrote it.
    """
    if not isinstance(given, dict):
        raise ApiError(400, "The request is not valid: expected a JSON object (a dictionary of fields).")
    settled = fields.settle(given, set(kind.model_fields), *TABLES[kind])
    if "stream_options" in settled:
        own = set(StreamOptions.model_fields)
        settled["stream_options"] = fields.settle(
            settled["stream_options"], own, fields.STREAM_OPTIONS, place="stream_options."
        )
    if isinstance(settled.get("messages"), list):
        settled["messages"] = [settled_message(message, i) for i, message in enumerate(settled["messages"])]
    try:
        return kind.model_validate(settled)
    except ValidationError as error:
        param, message = _problem(error)
        raise ApiError(400, message, param) from None


def _problem(error: ValidationError) -> tuple[str | None, str]:
    """(field, sentence) of the first of pydantic's errors. Our own begin with the field that they are about."""
    first = error.errors(include_url=False, include_input=False)[0]
    path, message = [str(part) for part in first["loc"] if not str(part).startswith("<")], first["msg"]
    if first["type"] == "value_error":
        field, colon, rest = message.removeprefix("Value error, ").partition(": ")
        path, message = ([*path, field], rest) if colon else (path, field)
    where = ".".join(path)
    return where or None, f"{where}: {message}" if where else message
