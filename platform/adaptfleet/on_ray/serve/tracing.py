"""OpenTelemetry spans of requests, from the door into the engine: a span here, its id handed to vLLM, whose own spans are its children."""

from collections.abc import Mapping
from typing import Any

_SERVICE = "adaptfleet"


class Span:
    def __init__(self, span: Any, headers: list[tuple[bytes, bytes]]) -> None:
        self._span = span
        self.headers = headers
        """What vLLM is to receive."""

    def end(self, model: str, tenant: str, status: int | None, prompt_tokens: int, output_tokens: int) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("adaptfleet.model", model)
        self._span.set_attribute("adaptfleet.tenant", tenant)
        self._span.set_attribute("http.response.status_code", status or 499)
        self._span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", output_tokens)
        if status is None or status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class Traces:
    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        """`endpoint`: an OTLP collector's, `http://host:4318/v1/traces` or, for gRPC, `http://host:4317`. Another exporter: for tests."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(resource=Resource.create({"service.name": _SERVICE}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter(endpoint)))
        self._tracer = self._provider.get_tracer(_SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, headers: Mapping[bytes, str], path: str, request_id: str) -> Span:
        """Continues a client's trace where its headers name one."""
        from opentelemetry import trace

        given = {name: headers[name.encode()] for name in ("traceparent", "tracestate") if name.encode() in headers}
        parent = self._propagator.extract(given)
        span = self._tracer.start_span(f"POST {path}", context=parent, kind=trace.SpanKind.SERVER)
        span.set_attribute("url.path", path)
        span.set_attribute("adaptfleet.request_id", request_id)
        carried: dict[str, str] = {}
        self._propagator.inject(carried, trace.set_span_in_context(span))
        return Span(span, [(name.encode(), value.encode()) for name, value in carried.items()])

    def flush(self) -> None:
        self._provider.force_flush()


def _exporter(endpoint: str) -> Any:
    if endpoint.rstrip("/").endswith("/v1/traces"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

        return Http(endpoint=endpoint)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

    return Grpc(endpoint=endpoint, insecure=endpoint.startswith("http://"))
