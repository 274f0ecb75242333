"""Batches through the real engine with OpenAI's client, while others ask."""

import json
import time

from tests.serve.endpoint.conftest import Endpoint, Tenants


def test_a_batch_answers_as_live_requests_do_and_counts_as_usage(endpoint: Endpoint, tenants: Tenants) -> None:
    client = endpoint.client(tenants.key("nightly"))
    time.sleep(1.2)
    asked = {"prompt": "Where is it? ", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": asked | {"model": model}}
        for i, model in enumerate(["streets", "people", "nowhere", "tiny"] * 3)
    ]
    file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")  # type: ignore[arg-type]
    deadline = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "expired") and time.monotonic() < deadline:
        endpoint.answer("cities")
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (12, 9, 3)
    lines = [json.loads(line) for line in client.files.content(str(batch.output_file_id)).text.splitlines()]
    for line in lines:
        body = line["response"]["body"]
        assert body["choices"][0]["token_ids"] == endpoint.answer(body["model"], num_tokens=8)
    errors = [json.loads(line) for line in client.files.content(str(batch.error_file_id)).text.splitlines()]
    assert {line["response"]["body"]["error"]["code"] for line in errors} == {"model_not_found"}
    assert client.files.delete(file.id).deleted
