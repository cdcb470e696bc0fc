"""What can go wrong with a training run.

Every error says what happened, why, and what to do about it; the data those lines were made of is
kept beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from pathlib import Path

from gossamer.base.errors import ExplainedError


class TrainingError(ExplainedError):
    """A training run cannot start, or cannot go on."""


class UnknownMethodError(TrainingError):
    """There is no training method of that name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(
            f"there is no training method {name!r}",
            f"the methods are {', '.join(known)}",
            "Give one of these names",
        )
        self.name = name
        self.known = tuple(known)


class ConfigError(TrainingError):
    """A parameter of the run, or of its method, has a value that it cannot have.

    Attributes:
        field: the parameter's name; dotted below `parameters`.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(
            f"the training parameter {field} cannot be used", problem, "Correct the parameter"
        )
        self.field = field
        self.problem = problem


class DataError(TrainingError):
    """A training file does not hold what it should.

    Attributes:
        file: the file.
        line: the line, counted from 1; None where the file as a whole is meant.
        field: the path of the field in the line's object, like `messages[1].role`; None where the
            line as a whole is meant.
        problem: what is wrong there.
    """

    def __init__(
        self, file: Path, problem: str, line: int | None = None, field: str | None = None
    ) -> None:
        where = [str(file)]
        where += [] if line is None else [f"line {line}"]
        where += [] if field is None else [field]
        super().__init__(
            f"the training data cannot be used ({', '.join(where)})",
            problem,
            'A line is {"prompt": …, "completion": …} or '
            '{"messages": [{"role": …, "content": …}, …]}',
        )
        self.file = file
        self.line = line
        self.field = field
        self.problem = problem


class UnknownTargetError(TrainingError):
    """A target matches no weight that an adapter may change.

    Attributes:
        target: what was asked for.
        available: names of the linear layers that there are.
        others: classes of the base whose weights belong to no linear layer.
    """

    def __init__(self, target: str, available: Sequence[str], others: Sequence[str] = ()) -> None:
        why = f"its linear layers are called {', '.join(available)}"
        if others:
            why += f", and the weights of {', '.join(others)} are in no linear layer"
        super().__init__(
            f"the target {target!r} matches no weight of the base model",
            why,
            "Name some of these, q, k, v, o, gate, up, down, all-linear, or re:<pattern>",
        )
        self.target = target
        self.available = tuple(available)
        self.others = tuple(others)


class UntrainableBaseError(TrainingError):
    """The base has no weight that an adapter may change.

    Attributes:
        others: classes of the base that its weights belong to.
    """

    def __init__(self, others: Sequence[str]) -> None:
        these = f", and this base has its weights in {', '.join(others)}" if others else ""
        super().__init__(
            "no layer of the base model can be trained",
            "an adapter changes the weights of torch.nn.Linear layers other than the output head"
            + these,
            "Use another base",
        )
        self.others = tuple(others)


class DensityError(TrainingError):
    """The targets have no room for as many positions, or are left without a single one.

    Attributes:
        field: the parameter that says how many: `density`, `sparsity` or `keep_ratio`.
        given: its value.
        wanted: positions that it asks for, or tiles.
        available: as many as there are.
        smallest, largest: the values that would have been possible.
    """

    def __init__(
        self, field: str, given: float, *, wanted: int, available: int, smallest: float,
        largest: float, units: str = "positions", where: str = "the targets",
    ) -> None:  # fmt: skip
        remedy = "Give more targets"
        if available:
            # Towards the inside: what is offered must be possible, in all of its digits.
            least = Context(9, ROUND_CEILING).create_decimal_from_float(smallest)
            most = Context(9, ROUND_FLOOR).create_decimal_from_float(largest)
            remedy = f"Give a {field} from {least.normalize():g} to {most.normalize():g}"
            remedy += ", or more targets"
        super().__init__(
            f"the {field} {given:g} cannot be reached",
            f"it asks for {wanted:,} {units}, and there are {available:,} in {where}",
            remedy,
        )
        self.field = field
        self.given = given
        self.wanted = wanted
        self.available = available
        self.smallest = smallest
        self.largest = largest


class DivergedError(TrainingError):
    """The loss, or a trained value, is no longer a finite number that an adapter may hold."""

    def __init__(self, what: str, step: int, learning_rate: float | None = None) -> None:
        rate = "" if learning_rate is None else f"; the learning rate is {learning_rate:g}"
        super().__init__(
            f"the training diverged at step {step}", what + rate, "Lower the learning rate"
        )
        self.step = step
        self.learning_rate = learning_rate


class NotANumberError(ArithmeticError):
    """A score that positions should be ranked by is not a number."""

    def __init__(self) -> None:
        super().__init__("a score that positions are ranked by is not a number")


class BaseChangedError(TrainingError):
    """The base model is not bit for bit what it was before the run: a defect of this program."""

    def __init__(self, before: str, after: str) -> None:
        super().__init__(
            "the training run changed the base model",
            f"its fingerprint was {before[:16]}… before and is {after[:16]}… now",
            "Discard the model in memory, load it again, and report this",
        )
        self.before = before
        self.after = after


class AdapterError(TrainingError):
    """An adapter that a run should begin with, or leave alone, cannot be used.

    Attributes:
        reference: what was given.
        problem: what is wrong with it.
        field: the parameter that names it, like `parents.1`; empty until somebody has said it.
    """

    def __init__(self, reference: str, problem: str, remedy: str) -> None:
        super().__init__(f"the adapter {reference!r} cannot be used", problem, remedy)
        self.reference = reference
        self.problem = problem
        self.field = ""

    def named_by(self, field: str) -> None:
        """Say which parameter names the adapter."""
        self.field = field
        self.what = f"the adapter {self.reference!r} of {field} cannot be used"


class OverlapError(AdapterError):
    """Two adapters of a chain train the same entries.

    Attributes:
        weight: the first weight where they do.
        shared: entries of that weight that both have.
    """

    def __init__(self, reference: str, other: str, weight: str, shared: int) -> None:
        super().__init__(
            reference,
            f"it shares {shared:,} entries of {weight} with {other!r}",
            "Give a chain whose adapters were trained one beside the other",
        )
        self.other = other
        self.weight = weight
        self.shared = shared


class NotSelectedError(TrainingError):
    """The run is too short for its method ever to choose positions."""

    def __init__(self, steps: int, needed: int) -> None:
        super().__init__(
            f"{steps} steps are too few for this method",
            f"it chooses its positions after {needed} steps, and trains them from then on",
            "Make more steps, or set warmup_steps",
        )
        self.steps = steps
        self.needed = needed


class WorkFolderError(TrainingError):
    """The work folder holds the checkpoints of another run, or in another format."""

    def __init__(self, path: Path, problem: str | None = None) -> None:
        other = "it holds the checkpoints of a run with other settings, data, adapters or base"
        super().__init__(
            f"the work folder {path} cannot be used",
            problem or other,
            "Give another folder, or remove this one",
        )
        self.path = path


class MissingPackageError(TrainingError):
    """The method needs a package that is not installed.

    Attributes:
        package: its name.
        method: that needs it.
    """

    def __init__(self, package: str, method: str) -> None:
        super().__init__(
            f"the method {method} needs the package {package}",
            "it is not installed",
            f"pip install {package}",
        )
        self.package = package
        self.method = method


class StoppedError(TrainingError):
    """The run was asked to stop, and did after a step.

    Attributes:
        step: the last one.
        resumable: whether a checkpoint of that step lies in the work folder.
    """

    def __init__(self, step: int, *, resumable: bool) -> None:
        super().__init__(
            f"the run was stopped after step {step}",
            "somebody asked for it",
            "Resume it" if resumable else "Start it again",
        )
        self.step = step
        self.resumable = resumable
