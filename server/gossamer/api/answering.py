"""From a checked request to its reply: the way that completions and chat completions share.

    admission → mix, held → constraint, tokens → engine → reply or stream

Whatever was taken on the way is given back on every way out of it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from gossamer.api.context import context_of
from gossamer.api.generation import Generation, Usage, prompts_at_once
from gossamer.api.mixes import HeldMix
from gossamer.api.schemas.common import SamplingFields
from gossamer.api.services import Services
from gossamer.api.streaming import Encoder, EventStream
from gossamer.engine import messages as engine


class Reply(Protocol):
    """Collects a reply that is sent all at once."""

    def add(self, messages: Iterable[tuple[int, engine.Message]]) -> None:
        """Take messages in."""

    def content(self, usage: Usage) -> dict[str, Any]:
        """The reply's JSON object."""


@dataclass(frozen=True)
class Prepared:
    """What a route makes of its own fields: prompts in tokens, how to sample, how to answer."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: engine.Sampling
    events: Callable[[], Encoder]
    reply: Callable[[], Reply]


async def answer(
    request: Request,
    services: Services,
    body: SamplingFields,
    prompts: int,
    prepare: Callable[[], Awaitable[Prepared]],
) -> Response:
    """Answer a completion of either kind.

    Args:
        prompts: how many there are.
        prepare: the route's part; called once the request was let in and its model exists.

    Raises:
        ApiError, EngineError, CatalogError, MergeError: before the first byte of the reply.
    """
    context = context_of(request.scope)
    limits, tenant = services.settings.limits, context.tenant
    with ExitStack() as claims:
        choices = body.n or 1
        at_once = prompts_at_once(limits, prompts, choices)
        ticket = services.admission.enter(tenant, at_once * choices)
        claims.callback(ticket.leave)
        held = await services.mixes.hold(tenant, body.model, body.merged_adapters)
        claims.callback(held.release)
        context.notes["mix"] = held.mix.digest
        constraint = await services.constraints.compile(tenant, body)
        prepared = await prepare()
        requests = _requests(prepared, held, body, tenant, constraint)
        generation = Generation(
            services.engine, services.postbox, requests, at_once, ticket, held.release
        )
        claims.pop_all()  # the generation has them now
        claims.callback(generation.close)
        generation.start(request.receive, limits)
        first = await generation.take()
        services.metrics.first_token(time.monotonic() - context.started)
        headers = {"x-gossamer-mix": held.mix.digest}
        context.notes["usage"] = generation.usage
        if body.stream:
            claims.pop_all()  # the stream closes it
            return EventStream(generation, first, prepared.events(), services.metrics, headers)
        return await _whole(generation, first, prepared.reply(), headers)


def new_id(kind: str) -> str:
    """An id for a reply: `chatcmpl-…` or `cmpl-…`."""
    return f"{kind}-{secrets.token_hex(12)}"


async def _whole(
    generation: Generation,
    messages: Iterable[tuple[int, engine.Message]],
    reply: Reply,
    headers: Mapping[str, str],
) -> Response:
    reply.add(messages)
    while not generation.over:
        reply.add(await generation.take())
    content = json.dumps(reply.content(generation.usage)).encode("ascii")
    return Response(content, 200, headers, "application/json")


def _requests(
    prepared: Prepared,
    held: HeldMix,
    body: SamplingFields,
    tenant: str,
    constraint: Callable[[], engine.Constraint] | None,
) -> list[engine.Request]:
    # Not the client's x-request-id: two requests in flight may carry the same.
    own = secrets.token_hex(12)
    return [
        engine.Request(
            id=f"{own}-{index}",
            prompt=prompt,
            mix=held.mix,
            sampling=prepared.sampling,
            salt=tenant.encode(),
            constraint=constraint,
            priority=body.priority or 0,
        )
        for index, prompt in enumerate(prepared.prompts)
    ]
