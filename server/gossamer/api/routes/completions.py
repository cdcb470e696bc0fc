"""`POST /v1/completions`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from gossamer.api.answering import Prepared, answer, new_id
from gossamer.api.completion_format import (
    CompletionEvents,
    CompletionFrame,
    CompletionReply,
    Prompt,
)
from gossamer.api.documented import errors
from gossamer.api.errors import invalid
from gossamer.api.sampling import Scoring, check_limits, sampling_of
from gossamer.api.schemas.completions import Completion, CompletionRequest
from gossamer.api.services import ServicesOf
from gossamer.api.strict import StrictRoute

router = APIRouter(tags=["completions"], route_class=StrictRoute)
DEFAULT_MAX_TOKENS = 16


@router.post(
    "/v1/completions", response_model=Completion, responses=errors(404, 408, 409, 413, 422, 429)
)
async def create_completion(
    request: Request, body: CompletionRequest, services: ServicesOf
) -> Response:
    """Continue a prompt, or several."""
    given = _given(body)
    limits, vocab_size = services.settings.limits, services.engine.vocab_size
    scoring = Scoring(body.logprobs, body.logprobs if body.echo else None)
    check_limits(body, limits, scoring, vocab_size)
    if len(given) > limits.prompts:
        raise invalid("prompt", f"prompt is limited to {limits.prompts}.", code="limit_exceeded")

    async def prepare() -> Prepared:
        prompts = [await _prompt(services, one, echo=bool(body.echo)) for one in given]
        frame = CompletionFrame(
            id=new_id("cmpl"),
            created=int(time.time()),
            model=body.model,
            prompts=prompts,
            per_prompt=body.n or 1,
            tokens=services.tokens,
            echo=bool(body.echo),
            logprobs=body.logprobs is not None,
            token_ids=bool(body.return_token_ids),
        )
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        options = body.stream_options
        return Prepared(
            prompts=tuple(prompt.tokens for prompt in prompts),
            sampling=sampling_of(body, max_tokens, scoring, vocab_size),
            events=lambda: CompletionEvents(
                frame, include_usage=options is not None and options.include_usage
            ),
            reply=lambda: CompletionReply(frame),
        )

    return await answer(request, services, body, len(given), prepare)


def _given(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts one by one, whichever of the four forms they came in."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    one = [token for token in prompt if isinstance(token, int)]
    return [one] if one else [each for each in prompt if not isinstance(each, int)]


async def _prompt(services: ServicesOf, given: str | list[int], *, echo: bool) -> Prompt:
    if isinstance(given, str):
        return Prompt(given, await services.prompts.encode(given, param="prompt"))
    if max(given) >= services.engine.vocab_size:
        raise invalid("prompt", f"Token ids go from 0 to {services.engine.vocab_size - 1}.")
    return Prompt(services.prompts.decode(given) if echo else "", tuple(given))
