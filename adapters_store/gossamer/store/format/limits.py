"""How much a file may ask for before anything of it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.store.delta import MAX_MAGNITUDE

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Caps of the validating reader. The defaults bound one hostile upload, not a fine model.

    Attributes:
        max_file_bytes: size of the whole file.
        max_decoded_bytes: positions (8 bytes each) and values after decoding, together.
        max_expansion: decoded bytes for each byte of the file. Real values do not compress beyond
            a few times; a file of zeros does, without end.
        free_decoded_bytes: up to this much, `max_expansion` does not apply.
        max_magnitude: the largest |difference|; see `gossamer.store.delta.MAX_MAGNITUDE`.
    """

    max_file_bytes: int = 512 * MIB
    max_decoded_bytes: int = 4096 * MIB
    max_expansion: int = 256
    free_decoded_bytes: int = 64 * MIB
    max_magnitude: float = MAX_MAGNITUDE


DEFAULT_LIMITS = Limits()

# These belong to the format, not to a server's settings (docs/format.md).
MAX_HEADER_BYTES = MIB
MAX_TENSORS = 4096
