"""vLLM's engine, counting each request's tokens from its own outputs and keeping the tenant's bounds on length.

Counting adds up lengths of lists that vLLM hands on anyway: no token is decoded, copied or delayed. Which request a generation belongs to
is in `metered`, a context variable that the door sets: one HTTP request may make several generations (n prompts, a tool's rounds).
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptfleet.on_ray.serve.accounts import Grant
from adaptfleet.on_ray.serve.fair_order import FairOrder, Ticket

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


@dataclass(slots=True)
class Meter:
    """One HTTP request's counts, and the bounds that its generations keep."""

    grant: Grant
    order: FairOrder
    ticket: Ticket
    max_context_tokens: int | None = None
    max_output_tokens: int | None = None
    isolated_for: str | None = None
    """A tenant with a prefix cache of its own."""


metered: ContextVar[Meter | None] = ContextVar("adaptfleet_meter", default=None)


def meter(engine: "AsyncLLM") -> None:
    """Puts the counting in front of the engine's `generate` and `encode`. vLLM's handlers look both up at each call."""
    generate, encode = engine.generate, engine.encode
    broken_off = _count_broken_off(engine)

    def counted_generate(prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        now = metered.get()
        if now is None:
            return generate(prompt, sampling_params, request_id, *args, **kwargs)
        num_prompt = _num_tokens(prompt)
        _bound(now, prompt, num_prompt, sampling_params)
        outputs = generate(prompt, sampling_params, request_id, *args, **kwargs)
        return _counted(now, outputs, request_id, num_prompt, broken_off)

    def counted_encode(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        now = metered.get()
        return encode(*args, **kwargs) if now is None else _counted_prompts(now, encode(*args, **kwargs))

    engine.generate = counted_generate  # type: ignore[method-assign, assignment, unused-ignore]
    engine.encode = counted_encode  # type: ignore[method-assign, assignment, unused-ignore]


def _num_tokens(prompt: Any) -> int:
    return len(prompt.get("prompt_token_ids") or ()) if isinstance(prompt, dict) else 0


def _bound(now: Meter, prompt: Any, num_prompt: int, sampling_params: Any) -> None:
    """Before anything is sent: vLLM answers its validation errors with 400."""
    cap = now.max_output_tokens
    if now.max_context_tokens is not None:
        if num_prompt >= now.max_context_tokens:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                f"The prompt has {num_prompt} tokens; prompt and answer together may have {now.max_context_tokens} here "
                f"(max_context_tokens)."
            )
        left = now.max_context_tokens - num_prompt
        cap = left if cap is None else min(cap, left)
    if cap is not None:
        wanted = sampling_params.max_tokens
        sampling_params.max_tokens = cap if wanted is None else min(wanted, cap)
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if now.isolated_for is not None and isinstance(prompt, dict):
        prompt["cache_salt"] = f"tenant:{now.isolated_for}:{salt or ''}"
    elif salt:
        prompt["cache_salt"] = f"given:{salt}"  # so that nobody names a tenant's own


async def _counted(
    now: Meter, outputs: AsyncGenerator[Any, None], request_id: str, num_prompt: int, broken_off: dict[str, int]
) -> AsyncGenerator[Any, None]:
    grant, has_begun, num_output = now.grant, False, 0
    broken_off[request_id] = 0
    try:
        async for output in outputs:
            if not has_begun:
                has_begun = True
                grant.prompt_tokens += len(output.prompt_token_ids or ())
                now.order.begin(now.ticket)
            for part in output.outputs:
                num_output += len(part.token_ids)
            yield output
    except (asyncio.CancelledError, GeneratorExit):
        if not has_begun:
            grant.prompt_tokens += num_prompt
        raise
    finally:
        await outputs.aclose()
        # A client that hung up on an answer that is not streamed has seen none of what was generated for it.
        grant.output_tokens += max(num_output, broken_off.pop(request_id, 0))


async def _counted_prompts(now: Meter, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    try:
        async for output in outputs:
            now.grant.prompt_tokens += len(output.prompt_token_ids or ())
            now.order.begin(now.ticket)
            yield output
    finally:
        await outputs.aclose()


def _count_broken_off(engine: "AsyncLLM") -> dict[str, int]:
    """By request, as far as they are looked at: the tokens that vLLM had made of it when it was broken off, which no output tells."""
    processor, counts = engine.output_processor, dict[str, int]()
    abort = processor.abort_requests

    def counted_abort(request_ids: Iterable[str], internal: bool) -> list[str]:
        names = list(request_ids)
        for name in names:
            for own in [name] if internal else list(processor.external_req_ids.get(name, ())):
                state = processor.request_states.get(own)
                if state is not None and state.detokenizer is not None and state.external_req_id in counts:
                    counts[state.external_req_id] += state.detokenizer.num_output_tokens()
        return abort(names, internal)

    processor.abort_requests = counted_abort  # type: ignore[method-assign, unused-ignore]
    return counts
