"""Adapters of other libraries, uploaded as their files are."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from gossamer.api import imports
from gossamer.api.routes import adapters
from gossamer.store.exchange import packing
from tests.api.foreign import PROMPT, TOKENS, Foreign, greedy, shira, sparta
from tests.api.running import Running, running
from tests.api.sockets import connected, head
from tests.api.test_gone import wait_for
from tests.exchange.support import USES_PEFT, load, tensor_file

pytestmark = USES_PEFT
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DELTAS = "sparse_deltas.safetensors"
_MIB = 1 << 20


@pytest.fixture(scope="module")
def shira_files(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return shira(api_base, tmp_path_factory.mktemp("shira"))


@pytest.fixture(scope="module")
def sparta_files(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    return sparta(api_base, tmp_path_factory.mktemp("sparta") / "adapter")


@pytest.fixture
def key(api: Running, request: pytest.FixtureRequest) -> str:
    """The key of a tenant that nobody else uses."""
    return api.new_key(f"imports-{abs(hash(request.node.name))}")


def spooled(api: Running) -> list[Path]:
    return list((api.services.settings.data_dir / "store" / "spool").iterdir())


def post(
    api: Running,
    key: str,
    files: Mapping[str, bytes] | list[tuple[str, Any]],
    field: str = "files",
    **data: str,
) -> httpx.Response:
    """Upload; nothing may stay behind, whatever the reply."""
    if isinstance(files, Mapping):
        files = [(field, (name, content)) for name, content in files.items()]
    with api.http(key) as http:
        reply = http.post("/v1/adapters", data={"name": "theirs", **data}, files=files)
    assert spooled(api) == []
    return reply


def refused(reply: httpx.Response, status: int, code: str | None, *parts: str) -> None:
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code), reply.text
    for part in parts:
        assert part in error["message"]


def text_of(api: Running, key: str, model: str) -> str:
    answer = api.client(key).completions.create(
        model=model,
        prompt=PROMPT,
        temperature=0,
        max_tokens=TOKENS,
        extra_body={"ignore_eos": True},
    )
    return answer.choices[0].text


@pytest.mark.parametrize("field", ["file", "files"])
@pytest.mark.parametrize("form", ["peft-shira", "peft-sparta"])
def test_it_answers_as_the_other_librarys_model(
    api: Running,
    key: str,
    api_base: Path,
    request: pytest.FixtureRequest,
    form: str,
    field: str,
) -> None:
    foreign: Foreign = request.getfixturevalue(form.removeprefix("peft-") + "_files")
    wanted = (CONFIG, WEIGHTS) if form == "peft-shira" else ("config.json", DELTAS)
    reply = post(api, key, foreign.files(*wanted), field)
    assert reply.status_code == 201, reply.text
    version = reply.json()
    assert (version["id"], version["current"], version["base_verified"]) == (
        "theirs:1",
        True,
        False,
    )
    assert version["record"]["imported"]["format"] == form
    assert version["nnz"] > 0
    assert form in version["warnings"][0]
    assert any("which base model" in warning for warning in version["warnings"])
    assert text_of(api, key, "theirs") == foreign.text != greedy(load(api_base), api_base)
    again = post(api, key, foreign.files(*wanted), field)
    assert again.json()["id"] == "theirs:1"  # what says the same makes no new version


def test_the_fields_of_the_form_mean_what_they_always_do(
    api: Running, key: str, shira_files: Foreign
) -> None:
    files = shira_files.files(CONFIG, WEIGHTS)
    assert post(api, key, files, activate="false").json()["current"] is False
    refused(post(api, key, files, name="Not A Name"), 400, "invalid_name")
    refused(post(api, key, files, name="base"), 400, "reserved_name")
    refused(post(api, key, files, colour="red"), 400, "unknown_field")
    parts: list[tuple[str, Any]] = [("files", item) for item in files.items()]
    with api.http(key) as http:
        refused(http.post("/v1/adapters", files=parts), 400, "missing_field", "name")
        late = http.post("/v1/adapters", files=[*parts, ("name", (None, "late"))])
    assert late.json()["id"] == "late:1"


def test_what_the_format_does_not_read_is_told(
    api: Running, key: str, shira_files: Foreign
) -> None:
    files = shira_files.files()
    assert "README.md" in files
    warnings = post(api, key, files).json()["warnings"]
    assert "Not read: README.md." in warnings


def test_one_file_can_be_a_whole_adapter(api: Running, key: str, sparta_files: Foreign) -> None:
    """And a packed one is taken as it is, whatever it is called."""
    version = post(api, key, sparta_files.files(DELTAS)).json()
    assert version["record"]["imported"]["format"] == "peft-sparta"
    assert text_of(api, key, "theirs") == sparta_files.text
    data = api.make_file(5)
    assert post(api, key, {DELTAS: data}, name="packed").status_code == 201
    with api.http(key) as http:
        assert http.get("/v1/adapters/packed/content").content == data


def test_a_second_name_of_a_tied_parameter_may_be_listed(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """As other writers list the output projection, which is the embedding here."""
    with running(tiny_dir("llama", tied=True), tmp_path) as server:
        name, head = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
        key = server.new_key("tied")
        for count in (0, 1):
            tensors = {
                f"indices.{name}": np.array([[1, 2]], "<i4"),
                f"deltas.{name}": np.ones(1, "<f4"),
                f"indices.{head}": np.zeros((count, 2), "<i4"),
                f"deltas.{head}": np.ones(count, "<f4"),
            }
            reply = post(server, key, {DELTAS: tensor_file(tensors)})
            if count:
                refused(reply, 422, "unsupported_module", head)
            else:
                assert (reply.status_code, reply.json()["nnz"]) == (201, 1), reply.text


def test_half_of_an_adapter_is_refused(api: Running, key: str, shira_files: Foreign) -> None:
    code = "unsupported_file"
    weights, config = shira_files.files(WEIGHTS), shira_files.files(CONFIG)
    refused(post(api, key, weights), 422, code, "gossamer adapters import")
    refused(post(api, key, config), 422, "invalid_adapter_file")
    refused(post(api, key, {**weights, "notes.txt": b"x"}), 422, code, WEIGHTS)
    half = post(api, key, {**config, "notes.txt": b"x"})
    refused(half, 422, "invalid_adapter_file", f"{WEIGHTS} is missing")


def test_pickles_and_formats_that_need_the_base_name_the_command(
    api: Running, key: str, shira_files: Foreign
) -> None:
    code, command = "unsupported_file", "gossamer adapters import"
    pickle = b"\x80\x02}q\x00." + bytes(100)
    for name in ("sparse_deltas.pt", "pytorch_diff.bin", "adapter.pt"):
        refused(post(api, key, {name: pickle}), 422, code, command)
    (config,) = shira_files.files(CONFIG).values()
    refused(post(api, key, {CONFIG: config, "adapter_model.bin": pickle}), 422, code, "pickle")
    other = json.dumps({"peft_type": "SUPERTUNING"}).encode()
    files = {CONFIG: other, **shira_files.files(WEIGHTS)}
    refused(post(api, key, files), 422, code, "peft-supertuning", command)


NAMES: dict[str, tuple[list[str | None], str | None]] = {
    "twice the same": ([CONFIG, CONFIG], "invalid_filename"),
    "a path": ([CONFIG, "../../etc/passwd"], "invalid_filename"),
    "an absolute path": (["/etc/passwd", CONFIG], "invalid_filename"),
    "backslashes": ([CONFIG, "..\\up"], "invalid_filename"),
    "the folder itself": ([CONFIG, ".."], "invalid_filename"),
    "too long": ([CONFIG, "x" * 256], "invalid_filename"),
    "too long in bytes": ([CONFIG, "é" * 128], "invalid_filename"),
    "a zero byte": ([CONFIG, "a\0b"], "invalid_filename"),
    "none": ([CONFIG, ""], "invalid_filename"),
    "nine": ([f"{n}.json" for n in range(9)], None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_files_cannot_have(api: Running, key: str, name: str) -> None:
    filenames, code = NAMES[name]
    boundary = "edge"
    body = f'--{boundary}\r\ncontent-disposition: form-data; name="name"\r\n\r\ntheirs\r\n'
    for filename in filenames:
        quoted = str(filename).replace("\\", "\\\\")
        disposition = f'form-data; name="files"; filename="{quoted}"'
        body += f"--{boundary}\r\ncontent-disposition: {disposition}\r\n\r\n{{}}\r\n"
    kind = f"multipart/form-data; boundary={boundary}"
    with api.http(key) as http:
        content = f"{body}--{boundary}--\r\n".encode()
        reply = http.post("/v1/adapters", content=content, headers={"content-type": kind})
    refused(reply, 400, code)
    assert reply.json()["error"]["param"] == "file"
    assert spooled(api) == []


def test_eight_files_are_not_too_many(api: Running, key: str) -> None:
    reply = post(api, key, {f"{n}.json": b"{}" for n in range(8)}, activate="true")
    refused(reply, 422, "unsupported_file", "0.json")


def hostile(api: Running) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """SHiRA files of the base's own weight that hold something else than they should."""
    name = "model.layers.0.self_attn.q_proj"
    rows, columns = api.services.engine.table[f"{name}.weight"]
    count = rows + columns
    config = json.dumps({"peft_type": "SHIRA", "r": 1}).encode()
    good = np.stack([np.arange(count) % rows, np.arange(count) % columns]).astype("<i4")

    def files(indices: Any, values: Any, module: str = name) -> dict[str, bytes]:
        prefix = f"base_model.model.{module}"
        tensors = {f"{prefix}.shira_indices": indices, f"{prefix}.shira_weight": values}
        return {CONFIG: config, WEIGHTS: tensor_file(tensors)}

    ones = np.ones(count, "<f4")
    outside, negative, infinite = good.copy(), good.copy(), ones.copy()
    outside[0, 3], negative[1, 3], infinite[5] = rows, -1, np.inf
    yield "outside", files(outside, ones), "invalid_adapter_file"
    yield "negative", files(negative, ones), "invalid_adapter_file"
    yield "infinite", files(good, infinite), "invalid_adapter_file"
    yield (
        "another base's",
        files(good, ones, "model.layers.9.self_attn.q_proj"),
        ("base_model_mismatch"),
    )
    yield "an embedding", files(good, ones, "model.embed_tokens"), "unsupported_module"
    yield "deep", {CONFIG: b"[" * 100_000, WEIGHTS: b"x"}, "unsupported_file"
    yield "no JSON", {CONFIG: b"{", WEIGHTS: b"x"}, "unsupported_file"
    yield "no tensors", {CONFIG: config, WEIGHTS: b""}, "invalid_adapter_file"


