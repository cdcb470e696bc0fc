"""The right adapter, always: a batch in which every row runs another mix, against dense models."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gossamer.base.patch_map import adapter_table
from gossamer.engine.client import Engine
from gossamer.engine.messages import Request, Sampling
from gossamer.engine.scheduler import Work
from gossamer.merge import BASE, Member, Mix, canonical
from gossamer.store.delta import Delta, DeltaSet
from gossamer.store.format import digest
from tests.engine.running import ask, prompts, running, tokens_of
from tests.tiny import ARCHS, tiny_model

TOLERANCE = 1e-3
LENGTHS = (5, 17, 40, 9, 33, 12, 21, 8, 50, 16, 30, 3)
KINDS = (
    ("element", 0.0005),
    ("element", 0.01),
    ("element", 0.1),
    ("block", 0.005),
    ("block", 0.1),
    ("element", 0.023),
)


def random_adapter(
    table: Mapping[str, tuple[int, int]], kind: str, density: float, scale: float, seed: int
) -> DeltaSet:
    """A delta on every weight; `scale` is the standard deviation of its values."""
    random = np.random.default_rng(seed)

    def cells(count: int) -> tuple[np.ndarray, int]:
        chosen = max(1, round(density * count))
        return np.sort(random.choice(count, chosen, replace=False)), chosen

    def delta(shape: tuple[int, int]) -> Delta:
        if kind == "element":
            positions, n = cells(shape[0] * shape[1])
            return Delta.element(shape, positions, random.standard_normal(n) * scale)
        positions, n = cells(-(-shape[0] // 16) * -(-shape[1] // 16))
        return Delta.block(shape, 16, positions, random.standard_normal((n, 16, 16)) * scale)

    return DeltaSet("test", "test", {name: delta(shape) for name, shape in table.items()})


def dense(model: PreTrainedModel, mix: Mix, adapters: Mapping[str, DeltaSet]) -> PreTrainedModel:
    """A copy of the model with Σ w τ added to its weights in fp32."""
    merged = copy.deepcopy(model)
    for member in mix.members:
        for name, delta in adapters[member.digest].deltas.items():
            merged.get_parameter(name).data += member.weight * torch.from_numpy(delta.dense())
    return merged


class Tap:
    """Records the logits of every drawn position, by request id."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.compositions: list[list[tuple[str, int, int]]] = []
        runner = engine._loop._runner
        run = runner.run

        def tapped(work: Sequence[Work], *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = run(work, *args, **kwargs)
            self.compositions.append([(w.sequence.request.id, w.start, w.count) for w in work])
            for w, row in zip(work, logits, strict=True):
                if w.draws:
                    self.rows[w.sequence.request.id].append(row.clone())
            return logits

        monkeypatch.setattr(runner, "run", tapped)


def run_batch(
    model: PreTrainedModel,
    adapters: Mapping[str, DeltaSet],
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    **config: Any,
) -> tuple[Tap, list[list[int]]]:
    with running(model, adapters, memory_bytes=1 << 28, fuse=False, **config) as engine:
        for i, digest_ in enumerate(adapters):  # everything resident, so that all join at once
            ask(engine, Request(f"warm{i}", (3,), canonical([Member(digest_, 1.0)]), Sampling(1)))
        tap = Tap(engine, monkeypatch)
        answers = ask(engine, *requests)
    return tap, [tokens_of(a) for a in answers]


def check_batch(
    model: PreTrainedModel,
    scale: float,
    new_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
    lengths: Sequence[int] = LENGTHS,
    **config: Any,
) -> None:
    """Twelve requests over six adapters, three mixes and the base, greedy, in one batch."""
    table = adapter_table(model)
    sets = [random_adapter(table, kind, p, scale, i) for i, (kind, p) in enumerate(KINDS)]
    adapters = {digest(s): s for s in sets}
    names = list(adapters)
    mixes = [canonical([Member(d, 1.0)]) for d in names] + [
        canonical([Member(names[0], 0.7), Member(names[1], 0.3)]),
        canonical([Member(names[2], 0.5), Member(names[3], -0.5), Member(names[5], 1.5)]),
        canonical([Member(d, 0.25) for d in names]),
        BASE,
        BASE,
        canonical([Member(names[4], -1.0)]),
    ]
    vocab = model.config.vocab_size
    texts = prompts(lengths, vocab)
    sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    requests = [
        Request(f"r{i}", text, mix, sampling)
        for i, (text, mix) in enumerate(zip(texts, mixes, strict=True))
    ]
    plain = [Request(r.id, r.prompt, BASE, sampling) for r in requests]
    reference = copy.deepcopy(model)
    tap, answers = run_batch(copy.deepcopy(model), adapters, requests, monkeypatch, **config)
    bare, _ = run_batch(model, {}, plain, monkeypatch, **config)

    assert tap.compositions == bare.compositions
    assert max(len(c) for c in tap.compositions) == len(requests)
    for request, tokens in zip(requests, answers, strict=True):
        rows = torch.stack(tap.rows[request.id])
        wanted = _teacher_forced(dense(reference, request.mix, adapters), request.prompt, tokens)
        assert float((rows - wanted).abs().max()) < TOLERANCE, request.mix
        best = wanted.topk(2, dim=-1)
        sure = (best.values[:, 0] - best.values[:, 1]) > TOLERANCE
        assert sure.any()
        assert torch.equal(torch.tensor(tokens)[sure], best.indices[sure, 0])
        if request.mix.is_base:
            assert torch.equal(rows, torch.stack(bare.rows[request.id]))
        else:  # the comparison can tell mixes apart
            base = _teacher_forced(reference, request.prompt, tokens)
            assert float((rows - base).abs().max()) > 3 * TOLERANCE, request.mix


def _teacher_forced(
    model: PreTrainedModel, prompt: tuple[int, ...], tokens: list[int]
) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_row_gets_its_own_mix(
    arch: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_batch(
        tiny_model(arch),
        0.1,
        10,
        monkeypatch,
        kernels=backend,
        max_step_tokens=64,
        max_mixed_step_tokens=48,
    )


@pytest.mark.smollm2
def test_every_row_gets_its_own_mix_on_smollm2(
    smollm2_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    model.requires_grad_(requires_grad=False)
    check_batch(model, 0.01, 12, monkeypatch)
