"""From trained entries to an adapter: tiles, dtypes, and what rounding lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.store.delta import DeltaSet
from gossamer.store.errors import DeltaError
from gossamer.store.values import ValueDtype
from gossamer.training.export import Rounding, export
from gossamer.training.methods import Density, Trained
from gossamer.training.selecting import tile_entries
from gossamer.training.sparse import Entries

TABLE = {"a.weight": (10, 12), "b.weight": (8, 8)}
DENSITY = Density(nnz=1, targets=184, model=184)


def exported(
    entries: dict[str, Entries], *, value_dtype: ValueDtype = "BF16", block_size: int = 1,
    fixed: dict[str, Entries] | None = None,
) -> tuple[DeltaSet, Rounding]:  # fmt: skip
    trained = Trained(entries, DENSITY, block_size, fixed or {})
    return export(trained, TABLE, base_fingerprint="0" * 64, base_name="t", value_dtype=value_dtype)


def entries_of(positions: list[int], values: list[float]) -> Entries:
    return Entries(torch.tensor(positions), torch.tensor(values))


@pytest.mark.parametrize("name", list(TABLE))
def test_tiles_come_out_as_tiles_ragged_ones_too(name: str) -> None:
    shape = TABLE[name]
    which = torch.tensor([0] if name == "b.weight" else [1, 3])
    where = tile_entries(which, shape, 8)
    values = torch.arange(1.0, where.numel() + 1)
    delta_set, _ = exported({name: Entries(where, values)}, block_size=8, value_dtype="F32")
    delta = delta_set.deltas[name]
    assert (delta.kind, delta.block_size) == ("block", 8)
    assert delta.positions.tolist() == which.tolist()
    dense = np.zeros(shape, np.float32)
    dense.reshape(-1)[where.numpy()] = values.numpy()
    np.testing.assert_array_equal(delta.dense(), dense)
    wrong = dense.copy()
    wrong.reshape(-1)[where.numpy()[:2]] = wrong.reshape(-1)[where.numpy()[:2][::-1]]
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(delta.dense(), wrong)


def test_entries_that_were_there_keep_their_bits() -> None:
    """A weight with fixed entries that bfloat16 does not hold is stored in float32; the others are
    not."""
    coarse, fine = [0.5, -1.25], [0.1, 1.0 + 2.0**-20]
    trained = {
        "a.weight": entries_of([5], [0.3]),
        "b.weight": entries_of([5], [0.3]),
    }
    fixed = {"a.weight": entries_of([2, 9], fine), "b.weight": entries_of([2, 9], coarse)}
    delta_set, rounding = exported(trained, fixed=fixed)
    a, b = delta_set.deltas["a.weight"], delta_set.deltas["b.weight"]
    assert (a.value_dtype, b.value_dtype) == ("F32", "BF16")
    assert a.elements()[0].tolist() == b.elements()[0].tolist() == [2, 5, 9]
    np.testing.assert_array_equal(a.elements()[1][[0, 2]], np.array(fine, np.float32))
    np.testing.assert_array_equal(b.elements()[1][[0, 2]], np.array(coarse, np.float32))
    assert a.elements()[1][1] == np.float32(0.3) != b.elements()[1][1]
    assert rounding.relative_error > 0
    assert exported({}, fixed={"b.weight": fixed["b.weight"]})[1].relative_error == 0


def test_what_rounding_lost_is_told() -> None:
    values = [1.0, 1.0 + 2.0**-9, 1e-45]
    delta_set, rounding = exported({"b.weight": entries_of([0, 1, 2], values)})
    kept = delta_set.deltas["b.weight"].elements()[1]
    assert kept.tolist() == [1.0, 1.0, 0.0]
    lost = np.linalg.norm(np.array(values) - kept) / np.linalg.norm(values)
    assert rounding.relative_error == pytest.approx(lost, rel=1e-3)
    assert rounding.zeroed == 1
    exact = exported({"b.weight": entries_of([0, 1, 2], values)}, value_dtype="F32")[1]
    assert (exact.relative_error, exact.zeroed) == (0.0, 0)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e6])
def test_a_value_that_cannot_be_served_is_refused(value: float) -> None:
    with pytest.raises(DeltaError):
        exported({"b.weight": entries_of([0], [float(value)])})
