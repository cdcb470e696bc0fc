"""The benchmark for a card: its whole flow in the interpreter, and what it writes."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.base.patch_map import adapter_table

ROOT = Path(__file__).parents[2]
#: Tables that each section writes.
TABLES = {
    "ceilings": {"ceiling", "launch", "product"},
    "decode": {"decode", "load", "launch", "identity"},
    "entries": {"bytes", "element"},
    "fuse": {"fuse"},
    "prefill": {"prefill", "crossover"},
    "traffic": {"traffic", "ttft"},
    "lora": {"lora"},
    "tiles": {"element", "block"},
    "consumers": {"consumer"},
    "attention": {"attention"},
    "copies": {"copies"},
    "pack": {"pack"},
    "zipf": {"zipf"},
    "layouts": {"layout"},
}


def part(module: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        return importlib.import_module(f"benchmarks.{module}")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as somebody calls it: nothing has chosen the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_lines(path: Path, sections: set[str]) -> None:
    """All tables of these sections are there and no others; nothing passes for a card's figure."""
    lines = lines_of(path)
    wanted = set().union(*(TABLES[section] for section in sections))
    assert {line["table"] for line in lines} == wanted
    measured = part("roofline.measured")
    for line in lines:
        assert line.keys() >= set(measured.COLUMNS)
        assert line["card"] == "interpreter"
        assert float(line["value"]) >= 0
        assert float(line["copy_bandwidth"]) > 0
    for card in part("roofline.cards").CARDS.values():
        for model in part("roofline.models").MODELS.values():
            assert not measured.read_measured(path, card, model)


