"""Types of fields: strict, but for what JSON itself does not tell apart."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator

from lolcats.modeling.chat import is_unicode


def _whole(value: Any) -> Any:
    """16.0 is 16: JSON has one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unicode(value: Any) -> Any:
    if isinstance(value, str) and not is_unicode(value):
        raise ValueError("holds a lone surrogate, which is not Unicode text")
    return value


Int = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, BeforeValidator(_unicode)]
TEXT_OR_LIST = Discriminator(lambda value: "<list>" if isinstance(value, list) else "<text>")
"""Which of the two tags a value has; names in angle brackets are left out of error messages."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
