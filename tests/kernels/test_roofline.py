"""The byte model agrees with the packer and with counts; the page that prints it is current."""

from __future__ import annotations

import csv
import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gossamer.kernels import Piece, pack
from gossamer.kernels.gpu import layout

ROOT = Path(__file__).parents[2]
CLOSE = 0.02
DENSITIES = (0.0005, 0.001, 0.006, 0.01, 0.1)


def roofline(module: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"benchmarks.roofline.{module}")


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    command = roofline("__main__")
    command.main(["--markdown"])
    printed = capsys.readouterr().out
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert command.replaced(page, "roofline", printed.rstrip("\n")) == page, (
        "run: python -m benchmarks.roofline --into docs/benchmarks.md"
    )
    assert (
        command.replaced(page, "roofline", printed.replace("Predicted", "Measured", 1).rstrip("\n"))
        != page
    )
    with pytest.raises(ValueError, match="roofline: begin"):
        command.replaced("no marks", "roofline", printed)


@pytest.fixture(scope="module")
def masks() -> dict[tuple[int, int, float], Piece]:
    """Uniform random masks, of a width with one byte a row length, and of one with two."""
    generator = np.random.default_rng(0)
    found = {}
    for rows, columns in ((2048, 4096), (640, 14336)):
        noise = generator.random((rows, columns), np.float32)
        for density in DENSITIES:
            positions = torch.from_numpy(np.flatnonzero(noise < density))
            values = torch.from_numpy(generator.standard_normal(len(positions), np.float32))
            found[rows, columns, density] = Piece("element", 0, 0, rows, 1, positions, values)
    return found


@pytest.mark.parametrize("coding", ["bfloat16", "int8"])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", [(2048, 4096), (640, 14336)])
def test_expected_bytes_are_those_that_pack_writes(
    masks: dict[tuple[int, int, float], Piece], shape: tuple[int, int], density: float, coding: Any
) -> None:
    piece = masks[*shape, density]
    written = pack([piece], shape, backend="triton", coding=coding)
    # The mask's own share, which is random: of 4 000 entries, 1.6 % is one standard deviation.
    share = len(piece.positions) / (shape[0] * shape[1])
    assert share == pytest.approx(density, rel=0.06)
    expected = roofline("packed").expected
    found = expected(*shape, share, coding)
    assert found.stored_bytes == pytest.approx(written.data.nbytes, rel=CLOSE)
    assert found.read_bytes <= found.stored_bytes
    assert expected(*shape, 1.06 * share, coding).stored_bytes != pytest.approx(
        written.data.nbytes, rel=CLOSE
    )
    if written.record[layout.HIGH]:
        assert found.parts[3] == pytest.approx(shape[0], rel=CLOSE)


def test_entries_that_lie_together_take_fewer_units_than_expected(
    masks: dict[tuple[int, int, float], Piece],
) -> None:
    """At 1 % gaps over 255 close 8 % of the units: a mask without them is told apart."""
    shape = (2048, 4096)
    piece = masks[*shape, 0.01]
    left = piece.positions // 4096 * 4096 + piece.positions % 4096 // 4
    unique, index = np.unique(left.numpy(), return_index=True)
    together = dataclasses.replace(
        piece, positions=torch.from_numpy(unique), values=piece.values[index]
    )
    written = pack([together], shape, backend="triton", coding="bfloat16")
    share = len(unique) / (shape[0] * shape[1])
    found = roofline("packed").expected(*shape, share, "bfloat16")
    assert found.stored_bytes > written.data.nbytes * (1 + CLOSE)


