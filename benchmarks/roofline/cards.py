"""Cards as their data sheets have them, and what of that a kernel reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Shares of the data sheet. All are declared, none has been measured here.
#: Of the bandwidth: no stream reaches all of it, since refresh and the turns between reading and
#: writing take their part. A copy measured on the card replaces it.
ACHIEVABLE_BANDWIDTH: Final = 0.9
#: Of dense bf16, for large products, whose clock the power limit lowers.
ACHIEVABLE_FLOPS: Final = 0.7
#: Of the schedulers' slots: gathers wait for the first-level cache.
ACHIEVABLE_ISSUE: Final = 0.6
#: Of the bus to the host, one asynchronous copy from pinned memory at a time.
ACHIEVABLE_HOST: Final = 0.85
#: Of the memory; the rest is activations, the library's workspaces, the graphs.
USABLE_MEMORY: Final = 0.9

_PCIE4, _PCIE5 = 32e9, 64e9


@dataclass(frozen=True, slots=True)
class Card:
    """A data sheet. Bytes and seconds.

    Attributes:
        name: what `--card` says.
        device: how the name begins or ends that its driver reports; tells its measured rows.
        bandwidth: of the memory, bytes/s.
        flops: bf16 on the matrix units, without sparsity.
        memory: bytes.
        host: bytes/s from the host, 16 lanes, one way.
        multiprocessors, lanes: instructions of `lanes` threads begin in each, every cycle.
        clock: cycles/s, boost.
        launch: what a kernel in a graph takes beside its work, from the end of the one before to
            its first instruction. Declared, not measured.
    """

    name: str
    device: str
    bandwidth: float
    flops: float
    memory: float
    host: float
    multiprocessors: int
    lanes: int
    clock: float
    launch: float


CARDS: Final = {
    card.name: card
    for card in (
        Card("H200", "H200", 4.8e12, 989e12, 141e9, _PCIE5, 132, 128, 1.98e9, 1.5e-6),
        Card("H100-SXM", "H100 80GB HBM3", 3.35e12, 989e12, 80e9, _PCIE5, 132, 128, 1.98e9, 1.5e-6),
        Card("A100-80GB", "A100-SXM4-80GB", 2.04e12, 312e12, 80e9, _PCIE4, 108, 128, 1.41e9, 2e-6),
        Card("L40S", "L40S", 864e9, 362e12, 48e9, _PCIE4, 142, 128, 2.52e9, 1.5e-6),
        Card("RTX-4090", "RTX 4090", 1008e9, 165e12, 24e9, _PCIE4, 128, 128, 2.52e9, 1.5e-6),
        Card("MI300X", "MI300X", 5.3e12, 1307e12, 192e9, _PCIE5, 304, 64, 2.1e9, 3e-6),
    )
}


@dataclass(frozen=True, slots=True)
class Rates:
    """What is reached.

    Attributes:
        bandwidth, host: bytes/s of the memory and from the host.
        flops: of large products.
        instructions: a second, of single threads.
        launch: seconds.
        memory: bytes that the model, the keys and values and the adapters may take.
        handed_on: share that goes through the memory of what one kernel writes and the next one
            reads; 1 counts it in full, 0 has the second-level cache hold all of it.
    """

    bandwidth: float
    flops: float
    instructions: float
    host: float
    launch: float
    memory: float
    handed_on: float = 1.0

    @classmethod
    def of(
        cls, card: Card, copy_bandwidth: float | None = None, fraction: float | None = None
    ) -> Rates:
        """What a card reaches.

        Args:
            card: its data sheet.
            copy_bandwidth: bytes/s that a copy reads and writes on it, measured, in place of the
                data sheet's.
            fraction: of that bandwidth which a kernel reaches; by default `ACHIEVABLE_BANDWIDTH` of
                the data sheet's, and all of a measured one, in which the loss is contained.
        """
        given = card.bandwidth if copy_bandwidth is None else copy_bandwidth
        if fraction is None:
            fraction = ACHIEVABLE_BANDWIDTH if copy_bandwidth is None else 1.0
        return cls(
            bandwidth=fraction * given,
            flops=ACHIEVABLE_FLOPS * card.flops,
            instructions=ACHIEVABLE_ISSUE * card.multiprocessors * card.lanes * card.clock,
            host=ACHIEVABLE_HOST * card.host,
            launch=card.launch,
            memory=USABLE_MEMORY * card.memory,
        )
