"""What can be refused from the header alone: sizes, tensors, and the base that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from gossamer.store.delta import CARRIER
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.format.container import Container, invalid
from gossamer.store.format.layout import Group, Layout
from gossamer.store.format.limits import Limits

_MISMATCHES_NAMED = 3


def too_large(message: str) -> NoReturn:
    """Refuse what is over a configured limit."""
    raise AdapterFileError("adapter_too_large", message)


def check_sizes(layout: Layout, file_bytes: int, limits: Limits) -> None:
    decoded = layout.decoded_bytes
    if decoded > limits.max_decoded_bytes:
        allowed = limits.max_decoded_bytes
        too_large(f"the adapter would decode to {decoded} bytes, at most {allowed} are allowed")
    if decoded > max(limits.free_decoded_bytes, limits.max_expansion * file_bytes):
        times = limits.max_expansion
        too_large(f"the adapter would decode to more than {times} times the file's size")


def check_tensors(layout: Layout, container: Container) -> None:
    """Exactly the tensors that the groups need, each with its dtype and shape."""
    missing = set(container.tensors)
    for group in layout.groups:
        for name, dtypes, shape in _expected(group):
            info = container.tensors.get(name)
            if info is None:
                invalid("the tensor is missing, or a name stands for two", name)
            if info.dtype not in dtypes:
                invalid(f"dtype {info.dtype} is not {' or '.join(dtypes)}", name)
            if (len(info.shape) != 1) if shape is None else (info.shape != shape):
                invalid(f"shape {info.shape} is not {shape or 'of one dimension'}", name)
            if name not in missing:
                invalid("the tensor is missing, or a name stands for two", name)
            missing.remove(name)
    if missing:
        invalid("the tensor belongs to no group", min(missing))


def _expected(group: Group) -> list[tuple[str, tuple[str, ...], tuple[int, ...] | None]]:
    """Name, dtypes and shape of the group's tensors; no shape where it is one compressed frame."""
    rows: list[tuple[str, tuple[str, ...], tuple[int, ...] | None]] = []
    if group.positions == "raw":
        rows.append((f"{group.label}.positions", ("I32", "I64"), (group.count,)))
    elif group.positions == "gaps":
        rows += [
            (f"{group.label}.positions.high{index}", ("U8",), None)
            for index in range(group.high_planes)
        ]
        if group.shift:
            rows.append((f"{group.label}.positions.low", ("U8",), None))
    if group.values == "raw":
        rows.append((f"{group.label}.values", (group.value_dtype,), group.value_shape))
    else:
        width = CARRIER[group.value_dtype].itemsize
        rows += [(f"{group.label}.values.plane{index}", ("U8",), None) for index in range(width)]
    return rows


def check_base(
    layout: Layout, table: Mapping[str, tuple[int, int]], base_fingerprint: str | None
) -> None:
    claimed = layout.base_fingerprint
    unknown = [m for group in layout.groups for m in group.modules if m.name not in table]
    if claimed and base_fingerprint is not None and claimed != base_fingerprint:
        named = f"{printable(layout.base_name) or 'another base'} ({printable(claimed[:20])}…)"
        _mismatch(f"the adapter was made for {named}", layout, table)
    if any(table.get(m.name, m.shape) != m.shape for g in layout.groups for m in g.modules):
        _mismatch("the adapter's weights are not this base's", layout, table)
    if unknown and claimed and claimed == base_fingerprint:
        name = unknown[0].name
        raise AdapterFileError(
            "unsupported_module",
            f"{printable(name)} is not a linear weight that this server can apply a delta to",
            tensor=name,
        )
    if unknown:
        _mismatch("the adapter's weights are not this base's", layout, table)


def _mismatch(reason: str, layout: Layout, table: Mapping[str, tuple[int, int]]) -> None:
    found: list[str] = []
    tensor = None
    for module in (module for group in layout.groups for module in group.modules):
        if table.get(module.name) == module.shape:
            continue
        tensor = tensor or module.name
        rows, columns = module.shape
        own = table.get(module.name)
        has = f"{own[0]}×{own[1]} here" if own else "unknown here"
        found.append(f"{printable(module.name)} is {rows}×{columns}, {has}")
    named = "; ".join(found[:_MISMATCHES_NAMED])
    message = f"{reason}: {named}" if named else reason
    raise AdapterFileError("base_model_mismatch", message, tensor=tensor)
