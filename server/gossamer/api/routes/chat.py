"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from gossamer.api.answering import Prepared, answer, new_id
from gossamer.api.chat_format import ChatEvents, ChatFrame, ChatReply
from gossamer.api.documented import errors
from gossamer.api.errors import invalid
from gossamer.api.sampling import Scoring, check_limits, sampling_of
from gossamer.api.schemas.chat import ChatCompletion, ChatRequest
from gossamer.api.services import ServicesOf
from gossamer.api.strict import StrictRoute

router = APIRouter(tags=["chat"], route_class=StrictRoute)


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=errors(404, 408, 409, 413, 422, 429),
)
async def create_chat_completion(
    request: Request, body: ChatRequest, services: ServicesOf
) -> Response:
    """Answer a conversation."""
    vocab_size = services.engine.vocab_size
    scoring = _scoring(body)
    check_limits(body, services.settings.limits, scoring, vocab_size)
    wanted = _max_tokens(body)

    async def prepare() -> Prepared:
        text = await services.prompts.render(body.messages)
        prompt = await services.prompts.encode(text, param="messages", special=False)
        # Without a limit the answer may fill the context, as with OpenAI.
        rest = max(1, services.engine.context_length - len(prompt))
        frame = ChatFrame(
            id=new_id("chatcmpl"),
            created=int(time.time()),
            model=body.model,
            choices=body.n or 1,
            tokens=services.tokens,
            prompt=prompt,
            logprobs=scoring.output is not None,
            token_ids=bool(body.return_token_ids),
        )
        options = body.stream_options
        return Prepared(
            prompts=(prompt,),
            sampling=sampling_of(body, rest if wanted is None else wanted, scoring, vocab_size),
            events=lambda: ChatEvents(
                frame, include_usage=options is not None and options.include_usage
            ),
            reply=lambda: ChatReply(frame),
        )

    return await answer(request, services, body, 1, prepare)


def _scoring(body: ChatRequest) -> Scoring:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs `logprobs: true`.")
    return Scoring(body.top_logprobs or 0) if body.logprobs else Scoring()


def _max_tokens(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise invalid("max_completion_tokens", "max_tokens says something else; give one of them.")
    wanted = new if new is not None else old
    if wanted == 0:
        raise invalid("max_tokens", "An answer has at least one token.")
    return wanted
