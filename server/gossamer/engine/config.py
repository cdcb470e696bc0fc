"""The engine's settings, read once by whoever wires it and never changed after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gossamer.kernels.backends import Backend

Attention = Literal["triton", "flashinfer"]


@dataclass(frozen=True)
class EngineConfig:
    """Limits and policy of one engine.

    Attributes:
        max_rows: most sequences that run at once.
        max_waiting: most sequences that wait; past it a request is refused.
        memory_bytes: one budget for KV pages and resident adapters.
        page_size: tokens in a KV page.
        max_step_tokens: most tokens of one step when nothing decodes.
        max_mixed_step_tokens: most tokens of prompts in a step with decoding rows, so that a long
            prompt cannot stall them: 128 are about 0.1 s for a 135M model on two CPU cores.
        max_members: most members of a mix.
        loader_threads: threads that read and pack adapters beside the step.
        queue_timeout: seconds that a request may wait for its first step.
        prefix_sharing: reuse KV pages of equal prompts (same base, mix and salt).
        fuse: write a mix that every row shares into the weights. In a 16-bit base W + Δ is rounded
            and the fused model is another one: there only with `fuse_16bit`.
        fuse_min_steps: steps that the rows must still have ahead for a fuse to pay.
        fuse_cooldown: steps without fusing after a fused window was broken.
        fuse_share: below 1, a mix that this share of all rows wants, running and waiting, may be
            fused when that is predicted to pay; the others' rows are held back meanwhile.
        fuse_hold_steps: N, most steps in a row in which a row may be held back. 32 are 1 s for a
            135M model on two CPU cores.
        fuse_hold_share: s; of any T successive steps a row is held back in at most s·T + (1 - s)·N.
        fuse_16bit: fuse into 16-bit weights too, a mix whose deviation is within the bound.
        fuse_deviation: that bound: ‖fl(W + Δ) - (W + Δ)‖ / ‖Δ‖ over all that the mix touches; see
            the decision record on fusing in 16 bit.
        kernels: backend of the delta and attention kernels.
        attention: "flashinfer": steps that run launch by launch attend by FlashInfer, with
            kernels "triton" only. Captured decode steps keep our kernel, since FlashInfer plans on
            the host. "triton" leaves it to `kernels`.
        graphs: decode by captured graphs; "triton" only.
        int8_adapters: store adapters' values in 8 bits on the device, with a scale for every output
            row: half the bytes, for an error of at most a 254th of a row's largest value. "triton".
        host_bytes: of packed adapters that are kept in pinned memory of the host; "triton" only.
    """

    max_rows: int = 16
    max_waiting: int = 256
    memory_bytes: int = 4 << 30
    page_size: int = 16
    max_step_tokens: int = 512
    max_mixed_step_tokens: int = 128
    max_members: int = 8
    loader_threads: int = 1
    queue_timeout: float = 30.0
    prefix_sharing: bool = True
    fuse: bool = True
    fuse_min_steps: int = 16
    fuse_cooldown: int = 8
    fuse_share: float = 1.0
    fuse_hold_steps: int = 32
    fuse_hold_share: float = 0.5
    fuse_16bit: bool = False
    fuse_deviation: float = 0.05
    kernels: Backend = "cpu"
    attention: Attention = "triton"
    graphs: bool = True
    int8_adapters: bool = False
    host_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        positive = (
            "max_rows",
            "max_waiting",
            "memory_bytes",
            "page_size",
            "max_step_tokens",
            "max_mixed_step_tokens",
            "max_members",
            "loader_threads",
            "fuse_hold_steps",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if not 0 < self.fuse_share <= 1:
            raise ValueError(f"fuse_share must be in (0, 1], is {self.fuse_share}")
        if not 0 <= self.fuse_hold_share < 1:
            raise ValueError(f"fuse_hold_share must be in [0, 1), is {self.fuse_hold_share}")
        if self.attention == "flashinfer" and self.kernels != "triton":
            raise ValueError(f"attention 'flashinfer' needs kernels 'triton', not {self.kernels!r}")
        if not self.fuse_deviation >= 0:
            raise ValueError(f"fuse_deviation must be at least 0, is {self.fuse_deviation}")
