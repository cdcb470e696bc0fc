"""The low-rank baseline is PEFT's LoRA, in our loop."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_model
from gossamer.base.patch_map import adapter_table
from gossamer.store.format import digest
from gossamer.training import Started, TrainConfig
from gossamer.training.checkpoints import Result
from gossamer.training.errors import BaseChangedError
from gossamer.training.low_rank import LowRankLinear
from gossamer.training.methods import Density, lora
from gossamer.training.run import train
from gossamer.training.sparse import Entries
from tests.tiny import ARCHS, tiny_model, tiny_tokenizer
from tests.training.references import CLIP, Task, mean_loss
from tests.training.support import Recorder, linear_of, run_of, tiny_base

ROOT = Path(__file__).parents[2]
TARGETS, LAYERS = "q,v,down", ["q_proj", "v_proj", "down_proj"]
BATCH, RATE, STEPS = 4, 1e-2, 5


def peft_model(model: Any, seed: int = 0, *, rank: int = 4, alpha: float = 8.0) -> Any:
    """As a user of PEFT makes it."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT asks transformers for an attribute by its old name
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        settings: Any = {"r": rank, "lora_alpha": alpha, "target_modules": LAYERS}
        return get_peft_model(model, LoraConfig(**settings))


def peft_layers(model: Any) -> dict[str, Any]:
    """By base weight name."""
    prefix = "base_model.model."
    return {
        f"{name.removeprefix(prefix)}.weight": module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def peft_trained(task: Task, model: Any, weight_decay: float) -> Any:
    """A plain loop around PEFT's model: batches, rates and clipping of the task."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    moving = torch.optim.AdamW(parameters, lr=RATE, weight_decay=weight_decay)
    for step, rows in enumerate(islice(task.batches(), STEPS)):
        moving.param_groups[0]["lr"] = task.rate(step, STEPS)
        moving.zero_grad()
        mean_loss(model, rows).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        moving.step()
    return model


@torch.no_grad()
def logits(model: nn.Module, task: Task) -> Tensor:
    """In float64: in float32 those of W + Δ and those of both terms are up to 2e-5 apart.

    The deltas themselves are of float32 products, and the trainings of float32 sums, in an order
    that is the processor's: less than 1e-5 apart on an Intel Xeon, 1.1e-5 on an AMD EPYC.
    """
    model.double()
    rows = [torch.from_numpy(example.ids)[None] for example in task.examples]
    return torch.cat([model(input_ids=ids).logits[0] for ids in rows])


def with_deltas(base: BaseFiles, deltas: Mapping[str, Any]) -> nn.Module:
    model = load_model(base).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(torch.from_numpy(delta.dense()))
    return model


@pytest.mark.parametrize(
    ("rank", "alpha", "decay"),
    [(4, 8.0, 0.0), (8, 4.0, 0.0), (1, 16.0, 0.5)],
    ids=["rank 4", "rank 8", "weight decay"],
)
def test_a_run_is_pefts_own_training(
    rank: int, alpha: float, decay: float, base: BaseFiles, data: Path
) -> None:
    """`get_peft_model` and a plain loop of torch, on the same batches."""
    task = Task.of(base, data, BATCH, RATE)
    model = load_model(base)
    modules = dict(model.named_modules())
    result = run_of(
        base, data, "lora", {"targets": TARGETS, "rank": rank, "alpha": alpha}, model=model,
        batch_size=BATCH, max_steps=STEPS, learning_rate=RATE, weight_decay=decay,
        value_dtype="F32",
    )  # fmt: skip
    theirs = peft_trained(
        task, peft_model(load_model(base), rank=rank, alpha=alpha), weight_decay=decay
    )
    layers = peft_layers(theirs)
    assert set(result.delta_set.deltas) == set(layers)
    for name, layer in layers.items():
        product = layer.get_delta_weight("default").detach().numpy()
        made = result.delta_set.deltas[name].dense()
        np.testing.assert_allclose(made, product, rtol=0, atol=2e-6)
    expected = logits(theirs, task)
    ours = logits(with_deltas(base, result.delta_set.deltas), task)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=3e-5)
    assert (ours - logits(task.model, task)).abs().max() > 1.0
    wrong = dict(list(result.delta_set.deltas.items())[1:])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            logits(with_deltas(base, wrong), task), expected, rtol=1e-5, atol=1e-5
        )
    assert fingerprint(model) == base.fingerprint
    assert dict(model.named_modules()) == modules


def first_layers(
    base: BaseFiles, data: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Every layer's factors before the first step, and the run."""
    begun: list[dict[str, Tensor]] = []
    make = LowRankLinear.__init__

    def spy(self: LowRankLinear, *args: Any, **given: Any) -> None:
        make(self, *args, **given)
        begun.append({name: tensor.clone() for name, tensor in self.trained_state().items()})

    with monkeypatch.context() as patch:
        patch.setattr(LowRankLinear, "__init__", spy)
        run = run_of(base, data, "lora", {"targets": TARGETS, "rank": 4, "alpha": 8.0}, **settings)
    return dict(zip(run.delta_set.deltas, begun, strict=True)), run


def test_the_factors_come_from_the_seed_and_are_pefts(
    base: BaseFiles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    one, first = first_layers(base, data, monkeypatch, seed=3, max_steps=1)
    torch.rand(1000)
    state = torch.get_rng_state()
    two, second = first_layers(base, data, monkeypatch, seed=3, max_steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(first.delta_set) == digest(second.delta_set)
    order = list(adapter_table(load_model(base)))
    theirs = peft_layers(peft_model(load_model(base), seed=3))
    assert sorted(theirs, key=order.index) == list(theirs)
    assert len(one) == len(theirs) == 3 * 3
    for mine, again, name in zip(one.values(), two.values(), theirs, strict=True):
        assert torch.equal(mine["a"], again["a"])
        assert torch.equal(mine["a"], theirs[name].lora_A["default"].weight)
        assert not mine["b"].any()
    other, _ = first_layers(base, data, monkeypatch, seed=4, max_steps=1)
    assert not any(
        torch.equal(mine["a"], its["a"])
        for mine, its in zip(one.values(), other.values(), strict=True)
    )


def test_what_is_exported_is_pefts_delta_weight(
    base: BaseFiles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, of the layers as the last step has left them."""
    left: dict[str, Tensor] = {}
    derive = lora._differences

    def spy(layers: Mapping[str, LowRankLinear]) -> Result:
        left.update({n: layer.peft.get_delta_weight("default") for n, layer in layers.items()})
        return derive(layers)

    monkeypatch.setattr(lora, "_differences", spy)
    given = {"targets": TARGETS, "rank": 3, "alpha": 5.0}
    result = run_of(base, data, "lora", given, value_dtype="F32")
    for name, delta in result.delta_set.deltas.items():
        expected = left[name].detach().numpy()
        assert np.linalg.matrix_rank(expected.astype(np.float64), tol=1e-6) == 3
        np.testing.assert_array_equal(delta.dense(), expected)
    assert len(left) == len(result.delta_set.deltas)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture(arch: str, tiny_dir: Callable[..., Path], data: Path) -> None:
    base = tiny_base(tiny_dir(arch))
    watcher = Recorder()
    given = {"targets": "v,o", "rank": 2}
    result = run_of(base, data, "lora", given, watcher=watcher, max_steps=3, learning_rate=None)
    shapes = [delta.shape for delta in result.delta_set.deltas.values()]
    values = sum(2 * (rows + columns) for rows, columns in shapes)
    started = watcher.events[0]
    assert isinstance(started, Started)
    assert started.learning_rate == 3e-3  # the default's upper end
    assert started.density.nnz == watcher.steps()[-1].nnz == values
    record = result.record
    assert record["density"]["nnz"] == record["low_rank"]["values"] == values
    assert record["density"]["targets"] == sum(rows * columns for rows, columns in shapes)
    assert (record["low_rank"]["rank"], record["low_rank"]["alpha"]) == (2, 16.0)
    assert record["parameters"]["targets"] == "v,o"
    assert record["low_rank"]["peft"]
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_and_repeats_itself(precision: str, base: BaseFiles, data: Path) -> None:
    """With gradient checkpointing too, and in accumulated batches."""
    settings: dict[str, Any] = {
        "eval_data": data, "precision": precision, "max_steps": 12, "value_dtype": "F32",
    }  # fmt: skip
    one, two = (run_of(base, data, "lora", {"rank": 4}, **settings) for _ in range(2))
    assert one.evaluations[-1].loss < 0.5 * one.evaluations[0].loss
    assert one.evaluations[-1].exact_match > one.evaluations[0].exact_match
    assert digest(one.delta_set) == digest(two.delta_set)
    assert one.record == two.record
    checkpointed = run_of(base, data, "lora", {"rank": 4}, gradient_checkpointing=True, **settings)
    np.testing.assert_allclose(checkpointed.losses, one.losses, rtol=1e-4, atol=1e-4)
    parts = run_of(
        base, data, "lora", {"rank": 4}, **settings, batch_size=2, gradient_accumulation=4
    )
    tolerance = 1e-3 if precision == "fp32" else 0.1
    np.testing.assert_allclose(parts.losses, one.losses, rtol=tolerance, atol=tolerance)
    other = run_of(base, data, "lora", {"rank": 4}, **settings, seed=1)
    assert digest(other.delta_set) != digest(one.delta_set)


def test_a_16_bit_base_is_not_written_and_its_factors_are_wide(
    tiny_dir: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_base(tiny_dir("llama")), torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = tiny_base(tmp_path)
    config = TrainConfig.of(
        data=data, eval_data=data, method="lora", parameters={"rank": 4}, max_steps=15,
        learning_rate=1e-2, precision="bf16", device="cpu",
    )  # fmt: skip
    versions = [parameter._version for parameter in model.parameters()]
    result = train(config, base, model=model)
    assert [parameter._version for parameter in model.parameters()] == versions
    assert result.evaluations[-1].loss < 0.6 * result.evaluations[0].loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_what_pefts_does(dtype: torch.dtype) -> None:
    model, other = (nn.Module.to(tiny_model("llama"), dtype) for _ in range(2))
    theirs = peft_layers(peft_model(other))
    generator = torch.Generator().manual_seed(0)
    for name, layer in theirs.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(linear, nn.Linear)
        mine = LowRankLinear(linear, rank=4, alpha=8.0, generator=generator)
        pairs = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        for ours, its in zip(mine.trained, pairs, strict=True):
            assert ours.dtype == its.dtype == torch.float32
            assert torch.equal(ours, its)
            with torch.no_grad():
                torch.manual_seed(2)
                its.add_(torch.randn_like(its))
                ours.copy_(its)
        x = torch.randn(3, linear.in_features).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            got, wanted = mine(x), layer(x)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert not torch.equal(got, linear(x))
        assert torch.equal(mine.difference(), layer.get_delta_weight("default"))


@pytest.mark.parametrize("written", [True, False])
def test_a_layer_begins_with_entries_and_gives_the_weight_back(written: bool) -> None:
    linear = linear_of(6, 9, bias=True)
    before, bits = linear.weight.clone(), linear.weight.clone()
    start = Entries(torch.tensor([0, 7, 53]), torch.tensor([0.5, -1.0, 2.0]))
    generator = torch.Generator().manual_seed(0)
    layer = LowRankLinear(
        linear, rank=2, alpha=3.0, generator=generator, start=start, written=written
    )
    with torch.no_grad():
        for factor in layer.trained:
            factor.copy_(torch.randn_like(factor))
    a, b = layer.trained
    dense = 1.5 * (b @ a)
    dense.view(-1)[start.positions] += start.values
    torch.testing.assert_close(layer.difference(), dense)
    x = torch.randn(4, 9, requires_grad=True)
    expected = nn.functional.linear(x, before + dense, linear.bias)
    torch.testing.assert_close(layer(x), expected)
    g = torch.randn(4, 6)
    factors: Sequence[Tensor] = (x, a, b)
    wanted = torch.autograd.grad(expected, factors, g)
    torch.testing.assert_close(torch.autograd.grad(layer(x), factors, g), wanted)
    assert torch.equal(linear.weight, bits) != written
    layer.restore()
    assert torch.equal(linear.weight, bits)


def test_a_base_that_is_not_given_back_is_noticed(
    base: BaseFiles, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"targets": "q", "rank": 1}
    first = run_of(base, data, "sparta", {"targets": "q", "density": 0.01}).delta_set
    monkeypatch.setattr(LowRankLinear, "restore", lambda self: None)
    run_of(base, data, "lora", given, max_steps=1)  # nothing was written
    with pytest.raises(BaseChangedError):
        run_of(
            base, data, "lora", {**given, "init_from": "first"}, adapters={"first": first},
            max_steps=1,
        )  # fmt: skip


def test_the_default_rate_is_the_fields() -> None:
    def rate(model: int) -> float:
        return lora.learning_rate(Density(nnz=1, targets=model, model=model))

    assert rate(7_000_000_000) == pytest.approx(2e-4)
    assert rate(28_000_000_000) == pytest.approx(1e-4)
    assert rate(135_000_000) == pytest.approx(1.44e-3, rel=1e-3)


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # an import of it fails, and nobody finds it installed
from pathlib import Path
import torch
from gossamer.base.load import load_model
from gossamer.training.errors import MissingPackageError
from tests.training.support import run_of, tiny_base
base, data = tiny_base(Path(sys.argv[1])), Path(sys.argv[2])
for method in ("sparta", "lota", "mcs", "full"):
    run_of(base, data, method, {}, max_steps=2)
try:
    run_of(base, data, "lora", {}, max_steps=2)
except MissingPackageError as error:
    print(error.package, error.method, error.remedy)
"""


def test_other_methods_do_without_peft_and_lora_names_it(base: BaseFiles, data: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PEFT, str(base.path), str(data)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "peft lora pip install peft"


SERVER = """
import sys
from pathlib import Path
import gossamer.api.app, gossamer.engine, gossamer.jobs.methods, gossamer.training, gossamer.cli
from gossamer.base.load import BaseFiles, load_model
load_model(BaseFiles("tiny", Path(sys.argv[1]), ""))
print(sorted(name for name in sys.modules if name.partition(".")[0] == "peft"))
"""


def test_the_server_never_imports_peft(base: BaseFiles) -> None:
    """transformers' Trainer does by itself where PEFT is installed; a server has no Trainer."""
    command = [sys.executable, "-c", SERVER, str(base.path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def imported(source: Path) -> dict[str, bool]:
    """The modules that a file imports, and whether it does when it is imported itself."""
    tree = ast.parse(source.read_text())
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            found[name] = found.get(name, False) or node in tree.body
    return found


def test_one_module_imports_peft_and_one_method_that_module() -> None:
    sources = [
        source
        for room in ("server", "kernels", "adapters_store", "trainer")
        for source in (ROOT / room).rglob("*.py")
    ]
    found = {source.relative_to(ROOT).as_posix(): imported(source) for source in sources}
    of_peft = {
        path for path, names in found.items() if any(n.partition(".")[0] == "peft" for n in names)
    }
    assert of_peft == {"trainer/gossamer/training/low_rank.py"}
    of_ours = {
        path: names["gossamer.training.low_rank"]
        for path, names in found.items()
        if "gossamer.training.low_rank" in names
    }
    assert of_ours == {"trainer/gossamer/training/methods/lora.py": False}
