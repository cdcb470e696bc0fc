"""Structured output: from the fields of a request to the constraint that the engine obeys."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import anyio
from pydantic_core import from_json
from transformers import PreTrainedTokenizerBase

from gossamer.api.errors import invalid, unavailable
from gossamer.api.schemas.chat import ChatRequest, ResponseFormat
from gossamer.api.schemas.common import SamplingFields, StructuredOutputs
from gossamer.engine.grammar import (
    Choice,
    ConstraintFactory,
    Grammar,
    Json,
    Regex,
    Spec,
    compile_constraint,
    tokenizer_info,
)

#: Compiled grammars that are kept. Most requests repeat a schema, and that takes 2 to 50 ms.
_KEPT = 64


class Constraints:
    """Compiles grammars in a worker thread, one at a time, each within a time limit.

    Of a tenant only one waits for that thread, so that nobody's bombs, which take all of their
    time, keep the others waiting for longer than one of them.

    Args:
        eos: tokens that end a text.
        seconds: how long one grammar may take.
        wait_seconds: how long a request may wait for its turn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos: Iterable[int],
        seconds: float,
        wait_seconds: float,
    ) -> None:
        self._info = tokenizer_info(tokenizer, vocab_size, eos)
        self._seconds = seconds
        self._wait_seconds = wait_seconds
        self._threads = anyio.CapacityLimiter(2)
        self._turn = asyncio.Lock()
        self._tenants: dict[str, tuple[asyncio.Lock, int]] = {}
        self._kept: OrderedDict[str, ConstraintFactory] = OrderedDict()

    async def compile(self, tenant: str, body: SamplingFields) -> ConstraintFactory | None:
        """What makes a fresh constraint for each choice, or None when nothing was asked for.

        Raises:
            ApiError: 400, two fields contradict each other, or compiling took too long; 503, too
                many others were waiting.
            InvalidRequest: the grammar cannot be compiled.
        """
        spec = _spec(body)
        if spec is None:
            return None
        key = repr(spec)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        async with AsyncExitStack() as turns:
            try:
                async with asyncio.timeout(self._wait_seconds):
                    await turns.enter_async_context(_OneOfTenant(self._tenants, tenant))
                    await turns.enter_async_context(self._turn)
            except TimeoutError:
                raise unavailable("Too many grammars are waiting to be compiled.", 1.0) from None
            factory = await self._compile(spec, _field(body))
        self._kept[key] = factory
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return factory

    def warm_up(self) -> None:
        """Start the process that grammars are compiled in, so that nobody waits for its start."""
        compile_constraint(self._info, Choice(["a"]))

    def close(self) -> None:
        """End the process that grammars are compiled in."""
        self._info.sandbox.close()

    async def _compile(self, spec: Spec, field: str | None) -> ConstraintFactory:
        run = partial(compile_constraint, self._info, spec, field=field)
        try:
            async with asyncio.timeout(self._seconds):
                return await anyio.to_thread.run_sync(
                    run, abandon_on_cancel=True, limiter=self._threads
                )
        except TimeoutError:
            message = f"Compiling the constraint took longer than {self._seconds:g} s."
            raise invalid(field or "structured_outputs", message) from None


class _OneOfTenant:
    """A lock for each tenant that has requests here."""

    def __init__(self, locks: dict[str, tuple[asyncio.Lock, int]], tenant: str) -> None:
        self._locks = locks
        self._tenant = tenant

    async def __aenter__(self) -> None:
        lock, users = self._locks.get(self._tenant, (asyncio.Lock(), 0))
        self._locks[self._tenant] = (lock, users + 1)
        try:
            await lock.acquire()
        except BaseException:
            self._forget()
            raise

    async def __aexit__(self, *_error: object) -> None:
        self._locks[self._tenant][0].release()
        self._forget()

    def _forget(self) -> None:
        lock, users = self._locks.pop(self._tenant)
        if users > 1:
            self._locks[self._tenant] = (lock, users - 1)


def _spec(body: SamplingFields) -> Spec | None:
    given = body.response_format if isinstance(body, ChatRequest) else None
    from_format = None if given is None else _of_format(given)
    structured = body.structured_outputs
    if structured is None:
        return from_format
    if from_format is not None:
        raise invalid("structured_outputs", "response_format asks for a structure already.")
    return _of_structured(structured)


def _of_format(given: ResponseFormat) -> Spec | None:
    if (given.type == "json_schema") != (given.json_schema is not None):
        raise invalid(
            "response_format.json_schema", "It belongs to the type json_schema, and only to it."
        )
    if given.type == "text":
        return None
    return Json(given.json_schema.schema_ if given.json_schema is not None else None)


def _of_structured(given: StructuredOutputs) -> Spec:
    specs: list[Spec] = []
    if given.json_ is not None:
        specs.append(Json(_schema(given.json_)))
    if given.regex is not None:
        specs.append(Regex(given.regex))
    if given.choice is not None:
        specs.append(Choice(given.choice))
    if given.grammar is not None:
        specs.append(Grammar(given.grammar))
    if len(specs) != 1:
        raise invalid("structured_outputs", "Give exactly one of json, regex, choice, grammar.")
    return specs[0]


def _schema(given: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(given, dict):
        return given
    try:
        schema = from_json(given, allow_inf_nan=False)
    except ValueError as error:
        raise invalid("structured_outputs.json", "The text is not valid JSON.") from error
    if not isinstance(schema, dict):
        raise invalid("structured_outputs.json", "A schema is a JSON object.")
    return schema


def _field(body: SamplingFields) -> str | None:
    """The field to blame; the engine knows the parts of `structured_outputs` itself."""
    return None if body.structured_outputs is not None else "response_format"
