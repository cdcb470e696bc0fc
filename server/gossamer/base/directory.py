"""Whether a directory holds a base model, by the look of its files."""

from __future__ import annotations

import json
from pathlib import Path

from gossamer.base.errors import (
    CorruptBaseError,
    MissingFilesError,
    PickledWeightsError,
    UnsupportedBaseError,
)
from gossamer.base.load import weight_files

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
#: Any one of these sets makes a tokenizer.
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


def check_directory(path: Path) -> None:
    """Whether a directory has what a base model needs, by the look of its files.

    Raises:
        PickledWeightsError: its only weights are pickles.
        MissingFilesError: no configuration, weights or tokenizer.
        UnsupportedBaseError: it is an adapter, or its weights are quantized.
    """
    adapter = path / "adapter_config.json"
    if adapter.exists():  # transformers would load it on top without a word
        raise UnsupportedBaseError(
            path.name, f"{adapter.name} makes it an adapter", "Give the directory of the base model"
        )
    weights = weight_files(path)
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if not weights and pickles:
        raise PickledWeightsError(path, pickles)
    missing = [name for name in ("config.json",) if not (path / name).is_file()]
    missing += [file.name for file in weights if not file.is_file()]
    missing += [] if weights else ["model.safetensors"]
    if not any(all((path / name).is_file() for name in names) for names in TOKENIZERS):
        missing.append("tokenizer.json")
    if missing:
        raise MissingFilesError(path, missing)
    check_configuration(path.name, path / "config.json")


def check_configuration(name: str, file: Path) -> None:
    """What can be told from the configuration alone, of the base called `name`.

    Raises:
        UnsupportedBaseError: its weights are quantized.
        CorruptBaseError: it is not a JSON object.
    """
    try:
        config = json.loads(file.read_text())
        quantization = config.get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise CorruptBaseError(file, "it is not a JSON object") from error
    if quantization:
        raise UnsupportedBaseError(
            name,
            "its weights are quantized, and deltas are differences to plain weights",
            "Use the original checkpoint in float32, bfloat16 or float16",
        )
