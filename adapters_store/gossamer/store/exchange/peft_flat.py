"""What PEFT's Supertuning and the SFT fork share: flat row-major positions and their values."""

from __future__ import annotations

from collections.abc import Mapping

from gossamer.store.delta import Delta
from gossamer.store.errors import printable
from gossamer.store.exchange.building import check_count, element_delta
from gossamer.store.exchange.formats import ImportOptions
from gossamer.store.exchange.peft_files import part_of
from gossamer.store.exchange.tensors import TensorFile
from gossamer.store.format.container import invalid


def flat_delta(
    tensors: TensorFile,
    name: str,
    parts: Mapping[str, str],
    shape: tuple[int, int],
    options: ImportOptions,
) -> tuple[Delta, int]:
    """The delta of a weight from its tensors `indices` and `values`.

    Both libraries apply it with `scatter_add`, so positions that are there twice add up.

    Returns:
        The delta, and how many entries were added to others.

    Raises:
        AdapterFileError
    """
    indices, values = part_of(parts, "indices", name), part_of(parts, "values", name)
    there, wanted = tensors.info(indices).shape, tensors.info(values).shape
    if len(wanted) != 1 or there != wanted:
        found = f"{printable(indices)} has the shape {list(there)}"
        invalid(f"{found}, {printable(values)} {list(wanted)}; both must be lists of one length")
    check_count(name, shape, wanted[0])
    carried, dtype = tensors.read_values(values)
    positions = tensors.read_positions(indices)
    delta = element_delta(
        name,
        shape,
        positions,
        carried,
        dtype,
        duplicates="sum",
        rounded_to=options.value_dtype,
    )
    return delta, positions.size - delta.positions.size
