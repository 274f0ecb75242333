"""Spans that join a client's trace, and certificates that do or do not do."""

import contextlib
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.serving import TlsSpec
from adaptfleet.on_ray.serve.deploy import check_tls
from adaptfleet.on_ray.serve.tracing import Traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_clients_trace_goes_on_into_the_engine() -> None:
    exporter = InMemorySpanExporter()
    traces = Traces("http://127.0.0.1:1", exporter)
    span = traces.begin({b"traceparent": PARENT}, "/v1/completions", "request-1")
    handed_on = dict(span.headers)[b"traceparent"].decode()
    assert handed_on.split("-")[1] == PARENT.split("-")[1], "the same trace"
    assert handed_on.split("-")[2] != PARENT.split("-")[2], "with the door's span as the parent"
    span.end("streets@1", "acme", 200, 5, 7)
    own = traces.begin({}, "/v1/completions", "request-2")
    own.end("unknown", "acme", None, 0, 0)
    traces.flush()
    first, second = exporter.get_finished_spans()
    assert f"{first.context.span_id:016x}" == handed_on.split("-")[2]
    attributes = dict(first.attributes or {})
    assert attributes["adaptfleet.model"] == "streets@1"
    assert attributes["adaptfleet.tenant"] == "acme"
    assert attributes["adaptfleet.request_id"] == "request-1"
    assert attributes["gen_ai.usage.output_tokens"] == 7
    assert second.context.trace_id != first.context.trace_id
    assert second.status.status_code is StatusCode.ERROR


def _certificate(folder: Path, name: str) -> TlsSpec:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    spec = TlsSpec(certificate=str(folder / f"{name}.crt"), key=str(folder / f"{name}.key"))
    Path(spec.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Path(spec.key).write_bytes(private)
    return spec


def _answers(tls: TlsSpec, context: ssl.SSLContext) -> bool:
    """Whether a client with this context gets an answer of a server with this certificate."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(tls.certificate, tls.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError), server_context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                connection.sendall(b"hello")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=30) as plain, context.wrap_socket(plain) as connection:
                return connection.recv(5) == b"hello"
        finally:
            thread.join()


def test_certificates_are_looked_at_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    one, other = _certificate(tmp_path, "one"), _certificate(tmp_path, "other")
    assert _answers(one, check_tls(one))
    with pytest.raises(ssl.SSLError):
        _answers(one, check_tls(other))
    for wrong in (
        TlsSpec(certificate=one.certificate, key=other.key),
        TlsSpec(certificate=one.certificate, key=str(tmp_path / "none")),
        TlsSpec(certificate=one.key, key=one.certificate),
    ):
        with pytest.raises(ServingError, match="are no certificate with its private key"):
            check_tls(wrong)
