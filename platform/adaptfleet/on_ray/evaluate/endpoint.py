"""Answers of a live OpenAI-compatible endpoint, many requests in flight."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import openai

from adaptfleet.contracts.errors import ServingError
from adaptfleet.contracts.evaluating import EndpointSubject
from adaptfleet.contracts.names import near
from adaptfleet.core.data.examples import Example

_MAX_RETRIES = 4
"""Of one request, by OpenAI's client: connections that fail, 408, 409, 429 and 5xx, with growing pauses."""


def check_endpoint(subject: EndpointSubject) -> None:
    """ServingError unless the endpoint can be reached and takes the key. Its models are not held against its list, which may be short."""
    try:
        with _client(subject, max_retries=1) as api:
            api.models.list()
    except (openai.NotFoundError, openai.PermissionDeniedError):
        return  # some endpoints have no list, or keep it to themselves
    except openai.OpenAIError as error:
        raise _refusal(subject, error) from None


def endpoint_answers(
    subject: EndpointSubject, examples: Sequence[Example], max_new_tokens: int, progress: Callable[[int], None] = lambda done: None
) -> list[str]:
    """Greedy answers in the examples' order. The first refusal ends it: ServingError says what the endpoint said."""
    with _client(subject, _MAX_RETRIES) as api, ThreadPoolExecutor(subject.concurrency) as pool:

        def ask(example: Example) -> str:
            reply = api.chat.completions.create(
                model=subject.model,
                messages=[{"role": m.role, "content": m.content} for m in example.prompt],  # type: ignore[misc]
                temperature=0,
                max_tokens=max_new_tokens,
            )
            return (reply.choices[0].message.content or "") if reply.choices else ""

        try:
            # One goes first: a wrong model id is told by one request, not by as many as may be in flight.
            answers = [ask(example) for example in examples[:1]]
            progress(len(answers))
            asked = [pool.submit(ask, example) for example in examples[1:]]
            for num_done, done in enumerate(as_completed(asked), len(answers) + 1):
                done.result()
                progress(num_done)
            return answers + [future.result() for future in asked]
        except openai.OpenAIError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise _refusal(subject, error) from None


def _client(subject: EndpointSubject, max_retries: int) -> openai.OpenAI:
    url = subject.url.rstrip("/")
    return openai.OpenAI(
        base_url=url if url.endswith("/v1") else f"{url}/v1", api_key=_key(subject), timeout=subject.timeout_s, max_retries=max_retries
    )


def _key(subject: EndpointSubject) -> str:
    if subject.api_key_env is None:
        return "none"
    key = os.environ.get(subject.api_key_env, "").strip()
    if not key:
        raise ServingError(
            f"the environment variable {subject.api_key_env} holds no API key for {subject.url}. Set it, name another with api_key_env, or "
            f"set api_key_env: null for an endpoint that asks for none."
        )
    return key


def _refusal(subject: EndpointSubject, error: openai.OpenAIError) -> ServingError:
    """What the endpoint or the network said, and what to do."""
    where = f"the endpoint {subject.url}"
    match error:
        case openai.AuthenticationError():
            way_out = f"The key in {subject.api_key_env} is not taken: set another." if subject.api_key_env else "Give api_key_env."
            return ServingError(f"{where} refuses the key (401). {way_out}")
        case openai.NotFoundError():
            return ServingError(f"{where} knows no model {subject.model!r}: {_said(error)}{_near_models(subject)}")
        case openai.APITimeoutError():
            return ServingError(f"{where} gave no answer in {subject.timeout_s:g} s. Raise timeout_s, or lower concurrency.")
        case openai.APIConnectionError():
            return ServingError(f"{where} cannot be reached: {error.__cause__ or error}. Check the url, and that it runs.")
        case openai.APIStatusError():
            return ServingError(f"{where} answered {error.status_code} for {subject.model!r}: {_said(error)}")
        case _:
            return ServingError(f"{where}: {error}")


def _said(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or error.message)[:500]


def _near_models(subject: EndpointSubject) -> str:
    try:
        with _client(subject, max_retries=0) as api:
            known = [model.id for model in api.models.list()]
    except openai.OpenAIError:
        return ""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return f"{near(subject.model, known)} It lists {shown or 'none'}."
