"""Hostile and broken adapters of PEFT's kind, each with the code it must be refused with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.store.errors import RefusalCode
from tests.exchange.support import Attack, Tensors, claiming, tensor_file

#: The weight that the attacks aim at, and its shape.
NAME, SHAPE = "model.layers.0.q.weight", (12, 10)
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INVALID: RefusalCode = "invalid_adapter_file"
MISMATCH: RefusalCode = "base_model_mismatch"
MODULE: RefusalCode = "unsupported_module"
FOREIGN: RefusalCode = "unsupported_file"
HUGE = 2**60
#: An empty dictionary, and what comes after.
PICKLE = b"\x80\x02}q\x00." + bytes(8)


@dataclass(frozen=True)
class Method:
    """A method of PEFT as its files lay it out.

    Attributes:
        indices, values: the ends of the two tensors' names.
        count: how many values the files have.
        flat: positions are row-major in one dimension, not two lists of coordinates.
    """

    format: str
    config: Mapping[str, Any]
    indices: str
    values: str
    count: int
    flat: bool

    def positions(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """Row-major positions as this method writes them."""
        if self.flat:
            return numbers
        return np.stack(np.divmod(numbers, SHAPE[1])).astype(numbers.dtype)

    def tensors(self, name: str = NAME) -> dict[str, Any]:
        """A good file's, for one weight."""
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        return {
            module + self.indices: self.positions(np.arange(self.count, dtype="<i4")),
            module + self.values: np.ones(self.count, "<f4"),
        }

    def files(self, tensors: Tensors | None = None, **config: Any) -> dict[str, Any]:
        """A good upload, with other tensors or with changes to the configuration."""
        data = tensor_file(self.tensors() if tensors is None else tensors)
        return {CONFIG: {**self.config, **config}, WEIGHTS: data}

    def with_values(self, values: Any) -> dict[str, Any]:
        return self.files(self.tensors() | {self.key(self.values): values})

    def with_indices(self, indices: Any) -> dict[str, Any]:
        return self.files(self.tensors() | {self.key(self.indices): indices})

    def key(self, end: str) -> str:
        return f"{PREFIX}{NAME.removesuffix('.weight')}{end}"


SHIRA = Method(
    "peft-shira",
    {"peft_type": "SHIRA", "r": 1, "base_model_name_or_path": "someone/else"},
    ".shira_indices",
    ".shira_weight",
    22,
    flat=False,
)
SUPERTUNING = Method(
    "peft-supertuning",
    {"peft_type": "SUPERTUNING", "sparsity": 0.75, "select_top": True, "r": None},
    ".supertuning_indices",
    ".supertuning_values",
    30,
    flat=True,
)
SFT = Method(
    "peft-sft",
    {"peft_type": "SFT", "density": 0.1},
    ".sft_delta.indices",
    ".sft_delta.values",
    22,
    flat=True,
)
METHODS = (SHIRA, SUPERTUNING, SFT)


def attacks(method: Method) -> Iterator[Attack]:
    """What every method must refuse."""
    yield from bad_values(method)
    yield from bad_indices(method)
    yield from bad_sets(method)
    yield from bad_configs(method)
    yield from bad_files(method)


def bad_values(method: Method) -> Iterator[Attack]:
    for label, bad in (
        ("NaN", math.nan),
        ("infinite", math.inf),
        ("minus infinite", -math.inf),
        ("1e38", 1e38),
    ):
        values = np.ones(method.count, "<f4")
        values[7] = bad
        yield Attack(f"values: {label}", method.with_values(values), INVALID, NAME, entry=7)
    wide = np.ones(method.count, "<f8")
    wide[3] = 1e300
    yield Attack("values: 1e300", method.with_values(wide), INVALID, NAME, entry=3)
    key, count = method.key(method.values), method.count
    for dtype in ("<i4", "<u1", "<i8"):
        integers = np.ones(count, dtype)
        yield Attack(f"values: {dtype}", method.with_values(integers), INVALID, key)
    for dtype in ("F8_E4M3", "BOOL"):
        data = (dtype, [count], bytes(count))
        yield Attack(f"values: {dtype}", method.with_values(data), INVALID, key)
    column = np.ones((count, 1), "<f4")
    yield Attack("values: two dimensions", method.with_values(column), INVALID, key)
    yield Attack("values: no dimension", method.with_values(("F32", (), bytes(4))), INVALID, key)


