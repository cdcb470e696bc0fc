"""`gossamer doctor`: whether this machine, this installation and this data folder can serve."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import typer

from gossamer.cli.errors import FAILURE
from gossamer.cli.options import AsJson, Base, DataDir, Port, load_settings
from gossamer.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gossamer.api.settings import Settings

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        state: `warn` is worth a look, with `fail` the server will not start or not serve.
        found: one line.
        remedy: what to do; empty when it is `ok`.
    """

    check: str
    state: State
    found: str
    remedy: str = ""


def doctor(
    base: Base = None, data_dir: DataDir = None, port: Port = None, as_json: AsJson = False
) -> None:
    """Look for what would keep the server from serving, and say what to do about it.

    Nothing is fetched and nothing is changed. The exit code is 1 when a check fails; warnings do
    not count.
    """
    from gossamer.cli.checks import CHECKS

    output = Output(as_json)
    settings = load_settings(base=base, data_dir=data_dir, port=port)
    findings = list(_examine(CHECKS, settings, output))
    failed = any(finding.state == "fail" for finding in findings)
    output.result({"ok": not failed, "checks": [asdict(finding) for finding in findings]})
    if failed:
        raise typer.Exit(FAILURE)


def _examine(
    checks: Sequence[Callable[[Settings], Iterable[Finding]]], settings: Settings, output: Output
) -> Iterable[Finding]:
    for check in checks:
        for finding in check(settings):
            yield finding
            if not output.as_json:
                text = f"{finding.state:<4}  {finding.check:<11}  {finding.found}"
                typer.echo(text + (f"\n{'':19}{finding.remedy}" if finding.remedy else ""))
