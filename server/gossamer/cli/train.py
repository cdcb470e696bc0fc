"""`gossamer train`: train an adapter on this machine and put it where it is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gossamer.cli.errors import INTERRUPTED
from gossamer.cli.options import AsJson, Assignments, Base, DataDir, Key, Threads, load_settings
from gossamer.cli.output import Output, percent, size
from gossamer.cli.stores import open_store

if TYPE_CHECKING:
    from gossamer.api.settings import Settings
    from gossamer.base.load import BaseFiles
    from gossamer.cli.destination import Destination
    from gossamer.training import TrainConfig
    from gossamer.training.run import TrainResult
    from gossamer.training.starting import Adapters


def train(
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help='Examples, one JSON object a line: {"prompt": …, "completion": …} or '
            '{"messages": […]}.',
        ),
    ],
    push: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Keep the result as a new version of this adapter: in the data folder, or with "
            "--url on a server.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result to a file.")
    ] = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="The training method.")] = "sparta",
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="SpaRTA's: of the parameters that is trained.  [default: 0.005]"
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Weights to train: q, k, v, o, gate, up, down, separated by commas, or "
            "all-linear.  [default: the method's]",
        ),
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Examples to measure on."),
    ] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Hold out this share of the examples instead."),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Passes over the data.  [default: 1]")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Updates; overrides --epochs.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Examples at a time.  [default: 16]")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Its peak.  [default: the method's]")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Of an example.  [default: 512]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Of everything random.  [default: 0]")
    ] = None,
    setting: Assignments = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="What NAME means in the method's parameters: an adapter file. Other names are "
            "adapters of the data folder. May be given several times.",
            show_default=False,
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            help="Keep there what is needed to go on: the same command continues a run that was "
            "ended or killed.",
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where.  [default: auto]")
    ] = None,
    threads: Threads = None,
    base: Base = None,
    data_dir: DataDir = None,
    tenant: Annotated[
        str, typer.Option(metavar="NAME", help="Whose adapter it is, in the data folder.")
    ] = "default",
    activate: Annotated[
        bool,
        typer.Option(
            "--activate/--no-activate", help="Make it the version that the bare name means."
        ),
    ] = True,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Push to this server, not the data folder.", show_default=False
        ),
    ] = None,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Train an adapter on this machine; --push or --out says where it goes.

    Where it goes is looked at before the training begins. With --work, Ctrl-C ends the run after
    the step that it is at. docs/training.md explains the methods.
    """
    from gossamer.cli.destination import Destination
    from gossamer.training import TrainConfig

    if push is None and out is None:
        raise typer.BadParameter("say where the result goes", param_hint="--push or --out")
    if push is None and url is not None:
        raise typer.BadParameter("say what to push", param_hint="--push")
    chosen = {
        "data": data,
        "method": method,
        "eval_data": eval_data,
        "eval_fraction": eval_fraction,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "seed": seed,
        "device": device,
    }
    known = {name: value for name, value in chosen.items() if value is not None}
    config = TrainConfig.of(**settings_of(known, density, targets, setting or []))
    if config.checkpoint_steps is not None and (push is None or url is not None):
        problem = "checkpoints are kept in the data folder: give --push, without --url"
        raise typer.BadParameter(problem, param_hint="checkpoint_steps")
    settings = load_settings(base=base, data_dir=data_dir, threads=threads)
    files = files_of(adapter or [], config.parameters.references())
    goal = Destination(settings, push, out, tenant, activate, url, key)
    _train(_Order(config, settings, files, work), goal, Output(as_json))


def settings_of(
    known: Mapping[str, Any], density: float | None, targets: str | None, extra: Sequence[str]
) -> dict[str, Any]:
    """What `TrainConfig.of` takes. An extra `NAME=VALUE` is a parameter of the method where the
    method declares that name, else a setting of the run.

    Raises:
        typer.BadParameter: an extra one is not of that form.
        UnknownMethod
    """
    from gossamer.cli.assignments import read_assignments
    from gossamer.jobs.methods import find_declaration

    parameters, settings = read_assignments(find_declaration(known["method"]), extra)
    for name, value in (("density", density), ("targets", targets)):
        if value is not None:
            parameters.setdefault(name, value)
    return {**known, **settings, "parameters": parameters}


