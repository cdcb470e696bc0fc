"""Reading and writing sizes, times and tables; the server's settings."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import typer

from gossamer.cli.errors import CommandError, command_error
from gossamer.cli.keys import parse_duration
from gossamer.cli.load import percentile
from gossamer.cli.options import load_settings, parse_size
from gossamer.cli.output import percent, size, table
from gossamer.store.catalog.errors import AlreadyOwned, RegistryBusy, UploadInterrupted
from gossamer.store.errors import AdapterFileError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4GiB", 4 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29), ("7", 7), ("2 kb", 2048)],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "4 apples", "GiB", "1e9", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_size(text)


def test_sizes_are_written() -> None:
    assert [size(n) for n in (0, 1023, 1024, 93 << 20, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "93.0 MiB",
        "5.0 GiB",
    ]
    assert percent(0.005) == "0.5 %"


def test_durations_are_read() -> None:
    assert parse_duration("90d") == timedelta(days=90)
    assert parse_duration("30m") == timedelta(minutes=30)
    for text in ("", "d", "0d", "1y", "-1d", "1.5h"):
        with pytest.raises(typer.BadParameter):
            parse_duration(text)


def test_tables_are_aligned() -> None:
    rows = [("a", "1"), ("longer", "1000")]
    assert table(("NAME", "N"), rows, ("N",)) == "NAME       N\na          1\nlonger  1000"


def test_percentiles_interpolate() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.75) == 1.75
    assert percentile([], 0.5) is None


def test_settings_come_from_options_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOSSAMER_PORT", "9000")
    monkeypatch.setenv("GOSSAMER_HOST", "::1")
    settings = load_settings(port=9001, data_dir=tmp_path, host=None)
    assert (settings.port, settings.host, settings.data_dir) == (9001, "::1", tmp_path)
    monkeypatch.setenv("GOSSAMER_MAX_ROWS", "many")
    with pytest.raises(CommandError) as refused:
        load_settings()
    assert "max_rows" in refused.value.why
    assert "GOSSAMER_MAX_ROWS" in refused.value.remedy
    assert refused.value.code == 2


def test_the_rooms_errors_become_three_lines() -> None:
    for error, word in (
        (AlreadyOwned(Path("/data")), "--data-dir"),
        (RegistryBusy(5), "Try again"),
        (UploadInterrupted("sql"), "doctor"),  # no row of its own: that of its base class
        (AdapterFileError("invalid_adapter_file", "bad\nthing", tensor="w"), "docs/format.md"),
        (FileNotFoundError(2, "No such file", "x.txt"), "path"),
    ):
        found = command_error(error)
        assert found is not None
        assert word in found.remedy
        assert all(line and "\n" not in line for line in (found.what, found.why, found.remedy))
    assert command_error(ZeroDivisionError()) is None
