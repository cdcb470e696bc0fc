"""What the trainer's model and the server's engine say to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gossamer.engine.messages import Done, PromptScored, Request, Sampling
from gossamer.merge.mix import BASE, Member, canonical
from gossamer.store.delta import DeltaSet
from gossamer.training import Evaluation, Silent
from gossamer.training.sparse import Entries, SparseLinear, attached
from gossamer.training.starting import entries_of
from tests.api.running import Running

#: Of logits, and of log-probabilities, in fp32.
TOLERANCE = 1e-4

Prompts = Sequence[tuple[int, ...]]


def model_logprobs(model: nn.Module, prompts: Prompts) -> list[Tensor]:
    """By prompt: [tokens - 1, vocabulary], the log-probabilities of what follows each token."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([p]), use_cache=False).logits[0] for p in prompts]
    return [torch.log_softmax(row[:-1].double(), -1) for row in rows]


class Final(Silent):
    """Keeps what the trainer's model says at the end of a run, the trained layers in their places.

    The run must have held-out examples: it evaluates after its last step.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts) -> None:
        self._model, self._prompts = model, prompts
        self.logprobs: list[Tensor] = []

    def evaluated(self, event: Evaluation) -> None:
        self.logprobs = model_logprobs(self._model, self._prompts)


@contextmanager
def trained_layers(model: PreTrainedModel, delta_set: DeltaSet) -> Iterator[PreTrainedModel]:
    """The trainer's model with an adapter's stored values as the trained ones."""

    def layer(entries: Entries) -> Callable[[nn.Linear], SparseLinear]:
        return lambda linear: SparseLinear(
            linear, entries.positions, written=True, start=entries.values
        )

    made = {name: layer(entries) for name, entries in entries_of(delta_set).items()}
    with attached(model, made):
        yield model


def server_logprobs(server: Running, digest: str | None, prompts: Prompts) -> list[Tensor]:
    """As `model_logprobs`, of the engine that answers the server's requests, over the whole
    vocabulary; the adapter comes from the catalog. Without a digest, of the base."""
    engine = server.services.engine
    mix = BASE if digest is None else canonical([Member(digest, 1.0)])
    scoring = Sampling(max_tokens=0, prompt_logprobs=engine.vocab_size)
    requests = [Request(f"{digest}-{i}", p, mix, scoring) for i, p in enumerate(prompts)]
    found = []
    for messages in engine.generate(requests):
        assert isinstance(messages[-1], Done), messages[-1]
        (scored,) = (one for one in messages if isinstance(one, PromptScored))
        rows = torch.full((len(scored.tokens) - 1, engine.vocab_size), torch.nan).double()
        for row, token in zip(rows, scored.tokens[1:], strict=True):
            assert token is not None
            ids, values = zip(*token.top, strict=True)
            row[list(ids)] = torch.tensor(values, dtype=torch.float64)
        found.append(rows)
    return found


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest of any token's at any place; a token that nobody has told of is nan."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