@pytest.mark.gate
def test_the_dry_run_goes_through_every_section(tmp_path: Path) -> None:
    sections = part("gpu.sections").SECTIONS
    assert {section.name for section in sections} == TABLES.keys()
    path = tmp_path / "gpu.csv"
    done = command("--dry-run", "--minutes", 14, "--csv", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed: nothing" in done.stdout
    assert "left out" not in done.stdout.replace(" 0 cases left out", "")
    check_lines(path, set(TABLES))
    steps = [line for line in lines_of(path) if line["table"] == "decode"]
    assert {line["adapters"] for line in steps} == {"0", "1", "4"}
    identity = [line for line in lines_of(path) if line["table"] == "identity"]
    assert [float(line["value"]) for line in identity] == [0, 0]


def test_a_dry_run_of_some_sections(tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    some = {"ceilings", "attention", "pack", "copies"}
    done = command("--dry-run", "--csv", path, *(f"--only={name}" for name in some))
    assert done.returncode == 0, done.stdout + done.stderr
    check_lines(path, some)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.csv"
    main = part("gpu.__main__").main
    assert main(["--csv", str(path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert main(["--csv", str(path), "--only", "entry"]) == 2
    assert "entries" in capsys.readouterr().err
    assert not path.exists()


@contextmanager
def toy_bench(path: Path, card: str = "interpreter") -> Iterator[Any]:
    setting = part("gpu.setting").toy()
    stamp = {"driver": "1", "versions": "none", "commit": "none", "date": "2030-01-01 00:00"}
    with path.open("w", newline="") as file:
        record = part("gpu.record").Record(file, card, stamp, 4e12)
        timer = part("gpu.timing").Timer(setting.device, setting.repetitions, setting.sweep_bytes)
        yield part("gpu.bench").Bench(setting, record, timer, part("gpu.deltas").Deltas("cpu"))


def test_a_section_that_fails_takes_no_other_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = part("gpu.bench").Section

    def fail(bench: Any) -> None:
        bench.record.add("a", "before", 1.0, "ms")
        raise RuntimeError("the card is on fire")

    def go_on(bench: Any) -> None:
        for case in bench.cases([1, 2, 3]):
            bench.record.add("b", str(case), 2.0, "ms")
            bench.end = 0 if case == 2 else bench.end

    sections = [section("first", 60, fail), section("second", 60, go_on)]
    run = part("gpu.bench").run_sections
    with toy_bench(tmp_path / "gpu.csv") as bench:
        assert run(bench, sections, time.monotonic() + 60) == ["first"]
    assert "the card is on fire" in capsys.readouterr().err
    found = [(line["table"], line["what"]) for line in lines_of(tmp_path / "gpu.csv")]
    assert found == [("a", "before"), ("b", "1"), ("b", "2")]
    assert bench.left_out == {"second": 1}


def test_lines_stand_beside_what_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "gpu.csv"
    name = "llama-3.1-8b"
    with toy_bench(path, "NVIDIA H200") as bench:
        add = bench.record.add
        add("decode", "step", 4.5, "ms", model=name, rows=16, adapters=8, density=0.001,
            coding="bfloat16", context=512, nbytes=4e9)  # fmt: skip
        add("decode", "step", 4.0, "ms", model=name, rows=16, adapters=0, context=512)
        add("zipf", "tokens", 100.0, "tok/s", model=name)
    measured, models = part("roofline.measured"), part("roofline.models").MODELS
    card, model = part("roofline.cards").CARDS["H200"], models[name]
    found = measured.read_measured(path, card, model)
    assert [each.value for each in found] == [4.5, 4.0]
    assert measured.copy_bandwidth(found) == 4e12
    rates = part("roofline.cards").Rates.of(card, 4e12)
    for each in found:
        assert float(each.line["predicted"]) == pytest.approx(
            measured.predict(each.case, rates), rel=1e-4
        )
    assert float(found[0].line["floor"]) == pytest.approx(1.0)
    path.write_text(path.read_text().replace(",ms,", ",s,"))
    with pytest.raises(measured.MeasuredFileError):
        measured.read_measured(path, card, model)


@pytest.mark.parametrize(("rows", "adapters"), [(16, 1), (16, 8), (64, 64), (64, 256), (16, 256)])
def test_all_adapters_are_in_a_step(rows: int, adapters: int) -> None:
    slots = part("gpu.deltas").row_slots(rows, adapters)
    assert len(slots) == rows
    assert {slot for each in slots for slot in each} == set(range(adapters))
    assert {len(each) for each in slots} == {max(1, adapters // rows)}
    applied = part("gpu.decode").applied([f"{i}" for i in range(adapters)], rows)
    assert {key for pairs in applied for key, _ in pairs} == {f"{i}" for i in range(adapters)}
    assert max(map(len, applied)) <= part("gpu.served").MEMBERS


@pytest.mark.parametrize("name", ["toy", "mistral-toy"])
def test_random_models_compute_and_seeded_adapters_fit_them(name: str) -> None:
    shape = part("gpu.setting").TOY
    shape = type(shape)(name, *(getattr(shape, field) for field in shape.__slots__[1:]))
    model = part("gpu.models").random_model(shape, torch.device("cpu"), torch.float32)
    logits = model(torch.arange(2, 9)[None]).logits
    assert logits.isfinite().all()
    assert 0.3 < float(logits.std()) < 3
    source = part("gpu.served").Seeded(shape, 0.05)
    keys = [source.register(seed) for seed in (3, 4)]
    one, again, other = source(keys[0]), source(keys[0]), source(keys[1])
    assert {n: d.shape for n, d in one.deltas.items()} == adapter_table(model)
    for weight, delta in one.deltas.items():
        assert delta.positions.tolist() == again.deltas[weight].positions.tolist()
        assert delta.positions.tolist() != other.deltas[weight].positions.tolist()
    with pytest.raises(KeyError):
        source("sha256:unknown")


def test_the_lora_reference_is_x_times_both_factors() -> None:
    module, weight = part("gpu.lora"), part("gpu.setting").TOY.weights[2]
    lora = module._LoRA.random(weight, 16, 3, torch.empty(0))
    x = torch.randn(3, 2, weight.columns)
    got = lora.terms(x)
    want = torch.einsum("anc,acr,aro->ano", x, lora.down[:, :, 16:], lora.up[1])
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-2)
    assert not torch.allclose(got, want.roll(1, dims=0), rtol=1e-3, atol=1e-2)
    parameters = sum(16 * (weight.columns + rows) for rows in weight.projections)
    assert lora.nbytes == 3 * 4 * parameters


def test_other_bits_are_counted() -> None:
    count = part("gpu.decode")._other_bits
    logits = torch.randn(4, 7)
    other = logits.clone()
    other[2, 3] *= 1 + 2**-23
    assert count(logits, logits.clone()) == 0
    assert count(logits, other) == 1
    assert count(torch.zeros(1), -torch.zeros(1)) == 1


def test_a_trace_of_fusing_is_noticed() -> None:
    moving = part("gpu.moving")
    weights = [torch.randn(5, 5).bfloat16() for _ in range(2)]
    before = [weight.clone() for weight in weights]
    moving._compare("weights", weights, before, 7)
    weights[1][2, 2] = -weights[1][2, 2]
    with pytest.raises(moving.NotRestoredError, match="after 7 cycles"):
        moving._compare("weights", weights, before, 7)


def test_pictures_say_whether_anything_was_measured(tmp_path: Path) -> None:
    plots = part("gpu.plots")
    drawn = plots.draw(tmp_path / "none.csv", tmp_path / "plots")
    tables = {"decode", "bytes", "prefill", "fuse", "load"}
    assert {path.name for path in drawn} == {
        f"gpu-predicted-llama-3.1-8b-{table}.png" for table in tables
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert {path.name for path in (ROOT / "docs" / "plots").iterdir()} >= {
        path.name for path in drawn
    }
    for card, kind in (("interpreter", "interpreted"), ("NVIDIA H200", "measured")):
        path = tmp_path / f"{kind}.csv"
        with toy_bench(path, card) as bench:
            bench.record.add("zipf", "tokens", 100.0, "tok/s", model="mistral-7b")
            bench.record.add("ceiling", "copy", 4e12, "B/s")
        found = plots.draw(path, tmp_path / kind)
        assert {each.name for each in found} == {
            f"gpu-{kind}-mistral-7b-zipf.png", f"gpu-{kind}-ceiling.png",
        }  # fmt: skip
