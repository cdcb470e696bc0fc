"""Models as shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Of a weight, an activation, a key or a value in bf16.
BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Weight:
    """A patched weight: (rows, columns), the rows being those of its packed projections."""

    name: str
    columns: int
    projections: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.projections)

    @property
    def elements(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder of the Llama family.

    Attributes:
        name: what `--model` says.
        layers, hidden, intermediate, heads, kv_heads, head_size, vocabulary: its configuration.
        tied: whether the output head is the embedding.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The patched weights of a layer."""
        queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
        return (
            Weight("qkv", self.hidden, (queries, keys, keys)),
            Weight("o", queries, (self.hidden,)),
            Weight("gate_up", self.hidden, (self.intermediate, self.intermediate)),
            Weight("down", self.intermediate, (self.hidden,)),
        )

    @property
    def elements(self) -> int:
        """Of all patched weights: what a density is a share of."""
        return self.layers * sum(weight.elements for weight in self.weights)

    @property
    def nbytes(self) -> int:
        """All parameters but the norms'."""
        embeddings = (1 if self.tied else 2) * self.vocabulary * self.hidden
        return BYTES * (self.elements + embeddings)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in one layer."""
        return 2 * BYTES * self.kv_heads * self.head_size

    @property
    def lora_parameters(self) -> int:
        """Of a LoRA of rank 1 on every projection."""
        each = (rows + w.columns for w in self.weights for rows in w.projections)
        return self.layers * sum(each)


MODELS: Final = {
    model.name: model
    for model in (
        Model("llama-3.1-8b", 32, 4096, 14336, 32, 8, 128, 128256, False),
        Model("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32768, False),  # v0.3
        Model("smollm2-135m", 30, 576, 1536, 9, 3, 64, 49152, True),
    )
}
