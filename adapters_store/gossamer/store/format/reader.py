"""Read a packed adapter file: one validating pass, then plain arrays.

The order is the defence: size, header, metadata, names and shapes against the base, declared sizes
against the limits, and only then the first tensor. Nothing that a file says is used to allocate
before it was bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gossamer.store.delta import Delta, DeltaSet, Kind, ValueDtype, find_problem, run_is_sound
from gossamer.store.errors import AdapterFileError, printable
from gossamer.store.format.checks import check_base, check_sizes, check_tensors, too_large
from gossamer.store.format.container import Container, invalid, parse_container
from gossamer.store.format.decode import decode_group
from gossamer.store.format.layout import Layout, parse_layout
from gossamer.store.format.limits import DEFAULT_LIMITS, Limits
from gossamer.store.format.source import Readable, Source, open_source

ServingDtype = Literal["float32", "bfloat16", "float16"]

#: The largest finite number of each dtype that a server may run in.
_LARGEST: dict[ServingDtype, float] = {
    "float32": 3.4028234663852886e38,
    "bfloat16": 3.3895313892515355e38,
    "float16": 65504.0,
}


@dataclass(frozen=True)
class ModuleSummary:
    """One weight of an adapter, as its file declares it."""

    name: str
    kind: Kind
    shape: tuple[int, int]
    block_size: int
    nnz: int
    value_dtype: ValueDtype
    coding: str


@dataclass(frozen=True)
class Summary:
    """What a file's header says; nothing of it has been compared with the content."""

    base_fingerprint: str
    base_name: str
    modules: tuple[ModuleSummary, ...]
    record: Mapping[str, Any]
    file_bytes: int
    decoded_bytes: int

    @property
    def nnz(self) -> int:
        """Number of stored entries over all weights."""
        return sum(module.nnz for module in self.modules)


def inspect(readable: Readable, *, limits: Limits = DEFAULT_LIMITS) -> Summary:
    """The header of a packed adapter, for listings; decodes nothing.

    Raises:
        AdapterFileError: the header breaks a rule of the format.
        OSError: the path cannot be read.
    """
    with open_source(readable) as source:
        _, layout = _open(source, limits)
        modules = [
            ModuleSummary(
                name=module.name,
                kind=group.kind,
                shape=module.shape,
                block_size=group.block_size,
                nnz=module.nnz,
                value_dtype=group.value_dtype,
                coding=f"{group.positions}+{group.values}",
            )
            for group in layout.groups
            for module in group.modules
        ]
        modules.sort(key=lambda module: module.name.encode())
        return Summary(
            base_fingerprint=layout.base_fingerprint,
            base_name=layout.base_name,
            modules=tuple(modules),
            record=layout.record,
            file_bytes=source.size,
            decoded_bytes=layout.decoded_bytes,
        )


def open_validated(
    readable: Readable,
    table: Mapping[str, tuple[int, int]],
    *,
    limits: Limits = DEFAULT_LIMITS,
    base_fingerprint: str | None = None,
    serving_dtype: ServingDtype = "float32",
) -> DeltaSet:
    """The adapter in a file, validated against the base and decoded; the only door for uploads.

    Args:
        readable: the bytes, a path, or a seekable open file.
        table: name → (out_features, in_features) of every weight that a delta may change.
        limits: what the file may ask for.
        base_fingerprint: of the base; a file that names another is refused. A file that names none
            is judged by its names and shapes, and its `DeltaSet.base_fingerprint` stays empty.
        serving_dtype: the dtype the base is served in; every difference must be finite in it.

    Returns:
        The deltas by weight name in byte order. No array refers to the file.

    Raises:
        AdapterFileError: the file is refused; see `RefusalCode`.
        OSError: the path cannot be read.
    """
    with open_source(readable) as source:
        container, layout = _open(source, limits)
        check_base(layout, table, base_fingerprint)
        return _decode(source, container, layout, limits, serving_dtype)


def read(readable: Readable, *, limits: Limits = DEFAULT_LIMITS) -> DeltaSet:
    """The adapter in a file, with the names and shapes that the file declares; for tools.

    Every rule is checked but those that need the base. Never serve the result.

    Raises:
        AdapterFileError: the file is refused.
        OSError: the path cannot be read.
    """
    with open_source(readable) as source:
        container, layout = _open(source, limits)
        return _decode(source, container, layout, limits, "float32")


def _open(source: Source, limits: Limits) -> tuple[Container, Layout]:
    if source.size > limits.max_file_bytes:
        too_large(f"the file has {source.size} bytes, at most {limits.max_file_bytes} are allowed")
    container = parse_container(source)
    layout = parse_layout(container)
    check_sizes(layout, source.size, limits)
    check_tensors(layout, container)
    return container, layout


def _decode(
    source: Source,
    container: Container,
    layout: Layout,
    limits: Limits,
    serving_dtype: ServingDtype,
) -> DeltaSet:
    max_magnitude = min(limits.max_magnitude, _LARGEST[serving_dtype])
    deltas: dict[str, Delta] = {}
    for group in layout.groups:
        run = decode_group(source, container.tensors, group)
        sound = run_is_sound(run.deltas, run.positions, run.values, max_magnitude)
        for module, delta in zip(group.modules, run.deltas, strict=True):
            problem = None if sound else find_problem(delta, max_magnitude)
            if problem is not None:
                at = "" if problem.position is None else f" (entry {problem.position})"
                message = f"{printable(module.name)}{at}: {problem.message}"
                raise AdapterFileError(
                    "invalid_adapter_file", message, tensor=module.name, position=problem.position
                )
            if delta.nnz != module.nnz:
                invalid(f"the tiles hold {delta.nnz} entries, not {module.nnz}", module.name)
            deltas[module.name] = delta
    ordered = dict(sorted(deltas.items(), key=lambda item: item[0].encode()))
    return DeltaSet(layout.base_fingerprint, layout.base_name, ordered, layout.record)