def bad_indices(method: Method) -> Iterator[Attack]:
    def changed(bad: float, dtype: str) -> dict[str, Any]:
        indices = method.positions(np.arange(method.count)).astype(dtype)
        indices.reshape(-1)[5] = bad
        return method.with_indices(indices)

    elements = math.prod(SHAPE)
    for label, number, dtype in (
        ("beyond the last", elements, "<i4"),
        ("minus one", -1, "<i4"),
        ("2^31 - 1", 2**31 - 1, "<i4"),
        ("-2^31", -(2**31), "<i4"),
        ("2^32 + 1, which a cast to 32 bits would accept", 2**32 + 1, "<i8"),
        ("2^62", 2**62, "<i8"),
        ("2^63 - 1", 2**63 - 1, "<i8"),
        ("-2^63", -(2**63), "<i8"),
        ("200 in a byte", 200, "<u1"),
        ("200, a whole float", 200, "<f4"),
    ):
        yield Attack(f"indices: {label}", changed(number, dtype), INVALID, NAME, entry=5)
    key, count = method.key(method.indices), method.count
    for label, inexact, dtype in (
        ("a half", 0.5, "<f4"),
        ("NaN", math.nan, "<f4"),
        ("infinite", math.inf, "<f8"),
        ("beyond what a float32 tells apart", 2.0**24 + 2, "<f4"),
        ("beyond what a float64 tells apart", 2.0**60, "<f8"),
        ("float16", 1, "<f2"),
    ):
        yield Attack(f"indices: {label}", changed(inexact, dtype), INVALID, key)
    there = method.positions(np.arange(count, dtype="<i4"))
    for label, bad in (
        ("one fewer", there[..., 1:].copy()),
        ("one more", np.concatenate([there, there[..., :1]], axis=-1)),
        ("one dimension more", there[None].copy()),
        ("turned", np.arange(count * 2, dtype="<i4").reshape(count, 2)),
        ("of no entries, and one side of 2^60", ("I32", [0, HUGE], b"")),
        ("of one side of 2^60, and no entries", ("I32", [HUGE, 0], b"")),
        ("no dimension", ("I32", [], bytes(4))),
        ("U64", ("U64", list(there.shape), there.astype("<u8").tobytes())),
        ("BOOL", ("BOOL", list(there.shape), bytes(there.size))),
    ):
        yield Attack(f"indices: {label}", method.with_indices(bad), INVALID, key)


def bad_sets(method: Method) -> Iterator[Attack]:
    """Which tensors there are, and of what."""
    good = method.tensors()
    for end in (method.indices, method.values):
        half = {key: value for key, value in good.items() if not key.endswith(end)}
        yield Attack(f"set: without {end}", method.files(half), INVALID, re.split("[._]", end)[-1])
    for label, name, code in (
        ("an unknown weight", "model.layers.9.q.weight", MISMATCH),
        ("a path", "../../etc/passwd.weight", MISMATCH),
        ("a name with a line break", "model\nERROR all is lost.weight", MISMATCH),
        ("a name of 100 kB", f"{'w' * 100_000}.weight", MISMATCH),
        ("a norm", "model.norm.weight", MODULE),
        ("an embedding", "model.embed_tokens.weight", MODULE),
    ):
        shown = name if name.isprintable() and len(name) < 99 else ""
        both = method.files(good | method.tensors(name))
        yield Attack(f"set: {label}", both, code, shown)
        yield Attack(f"set: {label} alone", method.files(method.tensors(name)), code, shown)
    ones = np.ones(4, "<f4")
    for label, key, code in (
        ("a module saved whole", f"{PREFIX}lm_head.weight", MODULE),
        ("a bias", f"{PREFIX}model.layers.0.q.bias", MODULE),
        ("a base weight", f"{PREFIX}{NAME}", MODULE),
        ("a LoRA", f"{PREFIX}model.layers.0.q.lora_A.weight", MODULE),
        ("a stranger", f"{PREFIX}model.layers.0.q.evil", INVALID),
        ("an empty name", "", INVALID),
        ("only the end of a name", method.values, INVALID),
        ("an end more", f"{method.key(method.values)}.x", INVALID),
    ):
        named = key.removeprefix(PREFIX)
        yield Attack(f"set: {label}", method.files(good | {key: ones}), code, named)
    bare = {key.removeprefix(PREFIX): value for key, value in good.items()}
    yield Attack("set: with and without the prefix", method.files(good | bare), INVALID, NAME[:-7])
    yield Attack("set: nothing", method.files({}), INVALID, WEIGHTS)


