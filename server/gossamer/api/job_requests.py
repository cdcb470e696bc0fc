"""From OpenAI's request for a fine-tuning job to the backlog's.

Everything that can be wrong with a request is found here, before it is queued, and told by the
field that the client wrote. What is in the files is for the worker to judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gossamer.api.error_table import field_errors
from gossamer.api.errors import ApiError, invalid, model_not_found
from gossamer.api.mixes import Mixes
from gossamer.api.schemas.fine_tuning import AdapterOrder, CreateJob
from gossamer.api.workers import Workers
from gossamer.jobs.methods import MethodParameters, find_declaration
from gossamer.jobs.requests import JobRequest
from gossamer.jobs.settings import RunSettings
from gossamer.merge.errors import MixError
from gossamer.merge.mix import Member, canonical
from gossamer.store.catalog.door import Catalog
from gossamer.store.catalog.errors import AdapterNotFound, WrongBase
from gossamer.store.catalog.mixes import parse_terms

Model = TypeVar("Model", bound=BaseModel)
#: where a request has the settings of its run
_PLAIN = ("hyperparameters",)
_NESTED = ("method", "supervised", "hyperparameters")


class JobReader:
    """Reads requests for jobs on one base.

    Args:
        mixes: knows the base's names.
        fingerprint: of the base, which only its workers train on.
        most_members: of a mix that a job begins with.
    """

    def __init__(
        self,
        catalog: Catalog,
        workers: Workers,
        mixes: Mixes,
        fingerprint: str,
        most_members: int,
    ) -> None:
        self._catalog = catalog
        self._workers = workers
        self._mixes = mixes
        self._fingerprint = fingerprint
        self._most_members = most_members

    async def read(self, tenant: str, body: CreateJob) -> JobRequest:
        """The request that `body` makes. Its adapters are what their names mean to the tenant now;
        none of them is held.

        Raises:
            ApiError: 400, a field cannot be so; 404, the model or an adapter is not there; 422, an
                adapter is for another base.
            ParameterError, UnknownMethod: as 400.
        """
        await self._check_model(tenant, body.model)
        if body.suffix is not None and body.suffix in map(str.lower, self._mixes.base_names):
            raise invalid("suffix", "This name is the base model's.", code="reserved_name")
        order = body.adapter or AdapterOrder()
        declaration = find_declaration(order.method, for_job=True)
        parameters = _read(declaration.parameters, order.model_extra or {}, ("adapter",))
        settings = _read_settings(body)
        references = await self._workers.query(self._resolve, tenant, parameters)
        return JobRequest.of(
            method=declaration.name,
            parameters=parameters,
            settings=settings,
            training_file=body.training_file,
            validation_file=body.validation_file,
            model=body.model,
            base_fingerprint=self._fingerprint,
            references=references,
            suffix=body.suffix,
            seed=body.seed,
            metadata=body.metadata,
        )

    async def _check_model(self, tenant: str, model: str) -> None:
        if model in self._mixes.base_names:
            return
        held = await self._mixes.hold(tenant, model, None)
        held.release()
        raise invalid(
            "model",
            "A job trains the base: give `base` here, and the adapter to begin with in "
            "`adapter.init_from`.",
        )

    def _resolve(self, tenant: str, parameters: MethodParameters) -> dict[str, str]:
        """Every reference of the parameters → the version it means now, `name@sha256:…`."""
        found: dict[str, str] = {}
        digests: dict[str, str] = {}
        for given in parameters.references():
            try:
                with self._catalog.resolve(tenant, [given]) as resolution:
                    (version,) = resolution.versions
            except AdapterNotFound as error:
                raise model_not_found(given, _field_of(parameters, given)) from error
            except WrongBase as error:
                param = _field_of(parameters, given)
                raise ApiError(422, str(error), code="base_model_mismatch", param=param) from error
            found[given] = f"{version.name}@{version.digest}"
            digests[given] = version.digest
        if parameters.init_from is not None:
            self._check_mix(parameters.init_from, digests)
        return found

    def _check_mix(self, model: str, digests: Mapping[str, str]) -> None:
        members = [Member(digests[term.ref.given], term.weight) for term in parse_terms(model)]
        try:
            canonical(members, "linear", {}, max_members=self._most_members)
        except MixError as error:
            raise invalid("adapter.init_from", error.message, code=error.code) from error


def _read_settings(body: CreateJob) -> RunSettings:
    """The settings, from whichever of OpenAI's two places has them."""
    supervised = body.method.supervised if body.method is not None else None
    nested = supervised.hyperparameters if supervised is not None else None
    if nested and body.hyperparameters:
        raise invalid(
            "hyperparameters",
            "Give them here or in method.supervised.hyperparameters, not in both places.",
        )
    where, given = (_NESTED, nested) if nested else (_PLAIN, body.hyperparameters or {})
    return _read(RunSettings, given, where, {"epochs": "n_epochs"} if "n_epochs" in given else {})


def _read(
    model: type[Model],
    given: Mapping[str, Any],
    where: tuple[str, ...],
    written: Mapping[str, str] | None = None,
) -> Model:
    """What `given`, from strict JSON, makes of a model: as strictly as the rest of the body.

    Args:
        where: the path to it in the request, for errors.
        written: field → how this request calls it.

    Raises:
        ApiError: 400
    """
    try:
        # JSON mode: in Python's, a strict tuple would not take a list.
        return model.model_validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        loc = [(written or {}).get(str(part), part) for part in first["loc"]]
        raise field_errors([{**first, "loc": (*where, *loc)}]) from error


def _field_of(parameters: MethodParameters, given: str) -> str:
    """Where the request names the adapter `given`."""
    if parameters.init_from and given in (t.ref.given for t in parse_terms(parameters.init_from)):
        return "adapter.init_from"
    if getattr(parameters, "mask_from", None) == given:
        return "adapter.mask_from"
    return f"adapter.parents.{getattr(parameters, 'parents', ()).index(given)}"