def test_hostile_files_get_their_4xx(api: Running, key: str) -> None:
    count = 0
    for name, files, code in hostile(api):
        reply = post(api, key, files)
        assert (reply.status_code, reply.json()["error"]["code"]) == (422, code), (name, reply.text)
        assert reply.json()["error"]["param"] == "file"
        count += 1
    assert count == 8
    with api.http(key) as http:
        assert http.get("/v1/adapters").json()["data"] == []


def test_files_that_expand_are_refused_before_they_are_read(
    api: Running, key: str, shira_files: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions of one byte become eight, and are sorted."""
    small = api.services.settings.limits.of_store().file
    monkeypatch.setattr(packing, "_ITEM_BYTES", small.max_decoded_bytes)
    reply = post(api, key, shira_files.files(CONFIG, WEIGHTS))
    refused(reply, 413, "adapter_too_large", "bytes of memory")


def test_a_header_is_bounded(api: Running, key: str, shira_files: Foreign) -> None:
    header = json.dumps({f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                         for n in range(40_000)}).encode()  # fmt: skip
    assert len(header) > 2 * _MIB
    weights = struct.pack("<Q", len(header)) + header
    reply = post(api, key, {**shira_files.files(CONFIG), WEIGHTS: weights})
    refused(reply, 413, "adapter_too_large", f"the header of {WEIGHTS}")
    # Nor is a format looked for in it.
    other = post(api, key, {"x.safetensors": weights, "y": b""})
    refused(other, 413, "adapter_too_large", "the header of x.safetensors")


@pytest.fixture(scope="module")
def small(api_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that takes little."""
    limits = {"adapter_bytes": 3 * _MIB, "adapter_bytes_per_tenant": 20_000}
    with running(api_base, tmp_path_factory.mktemp("small"), limits) as server:
        yield server


def test_all_files_together_are_bounded(small: Running, shira_files: Foreign) -> None:
    key = small.new_key("large")
    big = {"a.json": bytes(2 * _MIB), "b.json": bytes(_MIB + 1)}
    refused(post(small, key, big), 413, "request_too_large")
    fits = {"a.json": bytes(2 * _MIB), "b.json": bytes(_MIB)}
    refused(post(small, key, fits), 422, "unsupported_file")
    over = {"a.json": bytes(3 * _MIB), "b.json": bytes(_MIB)}
    refused(post(small, key, over), 413, "request_too_large")


def test_the_quota_counts_what_is_stored(small: Running, shira_files: Foreign) -> None:
    key = small.new_key("full")
    files = shira_files.files(CONFIG, WEIGHTS)
    stored = post(small, key, files).json()["bytes"]
    assert stored < 20_000 < sum(map(len, files.values())), "the packed file is what counts"
    other = small.make_file(9)
    assert len(other) > 20_000 - stored
    with small.http(key) as http:
        reply = http.post("/v1/adapters", data={"name": "more"}, files={"file": other})
    refused(reply, 413, "quota_exceeded")
    assert spooled(small) == []


def test_two_at_once_take_turns(
    api: Running, shira_files: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a version in the end, and no two were in memory at a time; others go on."""
    now: list[str] = []
    most, begun, may_end = [0], threading.Event(), threading.Event()
    pack = packing.pack

    def slowly(*args: Any, **kwargs: Any) -> Any:
        now.append("one")
        most[0] = max(most[0], len(now))
        begun.set()
        assert may_end.wait(60)
        now.pop()
        return pack(*args, **kwargs)

    monkeypatch.setattr(packing, "pack", slowly)
    keys = [api.new_key(f"at-once-{n}") for n in range(3)]
    replies: list[httpx.Response] = []

    def send(key: str) -> None:
        parts = [("files", item) for item in shira_files.files(CONFIG, WEIGHTS).items()]
        with api.http(key) as http:
            replies.append(http.post("/v1/adapters", data={"name": "x"}, files=parts))

    threads = [threading.Thread(target=send, args=[key]) for key in keys]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(30)
        time.sleep(0.3)  # for a second one to begin, if it could
        assert api.upload("plain", 21, keys[0])["id"] == "plain:1"
    finally:
        may_end.set()
        for thread in threads:
            thread.join()
    assert [reply.status_code for reply in replies] == [201] * 3
    assert most == [1]
    assert len({reply.json()["digest"] for reply in replies}) == 1
    assert spooled(api) == []
    assert not api.services.admission._uploads


def test_who_has_gone_before_his_turn_is_not_converted(
    api: Running, key: str, shira_files: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()
    converted: list[str] = []
    upload = imports.upload_files

    def slowly(*args: Any, **kwargs: Any) -> Any:
        converted.append(args[4])
        begun.set()
        assert may_end.wait(60)
        return upload(*args, **kwargs)

    monkeypatch.setattr(adapters, "upload_files", slowly)
    files = list(shira_files.files(CONFIG, WEIGHTS).items())
    request = httpx.Client().build_request(
        "POST",
        f"{api.url}/v1/adapters",
        data={"name": "gone"},
        files=[("files", file) for file in files],
    )
    body = request.read()
    kind = request.headers["content-type"]

    def send() -> None:
        parts = [("files", file) for file in files]
        with api.http(key) as http:
            http.post("/v1/adapters", data={"name": "stays"}, files=parts)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        assert begun.wait(30)
        with connected(api.url) as connection:
            length = len(body)
            connection.sendall(
                head("POST", "/v1/adapters", key, content_type=kind, content_length=length) + body
            )
            wait_for(lambda: len(spooled(api)) == 2 * len(files))
            time.sleep(0.2)  # for it to come to the end of its body
    finally:
        may_end.set()
        thread.join()
    wait_for(lambda: not api.services.admission._uploads)
    assert converted == ["stays"]
    assert spooled(api) == []
    with api.http(key) as http:
        assert [one["id"] for one in http.get("/v1/adapters").json()["data"]] == ["stays"]


def test_a_client_that_hangs_up_amid_a_file_leaves_nothing(api: Running, key: str) -> None:
    part = b'--e\r\ncontent-disposition: form-data; name="files"; filename="%s"\r\n\r\n'
    kind = "multipart/form-data; boundary=e"
    with connected(api.url) as connection:
        connection.sendall(
            head("POST", "/v1/adapters", key, content_type=kind, content_length=50 * _MIB)
            + part % b"a.json"
            + bytes(2 * _MIB)
            + b"\r\n"
            + part % b"b.json"
            + bytes(2 * _MIB)
        )
        deadline = time.monotonic() + 10
        while len(spooled(api)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(spooled(api)) == 2
    deadline = time.monotonic() + 5
    while (spooled(api) or api.services.admission._uploads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert spooled(api) == []
    assert not api.services.admission._uploads
