"""From the files of a base model to a transformers model and tokenizer."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from gossamer.base.errors import CorruptBaseError, UnsupportedBaseError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: The types a checkpoint's floating-point weights may have, by their name in a safetensors header.
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

#: What transformers raises for a directory that it cannot make a model or a tokenizer of.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk, complete and ready to load.

    Attributes:
        name: what people call it: `smollm2-135m`, or the name of the directory or GGUF file.
        path: a directory in Hugging Face's layout: config.json, *.safetensors, the tokenizer.
        fingerprint: which model it is (`gossamer.base.fingerprint`), 64 hexadecimal digits.
    """

    name: str
    path: Path
    fingerprint: str


def load_model(
    base: BaseFiles,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    attention: str = "eager",
) -> PreTrainedModel:
    """The base as transformers' own model, in eval mode, its parameters without gradients.

    Args:
        dtype: of the parameters; a narrower one than the files' rounds them.
        attention: transformers' name of the attention function. `eager` works for every
            architecture; `sdpa` is faster, where transformers allows it (not for Gemma 2).

    Raises:
        UnsupportedBaseError: not a causal language model that transformers itself knows.
        CorruptBaseError: weights are missing, or of other shapes than the configuration says.
    """
    return load_directory(base.path, dtype, device, attention=attention)


def load_directory(
    path: Path,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    attention: str = "eager",
) -> PreTrainedModel:
    """`load_model`, of a directory that has not become a `BaseFiles` yet."""
    device = torch.device(device)
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attention,
                # straight to an accelerator: the host need not hold the whole model
                device_map=None if device.type == "cpu" else {"": device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except SafetensorError as error:
            raise CorruptBaseError(path, _first_line(error)) from error
        except LOADING_ERRORS as error:
            raise _not_loadable(path, error) from error
    model, info = loaded
    check_loading(path, info)
    return frozen(model)


def load_tokenizer(base: BaseFiles) -> Tokenizer:
    """The base's tokenizer, with its chat template where it has one.

    Raises:
        UnsupportedBaseError: transformers cannot make a tokenizer of the directory.
    """
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(
                base.path, local_files_only=True, trust_remote_code=False
            )
        except LOADING_ERRORS as error:
            raise _not_loadable(base.path, error) from error


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model, in eval mode and without gradients."""
    model.requires_grad_(requires_grad=False)
    model.eval()
    return model


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that transformers reads from a directory; empty when it has none.

    Raises:
        CorruptBaseError: the index of a sharded checkpoint is not one.
    """
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        return []
    try:
        shards = json.loads((path / INDEX).read_text())["weight_map"].values()
        return [path / name for name in sorted(set(shards))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptBaseError(path / INDEX, "it is not the index of a checkpoint") from error


def stored_dtype(path: Path) -> torch.dtype:
    """The narrowest type that holds every weight of a directory exactly.

    A checkpoint that mixes types loads in float32: transformers would load all of it in the type
    of the first weight, and round the others.

    Raises:
        CorruptBaseError: a file is not a safetensors file.
        UnsupportedBaseError: a weight is of a quantized type, or of one wider than float32.
    """
    found: set[torch.dtype] = set()
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
                kinds = {name: tensors.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError) as error:
            raise CorruptBaseError(file, _first_line(error)) from error
        for name, kind in kinds.items():
            if kind.startswith(("F", "BF")) and kind not in STORED:
                raise UnsupportedBaseError(
                    path.name,
                    f"its weight {name} is stored as {kind}",
                    "Use a checkpoint in float32, bfloat16 or float16",
                )
        found |= {STORED[kind] for kind in kinds.values() if kind in STORED}
    return found.pop() if len(found) == 1 else torch.float32


def check_loading(path: Path, info: dict[str, Any]) -> None:
    """Refuse a model that transformers completed with random weights.

    Raises:
        CorruptBaseError: weights are missing, or have other shapes than the configuration says.
    """
    for problem, kind in (("missing_keys", "lack"), ("mismatched_keys", "have another shape for")):
        names = sorted(str(key) for key in info[problem])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CorruptBaseError(path, f"the weights {kind} {', '.join(names[:3])}{more}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from talking: no progress bars, no warnings, no log lines below errors.

    Process-wide while it lasts, so it belongs to start-up only. Standard error is held back because
    the GGUF reader draws a bar that no setting turns off; exceptions pass as ever.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _not_loadable(path: Path, error: Exception) -> UnsupportedBaseError:
    return UnsupportedBaseError(
        path.name,
        f"transformers cannot load it ({_first_line(error)})",
        "Use a causal language model whose class is part of transformers",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
