"""What ends a request early: a status and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 429: {"Retry-After": "1"}}
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with a status and OpenAI's error object.

    Args:
        status: of HTTP. Work that the server has no room for is 429: routers take workers with 5xx out of service.
        message: one sentence for the client.
        param: the field that is wrong, as the client wrote it.
        code: a machine-readable reason, such as ``context_length_exceeded``.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.content()}, self.status, HEADERS.get(self.status))

    def content(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


def bad_field(field: str, reason: str) -> ApiError:
    """400 for one field, as the client wrote it, such as ``messages.1.role``."""
    return ApiError(400, f"{field}: {reason}", field)
