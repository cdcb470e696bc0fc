"""`POST /tokenize` and `POST /detokenize`. Every adapter has the base's tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request

from gossamer.api.context import context_of
from gossamer.api.documented import errors
from gossamer.api.errors import invalid
from gossamer.api.schemas.replies import Detokenized, Tokenized
from gossamer.api.schemas.tokenize import DetokenizeRequest, TokenizeRequest
from gossamer.api.services import Services, ServicesOf
from gossamer.api.strict import StrictRoute

router = APIRouter(tags=["tokens"], route_class=StrictRoute)


@router.post("/tokenize", responses=errors(404, 408, 409, 413, 422))
async def tokenize(request: Request, body: TokenizeRequest, services: ServicesOf) -> Tokenized:
    """Tokens of a text, or of a conversation as the chat template renders it."""
    await _check_model(request, services, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "Give either `prompt` or `messages`.")
    text, special = body.prompt or "", body.add_special_tokens is not False
    if body.messages is not None:
        generate = body.add_generation_prompt
        text = await services.prompts.render(body.messages, generate=generate)
        special = bool(body.add_special_tokens)
    param = "prompt" if body.messages is None else "messages"
    tokens = await services.prompts.encode(text, param=param, special=special)
    return Tokenized(
        count=len(tokens),
        max_model_len=services.engine.context_length,
        tokens=list(tokens),
        token_strs=[services.tokens.text(t) for t in tokens] if body.return_token_strs else None,
    )


@router.post("/detokenize", responses=errors(404, 408, 409, 413, 422))
async def detokenize(
    request: Request, body: DetokenizeRequest, services: ServicesOf
) -> Detokenized:
    """The text of tokens, special ones included."""
    await _check_model(request, services, body.model)
    if max(body.tokens, default=0) >= services.engine.vocab_size:
        raise invalid("tokens", f"Token ids go from 0 to {services.engine.vocab_size - 1}.")
    if len(body.tokens) > services.engine.context_length:
        raise invalid("tokens", "The tokens are more than the context.", code="limit_exceeded")
    return Detokenized(prompt=services.prompts.decode(body.tokens))


async def _check_model(request: Request, services: Services, model: str | None) -> None:
    """A model that does not exist is refused, though it would make no difference."""
    if model is not None:
        held = await services.mixes.hold(context_of(request.scope).tenant, model, None)
        held.release()
