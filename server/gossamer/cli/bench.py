"""`gossamer bench`: what a running server does under load, and what adapters cost in it."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.errors import CommandError
from gossamer.cli.options import DEFAULT_URL, AsJson, Key, Url
from gossamer.cli.output import Output, table

if TYPE_CHECKING:
    from gossamer.cli.load import Run

_TOGETHER = "(together)"
_TEXT = (
    "The station lies at the edge of the town, where the river bends to the south. Every morning "
    "the first train brings the newspapers, the post and a handful of travellers"
)


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A model to measure beside base; may be given several times. "
            "Several are also measured all in one batch.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="COUNT", min=1, max=1024, help="Requests at a time.")
    ] = 8,
    requests: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Requests of one run.")
    ] = 32,
    max_tokens: Annotated[
        int, typer.Option(metavar="COUNT", min=2, help="Tokens of an answer, exactly.")
    ] = 64,
    rounds: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Runs of each; their medians are shown.")
    ] = 3,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Prompts, one a line, taken in turn.  [default: one of 40 tokens]",
        ),
    ] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: AsJson = False,
) -> None:
    """Measure a running server: throughput, time to first token, time between tokens.

    base is measured first and every model beside it, turn about, so that a machine that grows slow
    or fast does so for all of them. Every prompt is new to the server: no prefix is shared.
    """
    from gossamer.cli.load import Ask, run
    from gossamer.cli.remote import Server

    output = Output(as_json)
    texts = _texts(prompts)
    with Server(url, key) as server:
        base = server.call("GET", "/v1/models")["data"][0]["root"]
        address = server.url
    workloads = _workloads(model or [])
    runs: dict[str, list[Run]] = {name: [] for name in workloads}
    nonce = secrets.token_hex(4)
    with output.progress() as bars:
        task = bars.add_task("measuring", total=rounds * len(workloads))
        for turn in range(rounds):
            for name, members in workloads.items():
                asks = [
                    Ask(members[i % len(members)], f"{nonce} {turn} {name} {i}. {text}")
                    for i, text in zip(range(requests), cycle(texts), strict=False)
                ]
                done = run(address, key, asks, concurrency=concurrency, max_tokens=max_tokens)
                runs[name].append(done)
                bars.advance(task)
    rows = figures(runs)
    document = {
        "url": address,
        "base": base,
        "concurrency": concurrency,
        "requests": requests,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "models": rows,
    }
    output.result(document, _table(rows))
    _complain(runs)


def figures(runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Of every workload: medians over its runs of the throughput, percentiles over all its
    requests of the times, in seconds; `ratio` is its throughput over that of the first."""
    from gossamer.cli.load import percentile

    rows: list[dict[str, Any]] = []
    for name, found in runs.items():
        firsts = [first for run in found for first in run.firsts()]
        gaps = [gap for run in found for gap in run.gaps()]
        rate = statistics.median(run.tokens_per_second for run in found)
        reference = rows[0]["tokens_per_second"] if rows else rate
        rows.append(
            {
                "model": name,
                "tokens_per_second": rate,
                "ratio": rate / reference if reference else None,
                "ttft": {f"p{p}": percentile(firsts, p / 100) for p in (50, 95, 99)},
                "itl": {f"p{p}": percentile(gaps, p / 100) for p in (50, 95, 99)},
                "tokens": sum(run.tokens for run in found),
                "errors": sum(len(run.errors) for run in found),
            }
        )
    return rows


def _workloads(models: Sequence[str]) -> dict[str, Sequence[str]]:
    names = list(dict.fromkeys(["base", *models]))
    alone: dict[str, Sequence[str]] = {name: [name] for name in names}
    return alone | ({_TOGETHER: names[1:]} if len(names) > 2 else {})


def _texts(file: Path | None) -> list[str]:
    if file is None:
        return [_TEXT]
    texts = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if not texts:
        raise CommandError(
            f"{file} has no prompts.", "All its lines are blank.", "Put one prompt on each line."
        )
    return texts


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("MODEL", "TOK/S", "VS BASE", "TTFT P50", "P95", "ITL P50", "P95", "P99", "ERRORS")
    lines = [
        (
            row["model"],
            f"{row['tokens_per_second']:.1f}",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
            *(_ms(row["ttft"][p]) for p in ("p50", "p95")),
            *(_ms(row["itl"][p]) for p in ("p50", "p95", "p99")),
            str(row["errors"]),
        )
        for row in rows
    ]
    return table(head, lines, head[1:])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"


def _complain(runs: Mapping[str, Sequence[Run]]) -> None:
    failed = {name: [e for run in found for e in run.errors] for name, found in runs.items()}
    for name, errors in failed.items():
        if errors:
            raise CommandError(
                f"{len(errors)} requests of {name} failed; their figures are worth nothing.",
                errors[0],
                "Look into the server's log, or ask for less at a time with --concurrency.",
            )
