"""The routes of vLLM's and LoRAX's clients: names for stored adapters, and `/generate`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from gossamer.api.answering import Prepared, answer
from gossamer.api.context import context_of
from gossamer.api.documented import errors
from gossamer.api.error_table import HANDLED, to_api_error
from gossamer.api.errors import ApiError, invalid, model_not_found
from gossamer.api.generate_format import (
    GenerateEvents,
    GenerateFrame,
    GenerateReply,
    WithoutDone,
    messages_of,
    respelled,
    sampling_fields,
)
from gossamer.api.loaded_names import LoadedNames
from gossamer.api.model_string import parse_ref
from gossamer.api.sampling import Scoring, check_limits, sampling_of
from gossamer.api.schemas.common import SamplingFields
from gossamer.api.schemas.compatibility import (
    Generated,
    GenerateParameters,
    GenerateRequest,
    LoadAdapter,
    UnloadAdapter,
)
from gossamer.api.services import Services, ServicesOf
from gossamer.api.strict import StrictRoute
from gossamer.store.catalog.errors import AdapterNotFound, InvalidName, ReservedName
from gossamer.store.catalog.names import check_new_name
from gossamer.store.catalog.views import AdapterInfo

router = APIRouter(tags=["compatibility"], route_class=StrictRoute)
DEFAULT_NEW_TOKENS = 20


# ---- vLLM: names for stored adapters


#: what FastAPI cannot tell of a reply whose errors are JSON
_DONE: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/plain": {"schema": {"type": "string"}}},
        "description": "vLLM's sentence.",
    }
}


@router.post(
    "/v1/load_lora_adapter",
    response_class=Response,
    responses=errors(404, 408, 409, 413, 422) | _DONE,
)
async def load_lora_adapter(
    request: Request, body: LoadAdapter, services: ServicesOf
) -> PlainTextResponse:
    """Know a stored adapter under one more name, until it is unloaded or the server ends."""
    tenant, name = context_of(request.scope).tenant, body.lora_name
    names: LoadedNames = request.app.state.loaded_names
    _check_load(body, services)
    digest = await _digest(services, tenant, body.lora_path)
    adapter = await _adapter(services, tenant, name)
    if adapter is not None:
        if digest not in {version.digest for version in adapter.versions if version.current}:
            raise _taken(name, "as an adapter of its own; load_inplace does not replace those.")
    elif names.get(tenant, name) is not None and not body.load_inplace:
        raise _taken(name, "To load the adapter in place, set `load_inplace` to true.")
    else:
        names.put(tenant, name, body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    response_class=Response,
    responses=errors(404, 408, 413) | _DONE,
)
async def unload_lora_adapter(
    request: Request, body: UnloadAdapter, services: ServicesOf
) -> PlainTextResponse:
    """Forget a name that was loaded. Stored adapters stay as they are."""
    tenant, name = context_of(request.scope).tenant, body.lora_name
    names: LoadedNames = request.app.state.loaded_names
    if not names.remove(tenant, name):
        if await _adapter(services, tenant, name) is None:
            raise ApiError(
                404,
                f"The lora adapter {name!r} cannot be found.",
                param="lora_name",
                code="model_not_found",
            )
        raise invalid(
            "lora_name",
            f"{name!r} is a stored adapter and was not loaded: DELETE /v1/adapters/{name} "
            "deletes it.",
        )
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _check_load(body: LoadAdapter, services: Services) -> None:
    base_names = services.mixes.base_names
    if body.base_model_name is not None and body.base_model_name not in base_names:
        raise invalid("base_model_name", f"The base of this server is {services.base.name!r}.")
    path = body.lora_path
    if path.startswith(("/", ".", "~")) or "\\" in path or "://" in path:
        raise invalid(
            "lora_path",
            "lora_path names a stored adapter, such as `sql` or `sql:3`. Adapters are uploaded "
            "with POST /v1/adapters; the server reads no path and fetches no URL.",
        )
    try:
        check_new_name(body.lora_name, services.base.name)
    except (InvalidName, ReservedName) as error:
        refusal = to_api_error(error)
        raise invalid("lora_name", refusal.message, code=refusal.code) from error


async def _digest(services: Services, tenant: str, path: str) -> str:
    """What a reference means now.

    Raises:
        ApiError: 404
    """
    try:
        refs = [parse_ref(path)]
        with await services.workers.query(services.catalog.resolve, tenant, refs) as found:
            return found.versions[0].digest
    except (ApiError, AdapterNotFound) as error:
        raise model_not_found(path, "lora_path") from error


async def _adapter(services: Services, tenant: str, name: str) -> AdapterInfo | None:
    try:
        return await services.workers.query(services.catalog.show, tenant, name)
    except AdapterNotFound:
        return None


def _taken(name: str, hint: str) -> ApiError:
    return invalid("lora_name", f"The lora adapter {name!r} has already been loaded. {hint}")


# ---- LoRAX: /generate


@router.post(
    "/generate",
    response_model=Generated,
    responses=errors(404, 408, 409, 413, 422, 429),
)
async def generate(request: Request, body: GenerateRequest, services: ServicesOf) -> Response:
    """Continue a text, as LoRAX does."""
    if body.stream:
        raise invalid("stream", "Streams come from POST /generate_stream.")
    return await _generate(request, services, body, stream=False)


@router.post(
    "/generate_stream",
    response_class=Response,
    responses=errors(404, 408, 409, 413, 422, 429),
)
async def generate_stream(
    request: Request, body: GenerateRequest, services: ServicesOf
) -> Response:
    """Continue a text, token by token, as LoRAX does."""
    if body.stream is False:
        raise invalid("stream", "This route only streams; POST /generate does not.")
    return await _generate(request, services, body, stream=True)


@router.post(
    "/",
    response_model=list[Generated],
    responses=errors(404, 408, 409, 413, 422, 429),
)
async def generate_either(
    request: Request, body: GenerateRequest, services: ServicesOf
) -> Response:
    """As `/generate_stream` with `stream: true`; else as `/generate`, in a list of one."""
    reply = await _generate(request, services, body, stream=bool(body.stream))
    if body.stream:
        return reply
    headers = {"x-gossamer-mix": reply.headers["x-gossamer-mix"]}
    return Response(b"[%b]" % bytes(reply.body), 200, headers, "application/json")


async def _generate(
    request: Request, services: Services, body: GenerateRequest, *, stream: bool
) -> Response:
    given = body.parameters or GenerateParameters()
    try:
        fields = sampling_fields(given, stream=stream)
        reply = await _answer(request, services, body.inputs, given, fields)
    except HANDLED as error:
        answered = to_api_error(error)
        if answered.param is None:
            raise
        raise respelled(answered, given) from error
    return WithoutDone(reply) if stream else reply


async def _answer(
    request: Request,
    services: Services,
    inputs: str,
    given: GenerateParameters,
    fields: SamplingFields,
) -> Response:
    limits, vocab_size = services.settings.limits, services.engine.vocab_size
    # The details of the prompt's tokens are details; a stream has all tokens in any case.
    details = bool(given.details or given.decoder_input_details)
    scoring = Scoring(
        output=0 if details or fields.stream else None,
        prompt=0 if given.decoder_input_details else None,
    )
    check_limits(fields, limits, scoring, vocab_size)

    async def prepare() -> Prepared:
        text, special = inputs, True
        if given.apply_chat_template:
            text, special = await services.prompts.render(messages_of(inputs)), False
        prompt = await services.prompts.encode(text, param="inputs", special=special)
        frame = GenerateFrame(
            services.tokens, prompt, text if given.return_full_text else "", fields.seed, details
        )
        most = given.max_new_tokens or DEFAULT_NEW_TOKENS
        return Prepared(
            prompts=(prompt,),
            sampling=sampling_of(fields, most, scoring, vocab_size),
            events=lambda: GenerateEvents(frame),
            reply=lambda: GenerateReply(frame),
        )

    return await answer(request, services, fields, 1, prepare)