def bad_configs(method: Method) -> Iterator[Attack]:
    data = tensor_file(method.tensors())
    deep = b'{"peft_type": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    twice = b'{"peft_type": "LORA", "peft_type": "SHIRA"}'
    for label, text in (
        ("not JSON", b"{'peft_type': 'SHIRA'}"),
        ("empty", b""),
        ("a list", b"[]"),
        ("a key twice", twice),
        ("NaN", b'{"peft_type": NaN}'),
        ("too deep", deep),
        ("not UTF-8", b'{"peft_type": "\xff"}'),
        ("half a surrogate pair", b'{"peft_type": "\\ud800"}'),
        ("an integer of 5000 digits", b'{"peft_type": ' + b"9" * 5000 + b"}"),
    ):
        yield Attack(f"config: {label}", {CONFIG: text, WEIGHTS: data}, INVALID, CONFIG)
    large = {CONFIG: b" " * (1 << 20) + b"{}", WEIGHTS: data}
    yield Attack("config: 1 MiB", large, "adapter_too_large", CONFIG)
    yield Attack("config: missing", {WEIGHTS: data}, INVALID, CONFIG)
    for kind in ("LORA", "shira", None, 1, ["SHIRA"], "SHIRA\n"):
        other = method.files(peft_type=kind)
        yield Attack(f"config: peft_type {kind!r}", other, FOREIGN, "peft_type")
    for key, value in (
        ("modules_to_save", ["lm_head"]),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
    ):
        yield Attack(f"config: {key} {value!r}", method.files(None, **{key: value}), MODULE, key)


def bad_files(method: Method) -> Iterator[Attack]:
    good = method.files()
    data = good[WEIGHTS]
    for label, content, code in (
        ("a pickle", PICKLE, FOREIGN),
        ("a zip archive", b"PK\x03\x04" + bytes(40), FOREIGN),
        ("empty", b"", INVALID),
        ("cut short", data[:-1], INVALID),
        ("a byte more", data + b"\0", INVALID),
        ("a header of 2^60 bytes", b"\0\0\0\0\0\0\0\x10{", INVALID),
        ("2^60 bytes claimed", claiming(HUGE), INVALID),
    ):
        yield Attack(f"file: {label}", good | {WEIGHTS: content}, code)
    without = {CONFIG: good[CONFIG]}
    yield Attack("file: missing", without, INVALID, WEIGHTS)
    pickled = without | {"adapter_model.bin": PICKLE}
    yield Attack("file: a pickle instead", pickled, FOREIGN, "adapter_model.bin")


