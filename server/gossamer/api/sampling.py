"""From the fields of a request to the engine's `Sampling`, with the limits that are settings."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.api.errors import invalid
from gossamer.api.schemas.common import SamplingFields
from gossamer.api.settings import Limits
from gossamer.engine.messages import Sampling


@dataclass(frozen=True)
class Scoring:
    """Which log-probabilities a request wants, as its route spells them."""

    output: int | None = None
    prompt: int | None = None


def check_limits(body: SamplingFields, limits: Limits, scoring: Scoring, vocab_size: int) -> None:
    """Refuse what is over a limit, before any work is done for it.

    Raises:
        ApiError: 400
    """
    for field, value, most in (
        # more at once than may wait would be refused as too much for now, again and again
        ("n", body.n, min(limits.choices, limits.queued_per_tenant, limits.queued)),
        ("stop", len(body.stop) if isinstance(body.stop, list) else 0, limits.stop_strings),
        ("logprobs", scoring.output, limits.logprobs),
        ("logit_bias", len(body.logit_bias or ()), limits.logit_bias),
        ("stop_token_ids", len(body.stop_token_ids or ()), limits.logit_bias),
        ("allowed_token_ids", len(body.allowed_token_ids or ()), vocab_size),
    ):
        if value is not None and value > most:
            raise invalid(field, f"{field} is limited to {most}.", code="limit_exceeded")
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options is for requests with `stream: true`.")


def sampling_of(
    body: SamplingFields, max_tokens: int, scoring: Scoring, vocab_size: int
) -> Sampling:
    """How the tokens of a request are drawn.

    Args:
        max_tokens: what the route makes of its fields and its default.

    Raises:
        ApiError: 400, a field contradicts another.
    """
    if (body.min_tokens or 0) > max_tokens:
        raise invalid("min_tokens", f"min_tokens is larger than the {max_tokens} of max_tokens.")
    stop = body.stop if body.stop is not None else []
    return Sampling(
        max_tokens=max_tokens,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=min(max(body.top_k or 0, 0), vocab_size),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=_bias(body.logit_bias or {}),
        allowed_token_ids=tuple(body.allowed_token_ids) if body.allowed_token_ids else None,
        seed=body.seed,
        n=body.n or 1,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        logprobs=scoring.output,
        prompt_logprobs=scoring.prompt,
        skip_special_tokens=body.skip_special_tokens is not False,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise invalid("logit_bias", "The keys of logit_bias are token ids.")
        bias[int(token)] = value
    return bias


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
