"""The engine's settings, read once by whoever wires it and never changed after."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.kernels.backends import Backend


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
        fuse: write a mix that every row shares into the weights. Off for 16-bit bases, where
            W + Δ is rounded and the fused model is another one.
        fuse_min_steps: steps that the rows must still have ahead for a fuse to pay.
        fuse_cooldown: steps without fusing after a fused window was broken.
        kernels: backend of the delta and attention kernels.
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
    kernels: Backend = "cpu"

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
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
