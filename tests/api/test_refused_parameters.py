"""400s for parameters of a job that do not go together: each names one of them."""

from __future__ import annotations

import hashlib
from typing import Any

import openai
import pytest

from tests.api.running import Running
from tests.api.tuning import Tenant


@pytest.fixture(scope="module")
def tenant(api: Running) -> Tenant:
    made = Tenant(api, hashlib.sha256(__name__.encode()).hexdigest())
    api.upload("sql", 71, made.key)
    return made


LOTTO = {"method": "lotto", "parents": ["sql"]}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"init_from": "sql", "density": 0.005}, {}, "adapter.density"),
    ({"init_from": "sql", "targets": "q"}, {}, "adapter.targets"),
    ({"method": "lota", "init_from": "sql", "mask": "random"}, {}, "adapter.mask"),
    ({"method": "lota", "init_from": "sql", "mask_from": "sql"}, {}, "adapter.mask_from"),
    ({"method": "lota", "mask_from": "sql", "sparsity": 0.5}, {}, "adapter.sparsity"),
    ({"method": "lota", "mask_from": "sql", "mask": "random"}, {}, "adapter.mask"),
    ({"method": "lota", "mask": "random", "calibration_steps": 5}, {},
     "adapter.calibration_steps"),
    ({"method": "mcs", "init_from": "sql", "keep_ratio": 0.5}, {}, "adapter.keep_ratio"),
    ({"method": "mcs", "score": "snip", "sign": "-"}, {}, "adapter.sign"),
    ({**LOTTO, "parents": ["sql", "sql"]}, {}, "adapter.parents.1"),
    ({**LOTTO, "init_from": "sql"}, {}, "adapter.init_from"),
    ({**LOTTO, "init_positions": "select"}, {}, "adapter.init_positions"),
    ({}, {"eval_steps": 5}, "hyperparameters.eval_steps"),
]  # fmt: skip


@pytest.mark.parametrize(("adapter", "settings", "param"), REFUSED)
def test_parameters_that_exclude_each_other_are_refused_by_name(
    adapter: dict[str, Any], settings: dict[str, Any], param: str, tenant: Tenant
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tenant.create(adapter, hyperparameters=settings)
    assert (refused.value.param, refused.value.code) == (param, "invalid_value")
    assert param in refused.value.message


def test_a_job_is_shown_without_values_that_mean_nothing(tenant: Tenant) -> None:
    """And what is shown can be asked for again."""
    job: Any = tenant.create({"method": "lota", "init_from": "sql"}, seed=1)
    assert (job.adapter["init_from"], job.adapter["init_positions"]) == ("sql", "inherit")
    others = {n: v for n, v in job.adapter.items() if n not in ("method", "init_from")}
    assert {n for n, v in others.items() if v is not None} == {"init_positions"}
    assert tenant.create(job.adapter, seed=1).id == job.id