def test_instructions_are_those_counted_for_the_layouts() -> None:
    """Against masks that were drawn: 16 rows are computed by programs of 32 output rows."""
    expected, weights = (
        roofline("packed").expected,
        roofline("models").MODELS["llama-3.1-8b"].weights,
    )
    with (ROOT / "benchmarks" / "results" / "layouts.csv").open(newline="") as file:
        counted = {
            (line["layout"], line["density"]): float(line["instructions_per_nnz_16"])
            for line in csv.DictReader(file)
            if line["mask"] == "uniform" and line["weight"] == "layer"
        }
    for density in DENSITIES:
        packed = [expected(w.rows, w.columns, density, "bfloat16") for w in weights]
        grouped = packed[0].form == layout.GROUP
        name = "CSR, 16-byte units, 32 rows" if grouped else "CSR, 4-byte units, 32 rows"
        entries = sum(each.entries for each in packed)
        ours = {t: sum(each.instructions(t) for each in packed) / entries for t in (8, 16)}
        theirs = counted[name, f"{density:g}"]
        assert ours[16] == pytest.approx(theirs, rel=CLOSE)
        assert ours[8] != pytest.approx(theirs, rel=0.2)


def test_an_adapter_costs_its_bytes_over_the_bases() -> None:
    """1 + A · p · bytes / 2, where nothing but weights is counted."""
    step, models = roofline("step"), roofline("models")
    model = models.MODELS["llama-3.1-8b"]
    assert 16 * model.lora_parameters == 41_943_040
    rates = roofline("cards").Rates(1e12, 1e30, 1e30, 1e30, 0.0, 1e30, handed_on=0.0)
    base = step.decode_step(model, rates, step.Workload(64, 0, 0.0, "bfloat16", 0))
    assert base.nbytes == 2 * (model.elements + model.vocabulary * model.hidden)
    each = roofline("measured").entry_bytes(model, 0.001, "bfloat16")
    for adapters in (8, 64, 256):
        found = step.decode_step(model, rates, step.Workload(64, adapters, 0.001, "bfloat16", 0))
        grown = base.nbytes + adapters * 0.001 * model.elements * each
        assert found.nbytes == pytest.approx(grown)
        assert found.nbytes != pytest.approx(grown * (adapters + 1) / adapters, rel=1e-3)
        assert found.seconds == pytest.approx(found.nbytes / 1e12)


def test_branches_overlap_in_launches_and_instructions() -> None:
    step, model = roofline("step"), roofline("models").MODELS["smollm2-135m"]
    rates = roofline("cards").Rates(1e30, 1e30, 1e30, 1e30, 1e-6, 1e30)
    seconds = [
        step.decode_step(model, rates, step.Workload(16, adapters, 0.01, "int8", 128)).seconds
        for adapters in (0, 8)
    ]
    products, others = 30 * 4, 30 * step.LAYER_LAUNCHES + step.STEP_LAUNCHES
    assert seconds == pytest.approx([1e-6 * (products + others), 1e-6 * (2 * products + others)])
    slow = dataclasses.replace(rates, instructions=1e9)
    load = step.Workload(16, 8, 0.01, "int8", 128)
    limited = step.decode_step(model, slow, load)
    assert limited.limited
    assert limited.seconds > 10 * seconds[1]


@pytest.mark.parametrize(("rows", "adapters"), [(16, 1), (64, 1), (64, 3), (17, 1), (16, 40)])
def test_chunks_hold_every_row_and_every_adapter(rows: int, adapters: int) -> None:
    step = roofline("step")
    found = step.chunks(rows, adapters)
    assert sum(count for count, _ in found) == rows
    assert max(count for count, _ in found) <= 16
    members = sum(members for _, members in found)
    assert members == (adapters if adapters > rows else len(found))
    assert [step.width(count) for count in (1, 2, 3, 9, 16)] == [1, 2, 4, 16, 16]