def files_of(given: Sequence[str], references: Sequence[str]) -> dict[str, Path]:
    """Name → file, from `NAME=FILE`.

    Args:
        references: those of the parameters; each name must be one of them.

    Raises:
        typer.BadParameter
    """
    files: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        problem = None
        if not equals or not name or not file:
            problem = f"{text!r} is not NAME=FILE"
        elif not Path(file).is_file():
            problem = f"there is no file {file!r}"
        elif name in files:
            problem = f"{name} is given twice"
        elif name not in references:
            problem = f"no parameter of the method refers to {name}"
        if problem is not None:
            raise typer.BadParameter(problem, param_hint="--adapter")
        files[name] = Path(file)
    return files


@dataclass(frozen=True)
class _Order:
    """What to train.

    Attributes:
        files: adapters that are files, by the names that the parameters have for them.
        work: where the run keeps what it needs to go on.
    """

    config: TrainConfig
    settings: Settings
    files: Mapping[str, Path]
    work: Path | None


def _train(order: _Order, goal: Destination, output: Output) -> None:
    from gossamer.base.sources import open_base
    from gossamer.cli.bars import base_stages
    from gossamer.training.methods import find_method

    settings = order.settings
    find_method(order.config.method)  # before the base is fetched and loaded
    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    data_dir = settings.data_dir.expanduser().resolve()
    with base_stages(output) as progress:
        base = open_base(settings.base, data_dir, progress=progress)
    goal.check(base)
    result = _run(order, base, goal, output)
    kept = goal.keep(result, output)
    output.result({"event": "finished", **outcome(result), **kept}, _summary(result, kept))


def _run(order: _Order, base: BaseFiles, goal: Destination, output: Output) -> TrainResult:
    from gossamer.cli.signals import stopping
    from gossamer.cli.watching import watching
    from gossamer.training import train as run
    from gossamer.training.errors import StoppedError

    try:
        with ExitStack() as stack:
            adapters = stack.enter_context(_adapters(order, base, goal.tenant))
            given: dict[str, Any] = {"adapters": adapters}
            if order.config.checkpoint_steps is not None:
                given["keep"] = partial(goal.keep_checkpoint, output)
            if order.work is not None:
                stop = stack.enter_context(stopping())
                given |= {"folder": order.work, "stop": stop.is_set}
            watcher = stack.enter_context(watching(output))
            return run(order.config, base, watcher=watcher, **given)
    except StoppedError as error:
        output.note(f"Stopped after step {error.step}; the same command goes on from there.")
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def _adapters(order: _Order, base: BaseFiles, tenant: str) -> Iterator[Adapters]:
    """What the method's parameters refer to: files first, then the tenant's adapters. The data
    folder's store is opened only if there is a need."""
    from gossamer.training.references import CatalogAdapters, FileAdapters

    if order.files.keys() >= set(order.config.parameters.references()):
        yield FileAdapters(order.files)
        return
    with open_store(order.settings, base) as store:
        yield FileAdapters(order.files, CatalogAdapters(store.catalog, tenant))


def outcome(result: TrainResult) -> dict[str, Any]:
    """What a run made, for programs."""
    from gossamer.store.format import digest

    evaluations = [asdict(evaluation) for evaluation in result.evaluations]
    return {
        "steps": len(result.losses),
        "loss": result.losses[-1] if result.losses else None,
        "evaluations": evaluations,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "peak_memory": dict(result.peak_memory),
        "rounding_error": result.rounding.relative_error,
        "nnz": result.delta_set.nnz,
        "digest": digest(result.delta_set),
    }


def _memory(peaks: Mapping[str, int]) -> str:
    """The dense phases of a method hold more than the sparse one, so each is said."""
    each = [f"{size(nbytes)} in {phase}" for phase, nbytes in peaks.items()]
    return "at most " + ", ".join(each) if each else "no step left to make"


def _summary(result: TrainResult, kept: dict[str, Any]) -> str:
    lines = [
        f"Trained {len(result.losses)} steps in {result.seconds:.0f} s "
        f"({result.tokens / max(result.seconds, 1e-9):.0f} tokens/s, "
        f"{_memory(result.peak_memory)})."
    ]
    if len(result.evaluations) > 1:
        first, last = result.evaluations[0], result.evaluations[-1]
        lines.append(
            f"Held out: loss {first.loss:.3f} → {last.loss:.3f}, token accuracy "
            f"{percent(first.token_accuracy)} → {percent(last.token_accuracy)}, exact match "
            f"{percent(first.exact_match)} → {percent(last.exact_match)}."
        )
    if kept["file"] is not None:
        lines.append(f"Written to {kept['file']} ({size(kept['bytes'])}).")
    if kept["version"] is not None:
        lines.append(f"Kept as {kept['version']['id']}, {kept['version']['digest']}.")
    return "\n".join(lines)
