"""What the endpoint answers when it does not do what is asked: OpenAI's error format."""

import json

from adaptfleet.contracts.errors import ServingError

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RefusalError(ServingError):
    """An answer with an error status, raised anywhere before vLLM has the request."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(status, message, code, param, retry_after_s)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        if self.code == "insufficient_quota":
            kind = "insufficient_quota"
        return json.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}).encode()


def unknown_model(message: str) -> RefusalError:
    return RefusalError(404, message, "model_not_found", "model")


def unfit_adapter(message: str, code: str) -> RefusalError:
    return RefusalError(400, message, code, "model")


def overloaded(num_requests: int) -> RefusalError:
    return RefusalError(
        503, f"{num_requests} requests wait or run here already, as many as may. Try again in a second.", "overloaded", retry_after_s=1
    )


def misdirected(base: str, here: str) -> RefusalError:
    """The gateway takes this, and only this, for a reason to look again which base is meant (`gateway.py`)."""
    return RefusalError(421, f"This model is served by {base}, and here is {here}. Try again.", "misdirected", retry_after_s=1)


def unavailable(base: str) -> RefusalError:
    return RefusalError(503, f"No replica of {base} can answer now. Try again.", "unavailable", retry_after_s=1)


def engine_died() -> RefusalError:
    """HAProxy takes this, and only this, for a reason to ask another replica (`cluster/ingress.py`)."""
    return RefusalError(502, "The engine that had this request died before it answered. Try again.", "engine_died")
