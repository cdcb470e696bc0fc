"""`gossamer train`: train an adapter on this machine and put it where it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gossamer.cli.options import AsJson, Base, DataDir, Key, load_settings
from gossamer.cli.output import Output, percent, size

if TYPE_CHECKING:
    from gossamer.api.settings import Settings
    from gossamer.cli.destination import Destination
    from gossamer.training import TrainConfig
    from gossamer.training.run import TrainResult


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
        typer.Option(metavar="SHARE", help="Of the parameters that is trained.  [default: 0.005]"),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Weights to train: q, k, v, o, gate, up, down, separated by commas, or "
            "all-linear.  [default: v,o]",
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
        float | None, typer.Option(metavar="NUMBER", help="Its peak.  [default: by the density]")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Of an example.  [default: 512]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="Of everything random.  [default: 0]")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other setting of docs/training.md; may be given several times.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where.  [default: auto]")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="COUNT", min=1, help="Of one product.  [default: torch's choice]"),
    ] = None,
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

    Where it goes is looked at before the training begins. docs/training.md explains the methods and
    every setting.
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
    settings = load_settings(base=base, data_dir=data_dir, threads=threads)
    goal = Destination(settings, push, out, tenant, activate, url, key)
    _train(config, settings, goal, Output(as_json))


def settings_of(
    known: Mapping[str, Any], density: float | None, targets: str | None, extra: Sequence[str]
) -> dict[str, Any]:
    """What `TrainConfig.of` takes. An extra `NAME=VALUE` is a parameter of the method where the
    method declares that name, else a setting of the run.

    Raises:
        typer.BadParameter: an extra one is not of that form.
        UnknownMethodError
    """
    from gossamer.training import find_method

    declared = find_method(known["method"]).parameters.model_fields
    settings, parameters = dict(known), dict[str, Any]()
    for name, value in (("density", density), ("targets", targets)):
        if value is not None:
            parameters[name] = value
    for text in extra:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
        (parameters if name in declared else settings)[name] = value
    return {**settings, "parameters": parameters}


def _train(config: TrainConfig, settings: Settings, goal: Destination, output: Output) -> None:
    from gossamer.base.sources import open_base
    from gossamer.cli.bars import base_stages
    from gossamer.cli.watching import watching
    from gossamer.training import train as run

    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    data_dir = settings.data_dir.expanduser().resolve()
    with base_stages(output) as progress:
        base = open_base(settings.base, data_dir, progress=progress)
    goal.check(base)
    with watching(output) as watcher:
        result = run(config, base, watcher=watcher)
    kept = goal.keep(result, output)
    output.result({"event": "finished", **outcome(result), **kept}, _summary(result, kept))


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
        "peak_memory": result.peak_memory,
        "rounding_error": result.rounding.relative_error,
        "nnz": result.delta_set.nnz,
        "digest": digest(result.delta_set),
    }


def _summary(result: TrainResult, kept: dict[str, Any]) -> str:
    lines = [
        f"Trained {len(result.losses)} steps in {result.seconds:.0f} s "
        f"({result.tokens / max(result.seconds, 1e-9):.0f} tokens/s, "
        f"at most {size(result.peak_memory)})."
    ]
    if len(result.evaluations) > 1:
        first, last = result.evaluations[0], result.evaluations[-1]
        lines.append(
            f"Held out: loss {first.loss:.3f} → {last.loss:.3f}, token accuracy "
            f"{percent(first.token_accuracy)} → {percent(last.token_accuracy)}."
        )
    if kept["file"] is not None:
        lines.append(f"Written to {kept['file']} ({size(kept['bytes'])}).")
    if kept["version"] is not None:
        lines.append(f"Kept as {kept['version']['id']}, {kept['version']['digest']}.")
    return "\n".join(lines)
