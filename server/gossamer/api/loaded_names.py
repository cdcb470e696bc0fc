"""More names for stored adapters, as vLLM's clients load them: until they are unloaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gossamer.api.errors import NO_RETRY, ApiError
from gossamer.api.mixes import HeldMix, Mixes
from gossamer.api.model_string import parse_ref
from gossamer.api.schemas.common import MergedAdapters
from gossamer.api.services import Services
from gossamer.store.catalog.errors import AdapterNotFound
from gossamer.store.catalog.mixes import parse_terms
from gossamer.store.catalog.views import AdapterInfo


class LoadedNames:
    """What tenants have loaded: name → reference to a stored adapter. It ends with the process, as
    in vLLM. Used in the event loop only.

    An adapter that is stored under a name goes before it, and ends it as soon as that is noticed:
    otherwise the name would take over in silence when the adapter is deleted, or damaged.

    Args:
        most: names of one tenant.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._names: dict[str, dict[str, str]] = {}

    def get(self, tenant: str, name: str) -> str | None:
        """The reference that was loaded under the name, if any."""
        return self._names.get(tenant, {}).get(name)

    def of(self, tenant: str) -> Mapping[str, str]:
        """All of a tenant's, in the order in which they were loaded."""
        return dict(self._names.get(tenant, {}))

    def put(self, tenant: str, name: str, reference: str) -> None:
        """Load a reference under the name, in place of what was there.

        Raises:
            ApiError: 409, the tenant has as many names as it may have.
        """
        names = self._names.setdefault(tenant, {})
        if name not in names and len(names) >= self._most:
            message = f"At most {self._most} names may be loaded; unload one first."
            raise ApiError(409, message, code="quota_exceeded", param="lora_name", headers=NO_RETRY)
        names[name] = reference

    def remove(self, tenant: str, name: str) -> bool:
        """Forget the name; whether it was there."""
        return self._names.get(tenant, {}).pop(name, None) is not None

    def found_stored(self, tenant: str, names: Iterable[str]) -> None:
        """Forget names under which an adapter is stored."""
        for name in names:
            self.remove(tenant, name)


class NamedMixes(Mixes):
    """Resolves models, with the names that were loaded. A stored adapter goes before a name."""

    def __init__(self, services: Services, names: LoadedNames) -> None:
        most = services.settings.limits.merge_members
        super().__init__(services.catalog, services.workers, services.base.name, most)
        self._names = names

    async def hold(self, tenant: str, model: str, merged: MergedAdapters | None) -> HeldMix:
        """The mix of a request.

        Raises:
            ApiError, AdapterNotFound: as in `Mixes`.
        """
        meant: dict[str, str] = {}
        while True:
            wanted = _reworded(model, merged, meant)
            try:
                held = await super().hold(tenant, *wanted)
            except AdapterNotFound as error:
                reference = self._names.get(tenant, error.given)
                if reference is None or error.given in meant:
                    raise
                meant[error.given] = reference
            else:
                if not held.mix.is_base and self._names.of(tenant):
                    self._names.found_stored(tenant, _plain_names(*wanted))
                return held


async def find_adapter(
    services: Services, names: LoadedNames, tenant: str, name: str
) -> tuple[AdapterInfo, str | None]:
    """The adapter that a name, or a reference, stands for now; and the reference that was loaded
    under the name, None where it is the adapter's own.

    Raises:
        ApiError, AdapterNotFound, WrongBase: it stands for none.
    """
    try:
        adapter = await _stored(services, tenant, name)
    except AdapterNotFound:
        reference = names.get(tenant, name)
        if reference is None:
            raise
        return await _stored(services, tenant, reference), reference
    names.found_stored(tenant, [name])
    return adapter, None


async def _stored(services: Services, tenant: str, name: str) -> AdapterInfo:
    ref, query = parse_ref(name), services.workers.query
    with await query(services.catalog.resolve, tenant, [ref]):
        return await query(services.catalog.show, tenant, ref.name)


def _reworded(
    model: str, merged: MergedAdapters | None, meant: Mapping[str, str]
) -> tuple[str, MergedAdapters | None]:
    """The same mix, by the references that its names stand for."""
    if not meant:
        return model, merged
    if merged is not None:
        ids = [meant.get(name, name) for name in merged.ids]
        return model, merged.model_copy(update={"ids": ids})
    terms = ((term.ref.given, term.weight) for term in parse_terms(model))
    return "+".join(f"{meant.get(name, name)}*{weight!r}" for name, weight in terms), None


def _plain_names(model: str, merged: MergedAdapters | None) -> Iterable[str]:
    """The references of a mix that was found; a name with a version is none that can be loaded."""
    return merged.ids if merged is not None else [term.ref.given for term in parse_terms(model)]
