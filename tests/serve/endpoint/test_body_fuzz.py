"""Whatever a body holds: an answer or a refusal in OpenAI's format, soon, and never another tenant's."""

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serve.endpoint.conftest import Endpoint

ROUTES = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/v1/batches",
]
# fmt: off
KEYS = [
    "messages", "prompt", "input", "max_tokens", "max_completion_tokens", "max_output_tokens", "temperature", "top_p", "top_k", "n",
    "seed", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "response_format",
    "structured_outputs", "user", "metadata", "priority", "echo", "suffix", "presence_penalty", "min_tokens", "stop_token_ids",
    "bad_words", "prompt_logprobs", "cache_salt", "request_id", "kv_transfer_params", "chat_template", "chat_template_kwargs",
    "documents", "add_generation_prompt", "continue_final_message", "ignore_eos", "return_token_ids", "tokens",
    "truncate_prompt_tokens", "best_of", "allowed_token_ids", "reasoning_effort", "previous_response_id", "background", "store",
    "include", "input_file_id", "endpoint", "vllm_xargs", "system", "thinking",
]
# fmt: on
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**70),
    st.floats(width=64),
    st.text(max_size=20),
    st.sampled_from(
        ["", "\u0000", "\ud800".encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "{{ 1/0 }}", "../../etc/passwd", "x" * 300]
    ),
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=10
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "tool", "x"]), "content": st.text(max_size=20) | ANYTHING},
    optional={"tool_calls": ANYTHING, "name": ANYTHING},
)
NEARLY_RIGHT = {
    "messages": st.lists(MESSAGE, max_size=3),
    "prompt": st.text(max_size=20) | st.lists(st.integers(-5, 400), max_size=6),
    "input": st.text(max_size=20),
    "max_tokens": st.integers(-2, 5),
    "n": st.integers(-1, 3),
    "stream": st.booleans(),
    "temperature": st.floats(-1, 3),
    "logprobs": st.booleans() | st.integers(-1, 30),
    "tokens": st.lists(st.integers(-5, 400), max_size=6),
}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    route = draw(st.sampled_from(ROUTES))
    body: dict[str, Any] = {"model": draw(st.sampled_from(["tiny", "streets", "people@1"]))}
    if draw(st.integers(0, 9)) == 0:
        body["model"] = draw(ANYTHING)
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=5, unique=True))
    keys += [key for key in ("messages", "prompt", "input", "max_tokens", "tokens") if draw(st.booleans())]
    for key in keys:
        body[key] = draw(NEARLY_RIGHT[key] if key in NEARLY_RIGHT and draw(st.integers(0, 3)) else ANYTHING)
    # So that a right body does not run to the end of the context.
    if not isinstance(body.get("max_tokens"), int):
        body.setdefault("max_tokens", 3)
    return route, body


def test_no_body_makes_a_500_or_a_hang(endpoint: Endpoint) -> None:
    seen: dict[int, int] = {}

    with httpx.Client(headers={"Authorization": f"Bearer {endpoint.key}", "Content-Type": "application/json"}, timeout=60) as client:

        @settings(
            max_examples=250,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(bodies())
        def ask(drawn: tuple[str, dict[str, Any]]) -> None:
            route, body = drawn
            content = json.dumps(body).encode("utf-8", "surrogatepass")
            reply = client.post(f"{endpoint.url}{route}", content=content)
            seen[reply.status_code] = seen.get(reply.status_code, 0) + 1
            assert reply.status_code < 500, (route, content[:2000], reply.text[:2000])
            if reply.status_code >= 400:
                error = reply.json()["error"]
                assert {"message", "type"} <= set(error), (route, content[:2000], reply.text[:500])
                assert "Traceback" not in reply.text and "site-packages" not in reply.text, reply.text[:2000]

        ask()
    assert set(seen) >= {200, 400}, seen
    assert endpoint.answer("tiny"), "as alive as before"
