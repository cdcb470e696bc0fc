"""Gather/scatter kernels for sparse deltas: plain tensors in, plain tensors out."""

from gossamer.kernels.apply import apply
from gossamer.kernels.attention import (
    PAGE_MULTIPLE,
    framed_kv_pages,
    kv_page_bytes,
    kv_page_shapes,
    new_kv_pages,
    paged_attention,
    rotate_and_write,
    write_kv,
)
from gossamer.kernels.backends import BACKENDS, Backend, available_backends, warm_up
from gossamer.kernels.beside import Branch
from gossamer.kernels.delta import (
    EXACT_CODINGS,
    BoundDeltas,
    Coding,
    PackedDelta,
    Piece,
    add_dense,
    bind,
    pack,
    records,
    sides_of,
    to_dense,
)
from gossamer.kernels.elementwise import fused_add_rms_norm, rms_norm, silu_and_mul
from gossamer.kernels.errors import (
    BackendUnavailableError,
    IndexRangeError,
    KernelError,
    NotCapturableError,
    NotRestoredError,
    PackError,
    ShapeError,
)
from gossamer.kernels.linear import linear
from gossamer.kernels.plan import WorkPlan
from gossamer.kernels.program import Program, ProgramPool, program_pool
from gossamer.kernels.scatter import Saved, Target, fuse_into, restore, rounding
from gossamer.kernels.terms import Terms, compute_terms

__all__ = [
    "BACKENDS",
    "EXACT_CODINGS",
    "PAGE_MULTIPLE",
    "Backend",
    "BackendUnavailableError",
    "BoundDeltas",
    "Branch",
    "Coding",
    "IndexRangeError",
    "KernelError",
    "NotCapturableError",
    "NotRestoredError",
    "PackError",
    "PackedDelta",
    "Piece",
    "Program",
    "ProgramPool",
    "Saved",
    "ShapeError",
    "Target",
    "Terms",
    "WorkPlan",
    "add_dense",
    "apply",
    "available_backends",
    "bind",
    "compute_terms",
    "framed_kv_pages",
    "fuse_into",
    "fused_add_rms_norm",
    "kv_page_bytes",
    "kv_page_shapes",
    "linear",
    "new_kv_pages",
    "pack",
    "paged_attention",
    "program_pool",
    "records",
    "restore",
    "rms_norm",
    "rotate_and_write",
    "rounding",
    "sides_of",
    "silu_and_mul",
    "to_dense",
    "warm_up",
    "write_kv",
]
