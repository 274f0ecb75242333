"""What schemathesis makes of the engine's own OpenAPI schema, sent to the endpoint: never a 5xx, never a hang, never vLLM's internals."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings

from adaptfleet.on_ray.serve.door import ROUTES
from tests.serve.endpoint.conftest import Endpoint

EXAMPLES_EACH = 12


@pytest.fixture(scope="module")
def schema(endpoint: Endpoint) -> Any:
    """Of vLLM's application as the endpoint builds it, and of that only what the door serves."""
    from vllm.entrypoints.launchers.app import build_app

    from adaptfleet.on_ray.serve.engine import argv, parse

    application = build_app(parse(argv(endpoint.spec, endpoint.base, "float32")), supported_tasks=("generate",))
    document = application.openapi()
    document["paths"] = {path: operations for path, operations in document["paths"].items() if path in ROUTES}
    return schemathesis.openapi.from_dict(document)


def codes_of(operation: Any, endpoint: Endpoint) -> set[int]:
    codes: set[int] = set()

    @settings(
        max_examples=EXAMPLES_EACH,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        reply = case.call(base_url=endpoint.url, headers={"Authorization": f"Bearer {endpoint.key}"}, timeout=60)
        codes.add(reply.status_code)
        assert reply.status_code < 500, (case.as_curl_command(), reply.text[:2000])
        assert "Traceback" not in reply.text and "site-packages" not in reply.text, reply.text[:2000]

    ask()
    return codes


def test_no_request_of_the_schema_makes_a_500_or_a_hang(endpoint: Endpoint, schema: Any) -> None:
    operations = [result.ok() for result in schema.get_all_operations()]
    seen = {f"{operation.method.upper()} {operation.path}": codes_of(operation, endpoint) for operation in operations}
    assert len(seen) >= 8, seen
    assert seen["GET /v1/models"] == {200}
    assert all(codes & {400, 404} for name, codes in seen.items() if name.startswith("POST /v1")), seen
    assert endpoint.answer("tiny"), "as alive as before"
