"""From what a request names to the mix it runs with, held until the request has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gossamer.api.errors import ApiError, invalid
from gossamer.api.model_string import ModelString, parse_model, parse_ref
from gossamer.api.schemas.common import MergedAdapters
from gossamer.api.workers import Workers
from gossamer.merge.errors import MixError
from gossamer.merge.mix import BASE, Member, Mix, canonical
from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.mixes import Term
from gossamer.store.catalog.names import BASE as BASE_NAME


@dataclass(frozen=True)
class HeldMix:
    """A mix by digests. `release` ends the hold on its adapters, from any thread."""

    mix: Mix
    release: Callable[[], None]


class Mixes:
    """Resolves models. A mix's members are what their names mean at this moment.

    Args:
        base_name: the base's own name, which means the base as `base` does.
        most_members: of a mix.
    """

    def __init__(
        self, catalog: Catalog, workers: Workers, base_name: str, most_members: int
    ) -> None:
        self.base_names = (BASE_NAME, base_name)
        self._catalog = catalog
        self._workers = workers
        self._most_members = most_members

    async def hold(self, tenant: str, model: str, merged: MergedAdapters | None) -> HeldMix:
        """The mix of a request.

        Raises:
            ApiError: 400 or 404, what is named is no model, or no mix that can be.
            AdapterNotFound: it does not exist for this tenant.
        """
        named = parse_model(model, self.base_names)
        terms, method, parameters = named.terms, "linear", dict[str, Any]()
        if merged is not None:
            if named.terms:
                raise invalid("merged_adapters", _both(named))
            terms, method, parameters = _merged(merged)
        if len(terms) > self._most_members:
            raise invalid(
                "merged_adapters" if merged is not None else "model",
                f"A mix has at most {self._most_members} members.",
                code="limit_exceeded",
            )
        if not terms:
            return HeldMix(BASE, _nothing)
        refs = [term.ref for term in terms]
        resolution = await self._workers.query(self._catalog.resolve, tenant, refs)
        try:
            members = [
                Member(version.digest, term.weight)
                for version, term in zip(resolution.versions, terms, strict=True)
            ]
            mix = canonical(members, method, parameters, max_members=self._most_members)
        except MixError as error:
            resolution.release()
            raise _refused(error, in_body=merged is not None) from error
        return HeldMix(mix, resolution.release)


def _merged(merged: MergedAdapters) -> tuple[tuple[Term, ...], str, dict[str, Any]]:
    weights = merged.weights if merged.weights is not None else [1.0] * len(merged.ids)
    if len(weights) != len(merged.ids):
        raise invalid(
            "merged_adapters.weights",
            f"There are {len(merged.ids)} ids and {len(weights)} weights.",
        )
    terms = tuple(
        Term(parse_ref(name), weight) for name, weight in zip(merged.ids, weights, strict=True)
    )
    return terms, merged.merge_strategy, dict(merged.model_extra or {})


def _refused(error: MixError, *, in_body: bool) -> ApiError:
    """400, naming the field as the request spells it."""
    if not in_body:
        return invalid("model", error.message, code=error.code)
    field = error.field.removeprefix("params.")
    if field.startswith("members"):
        field = "weights" if field.endswith("weight") else "ids"
    field = {"method": "merge_strategy", "params": "weights"}.get(field, field)
    return invalid(f"merged_adapters.{field}", error.message, code=error.code)


def _both(named: ModelString) -> str:
    what = "a mix" if named.is_mix else "an adapter"
    return f"`model` names {what} already; with merged_adapters it must be `base`."


def _nothing() -> None:
    """The base needs no hold."""
