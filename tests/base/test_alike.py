"""When two modules' answers count as the same."""

from __future__ import annotations

import pytest
import torch

from gossamer.base.alike import ROUNDING, alike


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_rounding_is_allowed_and_no_more(dtype: torch.dtype) -> None:
    wanted = torch.tensor([[3.0, -8.0]], dtype=dtype)
    step = 8 * ROUNDING[dtype]
    within = (wanted.double() + 0.5 * step).to(dtype)
    beyond = (wanted.double() + 2 * step).to(dtype)
    assert alike(wanted, wanted)
    assert alike(within, wanted)
    assert not alike(beyond, wanted)


@pytest.mark.parametrize(
    ("actual", "wanted"),
    [
        (torch.ones(2), torch.ones(1, 2)),
        (torch.ones(2), (torch.ones(2),)),
        (None, torch.ones(2)),
        (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.inf])),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, torch.inf])),
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0])),
    ],
)
def test_what_cannot_be_compared_is_not_alike(actual: object, wanted: object) -> None:
    assert not alike(actual, wanted)
