"""The inner layer: what the metadata says about the adapter, as plain data.

Modules with the same kind, block size, value dtype and position form are gathered in *groups*; the
positions and the values of a group are each one run of numbers, so that a thousand small weights
cost one entropy coder's overhead and one vectorised decode instead of a thousand.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from gossamer.store.delta import BLOCK_SIZES, CARRIER, Kind, ValueDtype
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.format.container import (
    Container,
    invalid,
    is_sizes,
    parse_json,
    refuse_unpacked,
    render_json,
)
from gossamer.store.format.seeded import MAX_NUMEL, MAX_SEED

FORMAT_VERSION = "1"

PositionForm = Literal["raw", "gaps", "seed"]
ValueForm = Literal["raw", "planes"]

#: How many low bits of a gap are stored as they are: whole nibbles.
SHIFTS = (0, 4, 8, 12, 16)
#: Bytes of a gap above them, at most: 16 + 5 * 8 bits cover every position of MAX_NUMEL.
MAX_HIGH_PLANES = 5
MAX_MODULES = 4096

_KEYS = ("format", "base_fingerprint", "base_name", "groups", "extras", "record")
_GROUP_KEYS = {"kind", "block_size", "dtype", "positions", "values", "modules"}
_GAP_KEYS = {"shift", "high_planes"}
_F32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class Module:
    """One weight of a group.

    Attributes:
        name: the weight's name in the base's own naming.
        shape: (out_features, in_features).
        count: number of positions: entries, or tiles.
        nnz: number of stored entries of the weight (tiles clipped at its edges).
        scale: the difference is scale * values; a float32.
        seed: of the positions, where their form is `seed`.
    """

    name: str
    shape: tuple[int, int]
    count: int
    nnz: int
    scale: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Group:
    """Modules whose numbers are stored as one run; `label` begins its tensors' names."""

    label: str
    kind: Kind
    block_size: int
    value_dtype: ValueDtype
    positions: PositionForm
    values: ValueForm
    modules: tuple[Module, ...]
    shift: int = 0
    high_planes: int = 0

    @property
    def count(self) -> int:
        """Number of positions of all modules."""
        return sum(module.count for module in self.modules)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of the group's values: [count], or [count, B, B]."""
        tile = () if self.kind == "element" else (self.block_size, self.block_size)
        return (self.count, *tile)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the positions (int64) and values after decoding."""
        values = math.prod(self.value_shape) * CARRIER[self.value_dtype].itemsize
        return 8 * self.count + values


@dataclass(frozen=True)
class Layout:
    """Everything the metadata says."""

    base_fingerprint: str
    base_name: str
    groups: tuple[Group, ...]
    record: Mapping[str, Any]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all deltas after decoding."""
        return sum(group.decoded_bytes for group in self.groups)


def group_label(modules: tuple[Module, ...], index: int) -> str:
    """A group of one weight is named after it, so that any safetensors reader shows whose it is."""
    return modules[0].name if len(modules) == 1 else f"group.{index}"


def parse_layout(container: Container) -> Layout:
    """What the metadata of a packed adapter says, checked for form, not yet against a base.

    Raises:
        AdapterFileError: any rule of the format broken.
    """
    ours = {
        key.removeprefix("gossamer."): text
        for key, text in container.metadata.items()
        if key.startswith("gossamer.")
    }
    if "format" not in ours:
        refuse_unpacked()
    if ours["format"] != FORMAT_VERSION:
        version = ours["format"][:20]
        invalid(f"format version {version!r} is not supported, only {FORMAT_VERSION}")
    if unknown := ours.keys() - set(_KEYS):
        invalid(f"unknown metadata gossamer.{min(unknown)[:40]}")
    rows = parse_json(ours.get("groups", "[]"), "list of groups")
    if not isinstance(rows, list):
        invalid("gossamer.groups must be a list")
    groups = tuple(_group(row, index) for index, row in enumerate(rows))
    _unique_names(groups)
    _refuse_extras(ours.get("extras", "[]"))
    record = parse_json(ours.get("record", "{}"), "training record")
    if not isinstance(record, dict):
        invalid("gossamer.record must be an object")
    return Layout(ours.get("base_fingerprint", ""), ours.get("base_name", ""), groups, record)


