"""Help is there at once, brings in nothing heavy, and docs/cli.md tells the same."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.cli import reference
from tests.cli.running import GOSSAMER, environment, run

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
HEAVY = ("torch", "transformers", "numpy", "sqlalchemy", "fastapi", "httpx", "rich.progress")
COMMANDS = (
    "up",
    "chat",
    "adapters push",
    "adapters ls",
    "adapters import",
    "adapters export",
    "adapters formats",
    "train",
    "jobs create",
    "jobs ls",
    "jobs logs",
    "methods",
    "worker",
    "keys create",
    "bench",
    "doctor",
)


def test_the_page_in_docs_is_current() -> None:
    assert DOCS.read_text() == reference.render(), (
        "run: python -m gossamer.cli.reference docs/cli.md"
    )


def test_the_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    page = reference.render()
    monkeypatch.setenv("COLUMNS", "47")
    assert reference.render() == page
    assert "Talk to a model" in page
    assert "### gossamer adapters\n" in page
    assert "#### gossamer adapters push\n" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_and_describes_each_option(command: str) -> None:
    text = run(*command.split(), "--help").stdout
    assert "--json" in text
    options = [line for line in text.splitlines() if line.startswith(("  -", "  --"))]
    assert len(options) >= 2


def test_help_takes_less_than_half_a_second() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([GOSSAMER, "--help"], check=True, capture_output=True, env=environment())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # of this process alone: other processes of the machine are not its fault
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "adapters push --help",
        "adapters import --help",
        "adapters export --help",
        "keys create --help",
        "jobs create --help",
        "worker --help",
        "methods",
        "methods lotto",
    ],
)
def test_help_imports_nothing_heavy(arguments: str) -> None:
    assert _imported(arguments) == set()


def test_commands_that_talk_to_a_server_import_no_torch(tmp_path: Path) -> None:
    nowhere = "--url http://127.0.0.1:1"
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    assert "torch" not in _imported("adapters formats")
    pack = f"adapters export nobody --to packed --out {tmp_path / 'out'}"
    for command in (pack, "adapters ls", "chat -m x", "jobs ls", f"jobs create --data {data}"):
        assert "torch" not in _imported(f"{command} {nowhere}")
    assert "torch" not in _imported(f"keys ls --data-dir {tmp_path}")


def _imported(arguments: str) -> set[str]:
    code = f"""
import sys
sys.argv = ["gossamer", *{arguments.split()!r}]
from gossamer.cli import main
try:
    main()
except SystemExit:
    pass
print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return set(done.stdout.rpartition("imported:")[2].split())


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert run("--version").stdout.strip() == version("gossamer")


def test_what_is_not_typed_right_ends_with_2() -> None:
    for arguments in (["nonsense"], ["up", "--port", "x"], ["adapters", "push"], ["up", "--nope"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Usage:" in result.stderr
