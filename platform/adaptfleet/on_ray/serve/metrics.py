"""Counts and times by served model, tenant and status code, in the registry that vLLM's own `/metrics` shows.

The model is what an id resolved to (`name@version`), never a client's text: an unknown id is `unknown`, so that labels stay few.
"""

from prometheus_client import Counter, Histogram

_LABELS = ("model", "tenant", "code")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

requests_total = Counter("adaptfleet_requests_total", "Requests answered.", _LABELS)
errors_total = Counter("adaptfleet_errors_total", "Requests answered with a status of 400 or above, or broken off (499).", _LABELS)
request_duration_seconds = Histogram(
    "adaptfleet_request_duration_seconds", "From the request's first byte to the answer's last.", _LABELS, buckets=_SECONDS
)
time_to_first_token_seconds = Histogram(
    "adaptfleet_time_to_first_token_seconds", "From the request's first byte to a streamed answer's first.", _LABELS, buckets=_SECONDS
)
tokens_total = Counter(
    "adaptfleet_tokens_total", "Tokens of prompts and of answers, as the engine counts them.", ("model", "tenant", "kind")
)


def count_tokens(model: str, tenant: str, prompt_tokens: int, output_tokens: int) -> None:
    if prompt_tokens:
        tokens_total.labels(model, tenant, "prompt").inc(prompt_tokens)
    if output_tokens:
        tokens_total.labels(model, tenant, "output").inc(output_tokens)


def observe(model: str, tenant: str, code: int, duration_s: float, first_token_s: float | None) -> None:
    labels = (model, tenant, str(code))
    requests_total.labels(*labels).inc()
    request_duration_seconds.labels(*labels).observe(duration_s)
    if first_token_s is not None:
        time_to_first_token_seconds.labels(*labels).observe(first_token_s)
    if code >= 400:
        errors_total.labels(*labels).inc()
