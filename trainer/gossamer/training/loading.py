"""The base in memory: loaded when a run first needs it, and kept for the runs that follow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from gossamer.base.errors import UnsupportedBaseError
from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import BaseFiles, load_model, load_tokenizer, stored_dtype
from gossamer.training.errors import BaseChangedError, ConfigError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, eq=False)
class Lent:
    """A model that a run works with, and gives back as it was.

    Attributes:
        model: frozen, in eval mode.
        fingerprint: of it, before the run.
    """

    model: PreTrainedModel
    fingerprint: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> Lent:
        """As it is now."""
        return cls(model, fingerprint(model))

    def check(self) -> None:
        """Look whether it still is bit for bit what it was.

        Raises:
            BaseChangedError
        """
        now = fingerprint(self.model)
        if now != self.fingerprint:
            raise BaseChangedError(self.fingerprint, now)


class LoadedBase:
    """A base's model and tokenizer, kept from one run to the next; one model in memory at a time.

    A model is kept after a run that has ended well, which has checked it: that check is the next
    run's `fingerprint` too. After any other it is given up, for nobody knows what the run has left
    in it, and to find out costs more than to load it (measured, 135 M weights: 0.5 s and 0.1 s).

    Not thread-safe.

    Args:
        files: the base; nothing is read yet.
    """

    def __init__(self, files: BaseFiles) -> None:
        self.files = files
        self._tokenizer: Tokenizer | None = None
        self._kept: tuple[tuple[str, torch.dtype], Lent] | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer.

        Raises:
            UnsupportedBaseError: transformers cannot make one.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.files)
        return self._tokenizer

    @contextmanager
    def lent(self, device: str, precision: Precision) -> Iterator[Lent]:
        """The model, for one run: the context.

        Whoever has changed it leaves by an exception, as `Lent.check` does.

        Args:
            device: `auto`, `cpu` or `cuda`.
            precision: of the run; what the model is loaded in follows from it and from the files.

        Raises:
            ConfigError: there is no such device.
            BaseModelError: the base cannot be loaded.
        """
        wanted = (_device(device), _dtype(self.files, precision))
        kept, self._kept = self._kept, None
        if kept is None or kept[0] != wanted:
            del kept  # before another is loaded
            kept = (wanted, Lent.of(_load(self.files, *wanted)))
        yield kept[1]
        self._kept = kept


def free_memory() -> None:
    """Let go of what a run has left: its trainer, and so its tensors, hang in reference cycles.

    For a process that may idle now. The memory of a device goes back to it, for others.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _device(given: str) -> str:
    there = torch.cuda.is_available()
    if given == "cuda" and not there:
        raise ConfigError("device", "there is no CUDA device on this machine")
    return ("cuda" if there else "cpu") if given == "auto" else given


def _dtype(files: BaseFiles, precision: Precision) -> torch.dtype:
    if precision == "bf16" and stored_dtype(files.path) == torch.bfloat16:
        return torch.bfloat16  # half the memory, and no bit of the base is lost
    return torch.float32


def _load(files: BaseFiles, device: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return load_model(files, dtype, device, attention="sdpa")
    except UnsupportedBaseError:
        # some architectures have eager attention only; a base that is truly bad fails again here
        return load_model(files, dtype, device, attention="eager")
