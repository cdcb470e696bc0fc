"""Compiling a mix is quick enough to do beside a running step."""

from __future__ import annotations

import time

import numpy as np
import pytest

from gossamer.merge import Member, canonical, compile_mix, warm_up
from gossamer.store.delta import Delta, DeltaSet

#: The linear weights of SmolLM2-135M: (out, in), copies.
WEIGHTS = [((576, 576), 60), ((192, 576), 60), ((1536, 576), 60), ((576, 1536), 30)]


def random_set(generator: np.random.Generator, density: float) -> DeltaSet:
    deltas = {}
    for (rows, columns), copies in WEIGHTS:
        for copy in range(copies):
            gaps = generator.geometric(density, int(rows * columns * density * 1.2) + 50)
            where = np.cumsum(gaps) - 1
            where = where[where < rows * columns]
            values = generator.standard_normal(where.size, np.float32)
            deltas[f"{rows}x{columns}.{copy}"] = Delta.element(
                (rows, columns), where, values, value_dtype="BF16"
            )
    return DeltaSet("sha256:base", "b", deltas)


@pytest.mark.gate
def test_a_cold_merge_of_five_adapters_takes_50_ms_of_one_core() -> None:
    generator = np.random.default_rng(0)
    sets = {f"sha256:{index}": random_set(generator, 0.01) for index in range(5)}
    mix = canonical([Member(digest, 0.5) for digest in sets], "overlap_mean")
    warm_up()
    times = []
    for _ in range(7):
        begin = time.process_time()
        compiled = compile_mix(mix, sets)
        times.append(time.process_time() - begin)
    assert compiled.correction
    # At 1 % and five members, 2 % of the nonzeros meet another.
    total = sum(one.nnz for one in sets.values())
    assert 0.015 < compiled.correction.nnz / total < 0.025
    assert min(times) < 0.05