def of_shira() -> Iterator[Attack]:
    """What only SHIRA can get wrong."""

    def coordinates(entry: int, row: int, column: int) -> dict[str, Any]:
        indices = SHIRA.positions(np.arange(22, dtype="<i8"))
        indices[:, entry] = row, column
        return SHIRA.with_indices(indices)

    for label, row, column in (
        ("a column of the next row", 0, 10),
        ("a column of the row before", 1, -1),
        ("a row beyond, of a column before", 12, -1),
        ("a row before, of a column beyond", -1, 15),
        ("rows and columns swapped", 2, 11),
        # 2^61 rows of 10 columns wrap around to 4 · 2^60 positions and, with 2^62, to less than 0.
        ("a row that wraps around", 2**63 // 5 + 1, 0),
        ("a row that wraps around to zero", 2**62, 0),
    ):
        yield Attack(f"shira: {label}", coordinates(4, row, column), INVALID, NAME, entry=4)
    twice = SHIRA.tensors()
    twice[SHIRA.key(".shira_indices")][:, 3] = twice[SHIRA.key(".shira_indices")][:, 2]
    for label, pair in (
        ("infinite and minus infinite in one place", (math.inf, -math.inf)),
        ("a sum too large", (65504.0, 65504.0)),
        ("an infinite sum", (3e38, 3e38)),
    ):
        values = np.ones(22, "<f4")
        values[2:4] = pair
        files = SHIRA.files(twice | {SHIRA.key(".shira_weight"): values})
        yield Attack(f"shira: {label}", files, INVALID, NAME, entry=2)
    for rank in (0, -1, True, "1", 1.0, None, [1], 2**31, 10**4000):
        yield Attack(f"shira: r {str(rank)[:9]}", SHIRA.files(r=rank), INVALID, "r in")
    yield Attack("shira: another r", SHIRA.files(r=2), MISMATCH, NAME)
    other = SHIRA.tensors()
    other[SHIRA.key(".shira_weight")] = np.ones(26, "<f4")
    other[SHIRA.key(".shira_indices")] = np.zeros((2, 26), "<i4")
    yield Attack("shira: a weight of another shape", SHIRA.files(other), MISMATCH, NAME)
    yield Attack(
        "shira: more than all", SHIRA.files(_more_than_all(SHIRA, 132), r=6), INVALID, NAME
    )
    turned = SHIRA.files(fan_in_fan_out=True)
    yield Attack("shira: fan_in_fan_out", turned, MODULE, "fan_in_fan_out")


def of_supertuning() -> Iterator[Attack]:
    """What only Supertuning can get wrong."""
    for sparsity in (1.0, 1, -0.1, "0.9", True, None, [0.9], 10**4000):
        files = SUPERTUNING.files(sparsity=sparsity)
        yield Attack(f"supertuning: sparsity {str(sparsity)[:9]}", files, INVALID, "sparsity")
    for top in ("yes", 1, None):
        files = SUPERTUNING.files(select_top=top)
        yield Attack(f"supertuning: select_top {top!r}", files, INVALID, "select_top")
    for rank in (8, 0, "8"):
        yield Attack(f"supertuning: r {rank!r}", SUPERTUNING.files(r=rank), MODULE, "r in")
    yield Attack("supertuning: another sparsity", SUPERTUNING.files(sparsity=0.5), MISMATCH, NAME)
    values = {SUPERTUNING.key(".supertuning_values"): np.ones(30, "<f4")}
    for said in (True, 0, None):
        files = SUPERTUNING.files(values, save_precomputed_indices=said)
        label = f"supertuning: no indices, save_precomputed_indices {said!r}"
        yield Attack(label, files, INVALID, "supertuning_indices")
    other = "model.layers.0.v.weight"
    some = SUPERTUNING.tensors() | {
        f"{PREFIX}model.layers.0.v.supertuning_values": np.ones(15, "<f4")
    }
    files = SUPERTUNING.files(some, save_precomputed_indices=False)
    yield Attack("supertuning: indices of one weight only", files, INVALID, other)
    lora = {f"{PREFIX}model.layers.0.q.supertuning_lora_A.weight": np.ones((2, 10), "<f4")}
    files = SUPERTUNING.files(SUPERTUNING.tensors() | lora)
    yield Attack("supertuning: a LoRA's tensor", files, MODULE, "supertuning_lora_A")


def _more_than_all(method: Method, count: int) -> dict[str, Any]:
    """More entries than the weight has elements, so that some are added up."""
    where = np.arange(count, dtype="<i4") % math.prod(SHAPE)
    values = np.ones(count, "<f4")
    return {method.key(method.indices): method.positions(where), method.key(method.values): values}


def of_sft() -> Iterator[Attack]:
    """What only SFT can get wrong."""
    yield Attack("sft: more than all", SFT.files(_more_than_all(SFT, 121)), INVALID, "121 entries")
    module = NAME.removesuffix(".weight")
    for label, declared, named in (
        ("a list", [22], "num_deltas"),
        ("another count", {module: 21}, module),
        ("another module", {"model.layers.0.v": 22}, "model.layers.0"),
        ("a count that is no number", {module: "22"}, module),
        ("a count of 4000 digits", {module: 10**4000}, module),
    ):
        yield Attack(f"sft: num_deltas: {label}", SFT.files(num_deltas=declared), INVALID, named)
    named_too = {f"{key}": value for key, value in SFT.tensors().items()}
    for key, value in SFT.tensors().items():
        named_too[key.replace(".sft_delta.", ".sft_delta.default.")] = value
    yield Attack("sft: with an adapter's name too", SFT.files(named_too), INVALID, module)
