"""What the server accepts, in the shape of OpenAI's API. Unknown fields are errors: none is silently ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lolcats.inference.engine.sampling import SamplingParams

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Tokens = list[Annotated[int, Field(ge=0)]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="after")
    def _whole_text(self) -> Strict:
        """JSON can escape halves of surrogate pairs, which are no text and which no tokenizer takes."""
        for name, value in self:
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
                    raise ValueError(f"{name} holds a lone surrogate, which is no Unicode text")
        return self


class StreamOptions(Strict):
    include_usage: bool = False


class Generation(Strict):
    """The fields that both kinds of completion have; the last three are not OpenAI's."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    stop: Stop | list[Stop] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)

    @model_validator(mode="after")
    def _few_stops(self) -> Generation:
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise ValueError("stop: at most 4 strings")
        return self

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def wanted_logprobs(self) -> int | None:
        raise NotImplementedError

    def sampling(self, max_tokens: int, choice: int) -> SamplingParams:
        """Parameters of one choice; choices of one seed differ, and do so reproducibly."""
        stop = self.stop or []
        return SamplingParams(
            max_tokens, self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            tuple([stop] if isinstance(stop, str) else stop),
            None if self.seed is None else (self.seed + choice) % 2**63, self.wanted_logprobs(),
        )  # fmt: skip


class CompletionRequest(Generation):
    prompt: str | list[str] | Tokens | list[Tokens]
    logprobs: int | None = Field(None, ge=0, le=20)

    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def first_problem(errors: list[Any]) -> tuple[str, str]:
    """(field, sentence) of the first of pydantic's errors."""
    error = errors[0]
    path = ".".join(str(part) for part in error["loc"])
    return str(next(iter(error["loc"]), "")), f"{path}: {error['msg']}" if path else str(error["msg"])
