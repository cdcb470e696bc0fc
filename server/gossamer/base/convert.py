"""A GGUF file, converted once to a Hugging Face directory in float32.

transformers reads the file, and three of its silences are closed here. Tensors that its name table
does not know are skipped without a word, which would drop biases or rotary factors: every value in
the file must have arrived in the model. Rotary scaling is ignored for most architectures: a file
that asks for it and does not get it is refused. Byte-level tokenizers of kinds that it does not
know split text as GPT-2 did, so that the same words become other tokens than the model was trained
on: the kinds that split off digits are mended, unknown ones are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from gossamer.base.errors import CorruptBaseError, UnsupportedBaseError
from gossamer.base.fetch import Progress, silent
from gossamer.base.fingerprint import fingerprint
from gossamer.base.load import (
    LOADING_ERRORS,
    SINGLE,
    check_loading,
    frozen,
    load_directory,
    quiet,
)

MAGIC = b"GGUF"

#: `tokenizer.ggml.pre` of vocabularies that are split by GPT-2's expression and nothing else.
GPT2_SPLIT = frozenset({"gpt-2", "default", "mpt", "olmo", "jais", "phi-2", "trillion"})

#: The same, after every digit has been cut off on its own. transformers 5.23 does not know these
#: and leaves GPT-2's split, which turns "\n\n1" into other tokens than the model was trained on.
#: Source: llama.cpp, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM and its siblings.
DIGIT_SPLIT = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)

USE_DIRECTORY = "Give the directory of the original model (config.json and safetensors) instead"


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself, as far as the checks here need it."""

    architecture: str
    elements: int
    rope_scaling: str
    tokenizer: str
    split: str


def convert_gguf(file: Path, out: Path, progress: Progress = silent) -> str:
    """Write the model in a GGUF file to the new directory `out` and return its fingerprint.

    `out` gets model.safetensors (float32, tied weights once), config.json, generation_config.json
    and the tokenizer with its chat template. What was written is read back and must have the
    fingerprint of what was converted.

    `file` must lie in a directory of its own: transformers looks at its neighbours.

    Raises:
        CorruptBaseError: not a GGUF file, or a damaged one.
        UnsupportedBaseError: transformers does not read this architecture, or not all of it.
    """
    progress("convert", 0, 1)
    header = read_header(file)
    model = _read_model(file, header)
    tokenizer = _read_tokenizer(file, header, model.config.max_position_embeddings)
    expected = fingerprint(model)
    out.mkdir()
    _write_model(model, out)
    _write_tokenizer(tokenizer, out)
    del model  # the copy that is read back may need the room
    progress("convert", 1, 1)
    progress("check", 0, 1)
    if fingerprint(load_directory(out, torch.float32)) != expected:
        raise CorruptBaseError(out, "what was written is not what was converted")
    progress("check", 1, 1)
    return expected


def read_header(file: Path) -> Header:
    """The few fields of a GGUF file that decide whether it can be converted right.

    Raises:
        CorruptBaseError: not a GGUF file, or a damaged one.
    """
    with file.open("rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            raise CorruptBaseError(file, "it does not begin like a GGUF file")
    try:
        reader = GGUFReader(file)
        architecture = _text(reader, "general.architecture")
        return Header(
            architecture=architecture,
            elements=sum(int(tensor.n_elements) for tensor in reader.tensors),
            rope_scaling=_text(reader, f"{architecture}.rope.scaling.type", "none"),
            tokenizer=_text(reader, "tokenizer.ggml.model", "none"),
            split=_text(reader, "tokenizer.ggml.pre", "default"),
        )
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise CorruptBaseError(file, f"its header is damaged ({error})") from error


def _text(reader: Any, key: str, default: str | None = None) -> str:
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise KeyError(key)
        return default
    return str(field.contents())


def _read_model(file: Path, header: Header) -> PreTrainedModel:
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                # With a GGUF kernel installed transformers would keep the quantized blocks.
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (*LOADING_ERRORS, NotImplementedError) as error:
            reason = f"transformers cannot read it ({error})"
            raise UnsupportedBaseError(file.name, reason, USE_DIRECTORY) from error
    model, info = loaded
    check_loading(file, info)
    arrived = sum(parameter.numel() for parameter in model.parameters())
    if arrived != header.elements:
        raise UnsupportedBaseError(
            file.name,
            f"the file holds {header.elements} weights, of which transformers' "
            f"{type(model).__name__} takes {arrived}",
            USE_DIRECTORY,
        )
    rope = getattr(model.config, "rope_parameters", None) or {}
    if header.rope_scaling != "none" and rope.get("rope_type", "default") == "default":
        raise UnsupportedBaseError(
            file.name,
            f"transformers ignores its rotary scaling ({header.rope_scaling})",
            USE_DIRECTORY,
        )
    return frozen(model)


def _read_tokenizer(file: Path, header: Header, max_length: int) -> Tokenizer:
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
            )
        except (*LOADING_ERRORS, NotImplementedError) as error:
            reason = f"transformers cannot read its tokenizer ({error})"
            raise UnsupportedBaseError(file.name, reason, USE_DIRECTORY) from error
    tokenizer.model_max_length = max_length
    if header.tokenizer != "gpt2":
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if header.split in DIGIT_SPLIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif header.split not in GPT2_SPLIT and isinstance(
        backend.pre_tokenizer, pre_tokenizers.ByteLevel
    ):
        raise UnsupportedBaseError(
            file.name,
            f"transformers does not know how its tokenizer splits text ({header.split})",
            USE_DIRECTORY,
        )
    return tokenizer


def _write_model(model: PreTrainedModel, out: Path) -> None:
    """What `save_pretrained` would write, which refuses a model that came from a GGUF file."""
    every = dict(model.named_parameters(remove_duplicate=False))
    once = dict(model.named_parameters())
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name in once or name not in every
    }
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    (out / SINGLE).chmod(0o644)  # safetensors makes files that only their owner may read
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    if model.generation_config is not None:
        # made from the config here, but from now on a file of its own
        model.generation_config._from_model_config = False  # noqa: SLF001
        model.generation_config.save_pretrained(out)


def _write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for leftover in ("is_local", "local_files_only", "backend"):
        config.pop(leftover, None)
    # the name that transformers 4 and 5 both know; 5 alone writes "TokenizersBackend"
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")
