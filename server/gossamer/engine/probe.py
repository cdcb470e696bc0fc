"""Refuse at start what cannot be served right: by rule where a rule is known, else by trying.

Before the model is rebuilt, two short random texts go through it as transformers runs it, each
alone. Afterwards the engine runs both in one ragged batch, with a chunked prefill. If the logits
differ, the architecture does something that the engine does not know, and it is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.engine.errors import UnsupportedModel
from gossamer.engine.messages import Request
from gossamer.engine.runner import Runner
from gossamer.engine.scheduler import Work
from gossamer.engine.sequence import Sequence

#: Rotary embeddings whose frequencies depend on the longest text of a batch: with them a row's
#: result would depend on its neighbours.
_BATCH_DEPENDENT_ROPE = {"dynamic", "longrope"}

#: Largest accepted difference of logits (root mean square) relative to their spread, by the base's
#: dtype. Measured on the tiny test architectures, four seeds each: 1e-6 in fp32, up to 0.003 in
#: fp16 and 0.022 in bf16, where the largest single difference is up to 0.11.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}

_LENGTHS = (5, 21)
_CHUNK = 16


def check_static(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModel` for what is known not to work."""
    name = type(model).__name__
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(name, "it is not a decoder-only model")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(name, "it does not use transformers' attention interface")
    if not getattr(config, "max_position_embeddings", None):
        raise UnsupportedModel(name, "its configuration does not state a context length")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(name, f"it has layers of type {', '.join(sorted(kinds))}")
    rope = _rope_types(getattr(config, "rope_parameters", None))
    if rope & _BATCH_DEPENDENT_ROPE:
        raise UnsupportedModel(
            name, f"its rotary embedding ({', '.join(sorted(rope))}) depends on the whole batch"
        )


def _rope_types(parameters: object) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return own.union(*(_rope_types(nested) for nested in parameters.values()))


@dataclass(frozen=True)
class Expected:
    """What transformers computes for the probe's texts: logits of each last token, float32."""

    name: str
    texts: tuple[tuple[int, ...], ...]
    logits: Tensor
    tolerance: float


def expected(model: PreTrainedModel) -> Expected:
    """Run the probe's texts through the model as it was loaded, one by one."""
    vocab = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocab, (length,), generator=generator) for length in _LENGTHS]
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        rows = [model(text[None].to(model.device), use_cache=False).logits[0, -1] for text in texts]
    return Expected(
        type(model).__name__,
        tuple(tuple(text.tolist()) for text in texts),
        torch.stack(rows).float(),
        _TOLERANCE.get(model.dtype, 6e-2),
    )


def check(runner: Runner, wanted: Expected) -> None:
    """Raise `UnsupportedModel` unless the engine computes the same. Uses the first KV pages."""
    sequences = []
    first_page = 0
    for text in wanted.texts:
        sequence = Sequence(Request("probe", text), 0, None, 0.0)
        count = -(-len(text) // runner.page_size)
        sequence.pages = list(range(first_page, first_page + count))
        first_page += count
        sequences.append(sequence)
    if first_page > runner.num_pages:
        raise UnsupportedModel(wanted.name, "the memory budget is too small for any request")
    short, long = sequences
    chunk = [Work(long, 0, _CHUNK)]
    rest = [Work(short, 0, len(short.tokens)), Work(long, _CHUNK, len(long.tokens) - _CHUNK)]
    try:
        runner.run(chunk, [()], {})
        got = runner.run(rest, [(), ()], {})
    except UnsupportedModel as error:
        raise UnsupportedModel(wanted.name, error.why) from error
    except (TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise UnsupportedModel(wanted.name, f"the engine cannot run it: {error}") from error
    difference = float((got - wanted.logits).square().mean().sqrt() / wanted.logits.std())
    if not difference <= wanted.tolerance:
        raise UnsupportedModel(
            wanted.name, f"the engine's logits differ from transformers' by {difference:.2g}"
        )
