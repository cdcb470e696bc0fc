"""What is measured, at real sizes on a card and at toy sizes in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.roofline.models import MODELS, Model
from gossamer.kernels import Coding

#: The rank of a LoRA on every projection that has as many parameters as 0.6 % of all weights.
EQUAL_PARAMETERS = 16
#: The rank that has as many bytes, at 4 bytes an entry.
EQUAL_BYTES = 32


@dataclass(frozen=True)
class Setting:
    """Sizes of everything.

    Attributes:
        device, dtype: of weights and activations.
        coding: of adapters' values that this dtype reads exactly.
        models: of the decode steps; the first one everywhere else.
        densities: of adapters.
        most_adapters: by density, the most distinct ones in a step; others have no bound.
        rows, adapters: of a step.
        product_rows: of the base's products.
        contexts: that decoding attention looks back on; the first one in decode steps.
        sides: of tiles.
        block_densities: at which tiles are compared with entries.
        equal: the density of `EQUAL_PARAMETERS`.
        prefill_rows, prefill_densities: of which the crossover to the scratch is looked for.
        repetitions: of a timing; medians are taken.
        rounds: of a rate.
        steps: of the timing of a decode step.
        cycles: of fusing and undoing one layer, after which every bit is compared.
        copy_bytes: of the copy that says what the memory reaches.
        sweep_bytes: read between two timed launches, so that no cache holds what they read.
        prompt, new_tokens: of the requests to the engine.
        busy_tokens: of the rows that decode beside a request whose first token is timed.
        registered, room: adapters of the Zipf workload, and how many fit at once.
        requests: of the Zipf workload.
    """

    device: torch.device
    dtype: torch.dtype
    coding: Coding
    models: tuple[Model, ...]
    densities: tuple[float, ...] = (0.0005, 0.001, 0.006, 0.01, 0.1)
    step_densities: tuple[float, ...] = (0.0005, 0.001, 0.006, 0.1)
    most_adapters: tuple[tuple[float, int], ...] = ((0.1, 8),)
    rows: tuple[int, ...] = (16, 64)
    kernel_rows: tuple[int, ...] = (1, 16, 64)
    adapters: tuple[int, ...] = (1, 8, 64, 256)
    kernel_adapters: tuple[int, ...] = (1, 8, 64)
    product_rows: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (512, 4096)
    sides: tuple[int, ...] = (8, 16, 32)
    block_densities: tuple[float, ...] = (0.006, 0.1)
    layout_densities: tuple[float, ...] = (0.001, 0.01, 0.1)
    equal: float = 0.006
    prefill_rows: tuple[int, ...] = (64, 128, 256, 512, 1024)
    prefill_densities: tuple[float, ...] = (0.006, 0.01, 0.02, 0.05, 0.1)
    repetitions: int = 7
    rounds: int = 3
    steps: int = 20
    cycles: int = 10_000
    copy_bytes: int = 1 << 30
    sweep_bytes: int = 1 << 28
    prompt: int = 32
    new_tokens: int = 64
    busy_tokens: int = 4000
    registered: int = 1000
    room: int = 100
    requests: int = 400

    @property
    def codings(self) -> tuple[Coding, ...]:
        """The exact one and the one of 8 bits."""
        return (self.coding, "int8")

    @property
    def model(self) -> Model:
        """The one whose weights the kernels are measured on."""
        return self.models[0]

    def fits(self, adapters: int, density: float) -> bool:
        """Whether so many distinct adapters of a density are to be measured."""
        return adapters <= dict(self.most_adapters).get(density, adapters)


def real() -> Setting:
    """On the first card."""
    models = (MODELS["llama-3.1-8b"], MODELS["mistral-7b"])
    return Setting(torch.device("cuda", 0), torch.bfloat16, "bfloat16", models)


#: Every side of tiles divides its sizes.
TOY = Model("toy", 2, 64, 128, 4, 2, 16, 320, False)


def toy() -> Setting:
    """In the interpreter. float32, whose products it computes as a card does."""
    return Setting(
        device=torch.device("cpu"),
        dtype=torch.float32,
        coding="float32",
        models=(TOY,),
        densities=(0.1,),
        step_densities=(0.01, 0.1),
        most_adapters=((0.1, 1),),
        rows=(2,),
        kernel_rows=(2,),
        adapters=(1, 4),
        kernel_adapters=(1, 2),
        product_rows=(1, 2),
        contexts=(20, 40),
        block_densities=(0.1,),
        layout_densities=(0.1,),
        equal=0.1,
        prefill_rows=(16,),
        prefill_densities=(0.1,),
        repetitions=2,
        rounds=1,
        steps=1,
        cycles=1,
        copy_bytes=1 << 16,
        sweep_bytes=1 << 12,
        prompt=3,
        new_tokens=3,
        busy_tokens=12,
        registered=12,
        room=3,
        requests=4,
    )
