"""What a method works with: phases of training over a base, each kept once it has ended.

A method reads as its paper's algorithm does: it says what it will train (`begin`), then runs
phases (`dense`, `sparse`, `layered`) and chooses positions between them. In a work folder a phase
that has ended is not run again, so a method resumes by running from its beginning.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.store.delta import DeltaSet
from gossamer.store.format import digest, seeded_positions
from gossamer.training.checkpoints import Result, WorkFolder
from gossamer.training.config import TrainConfig
from gossamer.training.data import never
from gossamer.training.dense import DenseLinear
from gossamer.training.encode import Encoded
from gossamer.training.errors import DivergedError, NotANumberError
from gossamer.training.gating import gated_mlps, recomputing
from gossamer.training.loop import History, Phase, run_phase
from gossamer.training.methods.method import Density, Trained
from gossamer.training.methods.targets import look_over, match_targets
from gossamer.training.optimizing import SHARE_OF_RATE, Optimizer, Schedule
from gossamer.training.order import seen, updates
from gossamer.training.progress import Started, Watcher
from gossamer.training.scoring import AfterStep, Scoring
from gossamer.training.sparse import Entries, SparseLinear, TrainedLayer, attached
from gossamer.training.starting import Adapters, Weights, opened
from gossamer.training.trainee import Trainee, checkpointing

Positions = Mapping[str, Tensor]
#: a layer of the base → what stands in for it
Make = Callable[[nn.Linear], TrainedLayer]
_NO_POSITIONS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Material:
    """What a run is made from.

    Attributes:
        examples, held_out: in tokens.
        dropped: longer than the maximum.
        pad_id: any token.
        fingerprint: of the base.
        adapters: opens those that the method refers to.
        folder: where phases are kept; None: nowhere.
        stop: asked after each step.
        keep: is given the step, what is trained as it stands, and metrics, every
            `checkpoint_steps` of the last phase, or after each pass over the examples.
    """

    examples: Sequence[Encoded]
    held_out: Sequence[Encoded]
    dropped: int
    pad_id: int
    fingerprint: str
    adapters: Adapters
    folder: WorkFolder | None = None
    stop: Callable[[], bool] = never
    keep: Callable[[int, Trained, Mapping[str, float]], None] | None = None


@dataclass
class Work:
    """One run of a method.

    Raises:
        UntrainableBaseError: there is no weight that an adapter may change.

    Attributes:
        table: base weight name → (out_features, in_features) of every weight that an adapter may
            change.
        steps: updates of the final training.
        epoch: updates of one pass over the examples.
        history: of the phases so far.
    """

    config: TrainConfig
    model: PreTrainedModel
    table: Mapping[str, tuple[int, int]]
    material: Material
    watcher: Watcher
    method: str
    optimizer: Optimizer
    rate: Callable[[Density], float]
    history: History = field(default_factory=History)
    _density: Density | None = None
    _planned: dict[str, int] = field(default_factory=dict)
    _rate: float = 0.0

    def __post_init__(self) -> None:
        self._others = look_over(self.model, self.table)
        self.trainee = Trainee(self.model)
        self._gated = gated_mlps(self.model)
        self.epoch = updates(self.config, len(self.material.examples), 1.0)
        self.steps = self.config.max_steps or updates(
            self.config, len(self.material.examples), self.config.epochs
        )

    # -- what a method asks

    def targets(self, pattern: str) -> dict[str, tuple[int, int]]:
        """The weights that a pattern names; see `match_targets`."""
        return match_targets(pattern, self.table, self._others)

    def open(self, reference: str, field: str) -> DeltaSet:
        """An adapter for this base.

        Args:
            reference: as the parameters have it.
            field: the parameter that has it, like `parents.1`.

        Raises:
            AdapterError: there is none, or it is for another base.
            WorkFolderError: it was another one when the run began.
        """
        material = self.material
        found = opened(material.adapters, reference, field, material.fingerprint, self.table)
        if material.folder is not None:
            material.folder.expect(reference, digest(found))
        return found

    def density(self, nnz: int, targets: Mapping[str, tuple[int, int]]) -> Density:
        """Of so many positions in these weights."""
        return Density(
            nnz=nnz,
            targets=sum(map(math.prod, targets.values())),
            model=sum(map(math.prod, self.table.values())),
        )

    def begin(self, density: Density, phases: Mapping[str, int], weights: int) -> None:
        """Tell the watcher what is to come: phases and their steps, in order."""
        self._density, self._planned = density, dict(phases)
        config = self.config
        default = self.rate(density) * SHARE_OF_RATE[config.optimizer or self.optimizer]
        self._rate = (config.learning_rate or default) * config.learning_rate_multiplier
        self.watcher.started(
            Started(
                method=self.method,
                density=density,
                weights=weights,
                learning_rate=self._rate,
                steps=sum(phases.values()),
                phases=dict(phases),
                examples=len(self.material.examples),
                held_out=len(self.material.held_out),
                dropped=self.material.dropped,
                device=str(self.model.device),
                untrainable=self._others,
            )
        )

    @property
    def learning_rate(self) -> float:
        """The peak, once the run has begun."""
        return self._rate

    @property
    def phases(self) -> Mapping[str, int]:
        """The phases and their steps, in order, once the run has begun."""
        return dict(self._planned)

    @property
    def exact(self) -> bool:
        """Whether a weight may hold its differences; in 16 bits they would drown in it."""
        wide = self.model.dtype in (torch.float32, torch.float64)
        return self.config.precision == "fp32" and wide

    def some_examples(self, fraction: float) -> Sequence[Encoded]:
        """A share of the examples, chosen by the seed; the share 1 is all of them, in order."""
        examples = self.material.examples
        count = max(1, round(fraction * len(examples)))
        if count >= len(examples):
            return examples
        chosen = seeded_positions(self.config.seed, "calibration", len(examples), count)
        return [examples[i] for i in chosen.tolist()]

    # -- phases

    def dense(
        self,
        name: str,
        targets: Sequence[str],
        derive: Callable[[Mapping[str, DenseLinear]], Result],
        *,
        start: Weights | None = None,
        allowed: Mapping[str, Tensor] | None = None,
        examples: Sequence[Encoded] | None = None,
        after_step: AfterStep | None = None,
        one_schedule: bool = False,
    ) -> Result:
        """Train all of some weights, and keep what `derive` makes of it.

        Args:
            name: of the phase, as announced.
            targets: base weight names.
            derive: the trained layers → what is kept.
            start: entries that the model has from the beginning on, in these weights or others;
                what is trained is a change to them.
            allowed: by weight, bool [out, in]: entries that may change.
            examples: to train on; all when not given.
            after_step: may set the layers' masks.
            one_schedule: the phases that say so are one training: the learning rate falls over all
                of them together, and each goes on with the examples that are next.
        """
        start, allowed, chosen = start or {}, allowed or {}, frozenset(targets)
        exact = self.exact

        def make(weight: str) -> Make:
            if weight not in chosen:
                return self._holding(start[weight])
            return lambda linear: DenseLinear(
                linear, summed=exact, start=start.get(weight), allowed=allowed.get(weight)
            )

        def trained(layers: Mapping[str, Any]) -> dict[str, DenseLinear]:
            return {weight: layer for weight, layer in layers.items() if weight in chosen}

        hook = None
        if after_step is not None:
            hook = Scoring(self.config, self.trainee, after_step, trained)
        made = {weight: make(weight) for weight in (*targets, *start)}
        return self._phase(
            name, made, lambda layers: derive(trained(layers)), examples, hook,
            one_schedule=one_schedule,
        )  # fmt: skip

    def sparse(
        self,
        name: str,
        positions: Positions,
        *,
        start: Mapping[str, Tensor] | None = None,
        fixed: Weights | None = None,
        one_schedule: bool = False,
    ) -> dict[str, Entries]:
        """Train the values at some positions, and nothing else.

        Args:
            name: of the phase, as announced.
            positions: by weight, int64, sorted.
            start: by weight, what the values begin with.
            fixed: other entries, which the model has and which are not trained.
            one_schedule: as in `dense`.
        """
        start, fixed, written = start or {}, fixed or {}, self.exact

        def make(weight: str) -> Make:
            return lambda linear: SparseLinear(
                linear, positions.get(weight, _NO_POSITIONS), written=written,
                start=start.get(weight), fixed=fixed.get(weight),
            )  # fmt: skip

        def values(layers: Mapping[str, Any]) -> Result:
            kept = {w: layers[w].values.detach().to("cpu", torch.float32) for w in positions}
            return Result(kept, {})

        def snapshot(
            layers: Mapping[str, Any],
        ) -> Callable[[int, Mapping[str, float]], None] | None:
            keep, density = self.material.keep, self._density
            if keep is None or density is None:
                return None

            def kept(step: int, metrics: Mapping[str, float]) -> None:
                now = values(layers).tensors
                entries = {weight: Entries(positions[weight], now[weight]) for weight in now}
                keep(step, Trained(entries, density, fixed=fixed), metrics)

            return kept

        made = {weight: make(weight) for weight in (*positions, *fixed)}
        found = self._phase(
            name, made, values, None, None, one_schedule=one_schedule, snapshot=snapshot
        )
        return {weight: Entries(positions[weight], found.tensors[weight]) for weight in positions}

    def layered(
        self,
        name: str,
        made: Mapping[str, Make],
        derive: Callable[[Mapping[str, Any]], Result],
        *,
        start: Weights | None = None,
    ) -> Result:
        """Train layers of the method's own, and keep what `derive` makes of them.

        Args:
            name: of the phase, as announced.
            made: by weight, its layer → what stands in for it; called in the table's order.
            derive: these layers → what is kept.
            start: entries of other weights that the model has from the beginning on; those of the
                weights in `made` are left to their layers.
        """
        held = {weight: self._holding(part) for weight, part in (start or {}).items()}

        def derived(layers: Mapping[str, Any]) -> Result:
            return derive({weight: layers[weight] for weight in layers if weight in made})

        return self._phase(name, {**held, **made}, derived, None, None, one_schedule=False)

    def _holding(self, entries: Entries) -> Make:
        """Of a weight that is not trained, with entries that it has from the beginning on."""
        written = self.exact
        return lambda linear: SparseLinear(linear, _NO_POSITIONS, written=written, fixed=entries)

    def _phase(
        self,
        name: str,
        made: Mapping[str, Make],
        derive: Callable[[Mapping[str, Any]], Result],
        examples: Sequence[Encoded] | None,
        hook: Scoring | None,
        *,
        one_schedule: bool,
        snapshot: Callable[[Mapping[str, Any]], Any] = lambda _: None,
    ) -> Result:
        kept = None if self.material.folder is None else self.material.folder.phase(name)
        if kept is not None and (found := kept.result()) is not None:
            self.history.add(History.of(found.notes["history"]))
            return replace(found, notes=found.notes["notes"])
        # In the table's order, which a checkpoint's optimiser state relies on.
        made = {weight: made[weight] for weight in self.table if weight in made}
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="gossamer-train-"))
            stack.enter_context(checkpointing(self.model, on=self.config.gradient_checkpointing))
            stack.enter_context(recomputing(self._gated))
            layers = stack.enter_context(attached(self.model, made))
            phase = replace(
                self._described(name, layers, Path(scratch), one_schedule=one_schedule),
                examples=self.material.examples if examples is None else examples,
                folder=kept,
                after_step=None if hook is None else hook.on(layers),
                keep=snapshot(layers),
                keep_every=self.config.checkpoint_steps or self.epoch,
            )
            try:
                history = run_phase(self.config, phase)
                result = derive(layers)
            except NotANumberError as error:
                raise DivergedError(
                    str(error), phase.first_step + phase.steps, self._rate
                ) from error
        self.history.add(history)
        if kept is not None:
            notes = {"history": asdict(history), "notes": result.notes}
            kept.finish(replace(result, notes=notes))
        return result

    def _described(
        self, name: str, layers: Mapping[str, TrainedLayer], scratch: Path, *, one_schedule: bool
    ) -> Phase:
        config, steps = self.config, self._planned[name]
        before = sum(list(self._planned.values())[: list(self._planned).index(name)])
        whole = sum(self._planned.values())
        shared, first = (steps, 0), 0
        if one_schedule:
            # What came before has seen these, with the same seed.
            shared, first = (whole, before), seen(config, len(self.material.examples), before)
        schedule = Schedule(config.schedule, self._rate, round(config.warmup * shared[0]), *shared)
        parameters = [parameter for layer in layers.values() for parameter in layer.trained]
        return Phase(
            name=name,
            trainee=self.trainee,
            layers=layers,
            parameters=parameters,
            examples=(),
            first_example=first,
            held_out=self.material.held_out,
            pad_id=self.material.pad_id,
            optimizer=config.optimizer or self.optimizer,
            schedule=schedule,
            steps=steps,
            first_step=before,
            first_token=self.history.tokens,
            all_steps=whole,
            nnz=0 if self._density is None else self._density.nnz,
            watcher=self.watcher,
            scratch=scratch,
            stop=self.material.stop,
        )