@pytest.mark.parametrize("card", ["H200", "A100-80GB"])
def test_the_scratch_pays_from_its_crossover_and_the_rule_is_near_it(card: str) -> None:
    moving, model = roofline("moving"), roofline("models").MODELS["llama-3.1-8b"]
    cards = roofline("cards")
    rates = cards.Rates.of(cards.CARDS[card])
    densities = (0.02, 0.05, 0.1)
    rule = moving.ScratchRule.of(model, rates, roofline("tables").PREFILL_DENSITIES, "bfloat16")

    def seconds(rows: int, density: float) -> tuple[float, float]:
        arguments = (model, rates, rows, density, "bfloat16")
        return moving.gather_seconds(*arguments), moving.dense_seconds(*arguments)

    for density in densities:
        rows = moving.crossover(model, rates, density, "bfloat16")
        gathered, dense = seconds(rows, density)
        assert dense < gathered
        gathered, dense = seconds(rows - 16, density)
        assert dense >= gathered
        for rows in (16, 64, 128, 512, 2048):
            gathered, dense = seconds(rows, density)
            chosen = dense if rule.pays(rows, density) else gathered
            assert chosen <= 1.15 * min(gathered, dense), (density, rows)
    assert not rule.pays(4096, 0.001)


def test_sectors_that_fusing_touches() -> None:
    generator = np.random.default_rng(1)
    weight = roofline("models").Weight("o", 4096, (1024,))
    for density in (0.006, 0.1):
        mask = generator.random((1024, 4096), np.float32) < density
        touched = int(mask.reshape(-1, 16).any(axis=1).sum())
        found = roofline("moving").touched_sectors(weight, density)
        assert found == pytest.approx(touched, rel=CLOSE)
        assert density * weight.elements != pytest.approx(touched, rel=CLOSE)


LINE = {
    "table": "decode", "model": "llama-3.1-8b", "rows": "16", "adapters": "8", "density": "0.001",
    "coding": "bfloat16", "context": "512", "what": "step", "value": "5.0", "unit": "ms",
    "card": "NVIDIA H200", "copy_bandwidth": "4.0e12", "driver": "1", "versions": "triton 3",
    "commit": "c", "date": "d",
}  # fmt: skip


def measured_file(path: Path, *changes: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(LINE))
        writer.writeheader()
        writer.writerows(LINE | change for change in changes)
    return path


def test_measured_rows_stand_beside_the_predicted_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuple(LINE) == roofline("measured").COLUMNS
    path = measured_file(
        tmp_path / "gpu.csv", {}, {"card": "NVIDIA L40S", "value": "77"}, {"table": "zipf"}
    )
    figures = tmp_path / "figures.csv"
    roofline("__main__").main(["--measured", str(path), "--csv", str(figures)])
    printed = capsys.readouterr().out
    assert "of a measured copy's 4.00 TB/s" in printed
    with figures.open(newline="") as file:
        (line,) = [line for line in csv.DictReader(file) if line["measured"]]
    predicted = float(line["predicted"])
    assert 4.5 < predicted < 5.0
    row = next(text for text in printed.splitlines() if text.startswith("decode: step, 16 rows"))
    assert row.split()[-1] == f"{5.0 / predicted - 1:+.0%}"
    assert "77" not in row


@pytest.mark.parametrize(
    "change",
    [{"rows": "many"}, {"unit": "s"}, {"density": "1.5"}, {"density": ""}, {"value": "0"},
     {"coding": "int4"}],
)  # fmt: skip
def test_a_measured_file_that_breaks_the_columns_is_refused(
    tmp_path: Path, change: dict[str, str]
) -> None:
    measured = roofline("measured")
    cards, models = roofline("cards").CARDS, roofline("models").MODELS
    path = measured_file(tmp_path / "gpu.csv", {}, change)
    with pytest.raises(measured.MeasuredFileError) as caught:
        measured.read_measured(path, cards["H200"], models["llama-3.1-8b"])
    assert caught.value.line == 3
    with pytest.raises(SystemExit):
        roofline("__main__").main(["--measured", str(path)])


def test_what_does_not_fit_is_not_predicted() -> None:
    cards, tables = roofline("cards"), roofline("tables")
    model = roofline("models").MODELS["llama-3.1-8b"]
    shown = {
        card: tables.decode_table(model, cards.Rates.of(cards.CARDS[card]), 512)
        for card in ("H200", "MI300X")
    }
    cells = {
        card: next(line for line in table.lines if line[:3] == ["16", "64", "10 %"])[3]
        for card, table in shown.items()
    }
    assert cells["H200"] == "-"
    assert float(cells["MI300X"]) > 0
