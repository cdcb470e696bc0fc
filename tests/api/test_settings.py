"""Settings: from the environment, frozen, and refused when they make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from gossamer.api.device import Device
from gossamer.api.services import engine_config
from gossamer.api.settings import Limits, Settings
from gossamer.engine.config import EngineConfig
from gossamer.store.catalog.errors import BlobsUrlInvalid

HOST = Device(torch.device("cpu"), torch.float32, "cpu")


def test_the_environment_is_read_once_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_PORT", "9001")
    monkeypatch.setenv("GOSSAMER_DATA_DIR", "/data")
    monkeypatch.setenv("GOSSAMER_LIMITS__QUEUED", "7")
    settings = Settings()
    assert (settings.port, settings.data_dir, settings.limits.queued) == (9001, Path("/data"), 7)
    assert settings.limits.json_bytes == 8 << 20
    assert Settings(port=1).port == 1  # what is given goes first


def test_what_is_said_about_fusing_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine_config(Settings(), HOST)
    fields = ("fuse", "fuse_share", "fuse_hold_steps", "fuse_hold_share", "fuse_16bit")
    for field in (*fields, "fuse_deviation"):
        assert getattr(plain, field) == getattr(EngineConfig(), field), "one default, said twice"
    monkeypatch.setenv("GOSSAMER_FUSE", "false")
    monkeypatch.setenv("GOSSAMER_FUSE_SHARE", "0.75")
    monkeypatch.setenv("GOSSAMER_FUSE_HOLD_STEPS", "16")
    monkeypatch.setenv("GOSSAMER_FUSE_HOLD_SHARE", "0.25")
    monkeypatch.setenv("GOSSAMER_FUSE_16BIT", "true")
    monkeypatch.setenv("GOSSAMER_FUSE_DEVIATION", "0.1")
    given = engine_config(Settings(), HOST)
    assert [getattr(given, field) for field in fields] == [False, 0.75, 16, 0.25, True]
    assert given.fuse_deviation == 0.1


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1
    with pytest.raises(ValidationError):
        Limits().queued = 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "65536"),
        ("MEMORY_BYTES", "0"),
        ("DRAIN_SECONDS", "inf"),
        ("LOG_LEVEL", "loud"),
        ("FUSE_SHARE", "0"),
        ("FUSE_SHARE", "nan"),
        ("FUSE_HOLD_SHARE", "1"),
        ("FUSE_HOLD_STEPS", "0"),
        ("FUSE_DEVIATION", "inf"),
        ("LIMITS__QUEUED", "-1"),
        ("LIMITS__NO_SUCH_LIMIT", "1"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"GOSSAMER_{name}", value)
    with pytest.raises(ValidationError):
        Settings()


def test_a_url_with_a_secret_in_it_is_refused_before_anybody_can_show_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOSSAMER_BLOBS_URL", "s3://key:sEcReT@bucket")
    with pytest.raises(BlobsUrlInvalid) as refused:
        Settings()
    assert "sEcReT" not in str(refused.value)
    monkeypatch.setenv("GOSSAMER_BLOBS_URL", "s3://bucket/prefix")
    assert Settings().blobs_url == "s3://bucket/prefix"
