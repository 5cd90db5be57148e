"""What a client is told when it can't have what it asked for, in the shape that OpenAI's clients understand.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ossia.errors import HarmonyError, OssiaError, UserError


class ApiError(OssiaError):
    """An answer that is an error.

    status   of the HTTP response
    param    the field of the request that has to change, `messages[2].content`
    code     a word for programs: "model_not_found"
    headers  of the HTTP response, beside the usual
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        error = {"message": str(self), "type": _TYPES.get(self.status, "invalid_request_error")}
        return {"error": {**error, "param": self.param, "code": self.code}}

    @classmethod
    def of(cls, error: UserError) -> ApiError:
        """What a client is told about a mistake that another part found in what it sent."""
        return cls(str(error), param=(error.field or None) if isinstance(error, HarmonyError) else None)


_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def internal(number: str) -> ApiError:
    """A fault of the server's own; `number` is in its log, with what happened."""
    return ApiError(
        f"the server had an error of its own; its log says what happened under {number}",
        status=500,
        code="internal_error",
    )


def stuck(reason: str) -> ApiError:
    """One answer that can't go on, and why: its schema leads nowhere, or the model says nothing finite."""
    return ApiError(f"the answer can't go on: {reason}", status=500, code="answer_stuck")