def _group(row: Any, index: int) -> Group:
    where = f"group {index}"
    gaps = isinstance(row, dict) and row.get("positions") == "gaps"
    if not isinstance(row, dict) or row.keys() != _GROUP_KEYS | (_GAP_KEYS if gaps else set()):
        invalid(f"{where} has missing or unknown fields")
    kind, block_size, dtype = row["kind"], row["block_size"], row["dtype"]
    sizes = {"element": (1,), "block": BLOCK_SIZES}.get(kind) if isinstance(kind, str) else None
    if sizes is None or type(block_size) is not int or block_size not in sizes:
        invalid(f"{where} has an unknown kind or block size")
    if not isinstance(dtype, str) or dtype not in CARRIER:
        invalid(f"{where} has a value dtype that is not one of {', '.join(CARRIER)}")
    if row["positions"] not in get_args(PositionForm) or row["values"] not in get_args(ValueForm):
        invalid(f"{where} has an unknown coding")
    if gaps and not (
        is_sizes([row["shift"], row["high_planes"]])
        and row["shift"] in SHIFTS
        and 0 < row["high_planes"] <= MAX_HIGH_PLANES
    ):
        invalid(f"{where} has an impossible shift or number of planes")
    if not isinstance(row["modules"], list) or not row["modules"]:
        invalid(f"{where} has no modules")
    seeded = row["positions"] == "seed"
    fields = {"name", "shape", "nnz"} | ({"tiles"} if kind == "block" else set())
    fields |= {"seed"} if seeded else set()
    modules = tuple(_module(entry, fields, block_size) for entry in row["modules"])
    for before, after in itertools.pairwise(modules):
        if before.name.encode() >= after.name.encode():
            invalid("weights of a group must be in strictly increasing byte order", after.name)
    return Group(
        label=group_label(modules, index),
        kind=cast(Kind, kind),
        block_size=block_size,
        value_dtype=dtype,
        positions=row["positions"],
        values=row["values"],
        modules=modules,
        shift=row.get("shift", 0),
        high_planes=row.get("high_planes", 0),
    )


def _module(row: Any, fields: set[str], block_size: int) -> Module:
    """One of a group's modules; it must have the `fields`, and may have a scale."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        invalid("a module must be an object with a name")
    name = row["name"]
    if row.keys() != fields and row.keys() - {"scale"} != fields:
        invalid("the module has missing or unknown fields", name)
    shape, nnz = row["shape"], row["nnz"]
    count = row["tiles"] if "tiles" in fields else nnz
    if not is_sizes(shape) or len(shape) != 2 or not 0 < math.prod(shape) <= MAX_NUMEL:
        invalid("shape must be two integers of at least 1, with a product of at most 2^48", name)
    capacity = math.prod(-(-side // block_size) for side in shape)
    if not is_sizes([count, nnz]) or count > capacity or nnz > math.prod(shape):
        invalid("the module has more nonzeros than the weight has entries", name)
    seed = row.get("seed")
    if "seed" in fields and not (type(seed) is int and 0 <= seed <= MAX_SEED):
        invalid("seed must be an integer in [0, 2^63)", name)
    return Module(name, (shape[0], shape[1]), count, nnz, _scale(row.get("scale", 1.0), name), seed)


def _scale(value: Any, name: str) -> float:
    if type(value) is not float or value == 0.0 or abs(value) > _F32_MAX:
        invalid("scale must be a JSON number with a fraction, finite and not zero", name)
    if struct.unpack("<f", struct.pack("<f", value))[0] != value:
        invalid("scale must be a float32 exactly", name)
    return value


def _unique_names(groups: tuple[Group, ...]) -> None:
    seen: set[str] = set()
    for group in groups:
        for module in group.modules:
            if module.name in seen:
                invalid("the weight is listed twice", module.name)
            seen.add(module.name)
    if len(seen) > MAX_MODULES:
        invalid(f"the file changes {len(seen)} weights, at most {MAX_MODULES} are allowed")


def _refuse_extras(text: str) -> None:
    """Dense extras have their place in the format; this release applies none of them."""
    rows = parse_json(text, "list of extras")
    if not isinstance(rows, list):
        invalid("gossamer.extras must be a list")
    if not rows:
        return
    name = rows[0].get("name") if isinstance(rows[0], dict) else None
    if not isinstance(name, str):
        invalid("an extra must be an object with a name")
    raise AdapterFileError(
        "unsupported_module",
        f"{printable(name)} is stored whole; this server applies sparse deltas of linear weights",
        tensor=name,
    )


def render_layout(layout: Layout) -> dict[str, str]:
    """The metadata strings that say `layout`."""
    return {
        "gossamer.format": FORMAT_VERSION,
        "gossamer.base_fingerprint": layout.base_fingerprint,
        "gossamer.base_name": layout.base_name,
        "gossamer.groups": render_json([_group_row(group) for group in layout.groups]),
        "gossamer.record": render_json(dict(layout.record)),
    }


def _group_row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": group.kind,
        "block_size": group.block_size,
        "dtype": group.value_dtype,
        "positions": group.positions,
        "values": group.values,
    }
    if group.positions == "gaps":
        row |= {"shift": group.shift, "high_planes": group.high_planes}
    return row | {"modules": [_module_row(module, group.kind) for module in group.modules]}


def _module_row(module: Module, kind: Kind) -> dict[str, Any]:
    row: dict[str, Any] = {"name": module.name, "shape": list(module.shape), "nnz": module.nnz}
    if kind == "block":
        row["tiles"] = module.count
    if module.scale != 1.0:
        row["scale"] = module.scale
    if module.seed is not None:
        row["seed"] = module.seed
    return row
