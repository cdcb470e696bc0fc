"""The tokens that end a text: where the server stops, and what a trained answer ends with."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer


def end_tokens(tokenizer: Tokenizer, generation: GenerationConfig | None) -> frozenset[int]:
    """Those of the base's generation config, and the tokenizer's own."""
    found: set[int] = set()
    for ids in (None if generation is None else generation.eos_token_id, tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """What transformers gives a model that it loads from this folder: the generation config, or
    that of the model's configuration where there is none."""
    for file, of_model in (("generation_config.json", False), ("config.json", True)):
        if (folder / file).is_file():
            return GenerationConfig.from_pretrained(
                folder, file, local_files_only=True, _from_model_config=of_model
            )
    return None
