"""Which tokens are trained, and what a batch of them looks like."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.tokenization_python import PythonBackend

from gossamer.base.errors import UnsupportedBaseError
from gossamer.training.batches import IGNORED, collate
from gossamer.training.data import read_examples
from gossamer.training.encode import Encoded, encode_examples
from gossamer.training.errors import DataError, StoppedError
from gossamer.training.trainee import Trainee
from tests.tiny import ARCHS, EOS_ID, tiny_model, tiny_tokenizer
from tests.training.support import write_jsonl

TOKENIZER = tiny_tokenizer()
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Count to ten."},
    {"role": "assistant", "content": "1, 2, 3"},
]


def encode(tmp_path: Path, rows: list[dict[str, Any]], max_length: int = 512) -> list[Encoded]:
    examples = read_examples(write_jsonl(tmp_path / "data.jsonl", rows))
    return list(encode_examples(examples, TOKENIZER, max_length).fitting)


def trained_text(encoded: Encoded) -> str:
    return str(TOKENIZER.decode(encoded.ids[encoded.trained]))


def test_a_completion_is_trained_and_ends(tmp_path: Path) -> None:
    (encoded,) = encode(tmp_path, [{"prompt": "The capital is", "completion": " Paris"}])
    assert trained_text(encoded) == " Paris<|im_end|>"
    assert TOKENIZER.decode(encoded.ids) == "The capital is Paris<|im_end|>"
    assert encoded.ids[-1] == EOS_ID
    assert not encoded.trained[0]


def test_the_prompt_is_tokenised_as_it_is_served(tmp_path: Path) -> None:
    """A token may not run over the border, though the whole text would be tokenised like that."""
    prompt, completion = "The base mo", "del stays"
    whole = TOKENIZER(prompt + completion)["input_ids"]
    alone = TOKENIZER(prompt)["input_ids"]
    assert whole[: len(alone)] != alone
    (encoded,) = encode(tmp_path, [{"prompt": prompt, "completion": completion}])
    assert encoded.ids[~encoded.trained].tolist() == alone
    assert trained_text(encoded) == "del stays<|im_end|>"


def test_an_end_that_is_there_is_not_doubled(tmp_path: Path) -> None:
    (encoded,) = encode(tmp_path, [{"prompt": "a", "completion": "b<|im_end|>"}])
    assert encoded.ids.tolist().count(EOS_ID) == 1


def test_every_answer_of_a_conversation_is_trained_and_nothing_else(tmp_path: Path) -> None:
    (encoded,) = encode(tmp_path, [{"messages": CHAT}])
    assert trained_text(encoded) == "Paris.<|im_end|>1, 2, 3<|im_end|>"
    rendered = TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert TOKENIZER.decode(encoded.ids) == rendered
    served = TOKENIZER.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    ids = TOKENIZER(served, add_special_tokens=False)["input_ids"]
    assert encoded.ids[: encoded.trained.argmax()].tolist() == ids


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'last ' if loop.last else '' }}{{ m['role'] + m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    examples = read_examples(write_jsonl(tmp_path / "data.jsonl", [{"messages": CHAT}]))
    with pytest.raises(DataError, match="differently") as caught:
        encode_examples(examples, tokenizer, 512)
    assert (caught.value.line, caught.value.field) == (1, "messages[2]")


def test_what_the_template_raises_is_told_with_the_line(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    examples = read_examples(write_jsonl(tmp_path / "data.jsonl", [{"messages": CHAT}]))
    with pytest.raises(DataError, match="no system messages") as caught:
        encode_examples(examples, tokenizer, 512)
    assert caught.value.line == 1


def test_long_examples_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a " * 50, "completion": "b"},
    ]
    examples = read_examples(write_jsonl(tmp_path / "data.jsonl", rows))
    encoded = encode_examples(examples, TOKENIZER, 10)
    assert (len(encoded.fitting), encoded.dropped) == (1, 1)
    with pytest.raises(DataError, match="no example fits"):
        encode_examples(examples, TOKENIZER, 2)


def test_encoding_stops_when_it_is_told_to(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 400
    examples = read_examples(write_jsonl(tmp_path / "data.jsonl", rows))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(len(asked))
        return len(asked) == 2

    with pytest.raises(StoppedError):
        encode_examples(examples, TOKENIZER, 512, stop=stop)
    assert len(asked) == 2
    assert len(encode_examples(examples, TOKENIZER, 512, stop=lambda: False).fitting) == 400


class Letters(PythonBackend):
    """A tokenizer in Python, which cannot say where its tokens lie."""

    def __init__(self) -> None:
        self._letters = ["</s>", *map(chr, range(32, 127))]
        super().__init__(eos_token="</s>", unk_token="</s>", chat_template="{{ messages }}")

    @property
    def vocab_size(self) -> int:
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        return {letter: index for index, letter in enumerate(self._letters)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._letters[index]


def test_a_tokenizer_that_cannot_say_where_its_tokens_lie_takes_completions(tmp_path: Path) -> None:
    tokenizer = Letters()
    assert not tokenizer.is_fast
    row = {"prompt": "ab", "completion": "cd"}
    examples = read_examples(write_jsonl(tmp_path / "data.jsonl", [row]))
    (encoded,) = encode_examples(examples, tokenizer, 512).fitting
    assert encoded.ids.tolist() == [*map(tokenizer._convert_token_to_id, "abcd"), 0]
    assert encoded.trained.tolist() == [False, False, True, True, True]
    examples = read_examples(write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}]))
    with pytest.raises(UnsupportedBaseError, match="where"):
        encode_examples(examples, tokenizer, 512)


def examples_of(tmp_path: Path) -> list[Encoded]:
    return encode(
        tmp_path,
        [
            {"prompt": "The capital is", "completion": " Paris"},
            {"prompt": "Count to ten: 1, 2, 3, 4, 5, 6, and then", "completion": " 7"},
            {"messages": CHAT},
            {"prompt": "x", "completion": "y"},
        ],
    )


def test_a_batch_says_what_each_logit_should_predict(tmp_path: Path) -> None:
    examples = examples_of(tmp_path)
    batch = collate(examples, pad_id=0)
    width, scored = batch["input_ids"].shape[1], batch["labels"].shape[1]
    assert scored == max(example.scored for example in examples)
    for row, example in enumerate(examples):
        size = example.ids.size
        assert batch["input_ids"][row, width - size :].tolist() == example.ids.tolist()
        assert batch["attention_mask"][row].tolist() == [0] * (width - size) + [1] * size
        assert batch["position_ids"][row, width - size :].tolist() == list(range(size))
        labels = batch["labels"][row]
        kept = labels[labels != IGNORED].tolist()
        assert kept == example.ids[example.trained].tolist()
        assert labels[-1] == IGNORED
        following = batch["input_ids"][row, width - scored + 1 :]
        assert torch.equal(labels[:-1].where(labels[:-1] != IGNORED, following), following)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_loss_of_a_batch_is_that_of_its_rows_alone(arch: str, tmp_path: Path) -> None:
    """Padding, positions and the last logits only: none may change the loss."""
    model = tiny_model(arch)
    examples = examples_of(tmp_path)
    trainee = Trainee(model)
    with torch.no_grad():
        together = trainee(**collate(examples, pad_id=0))["loss"]
        total, count = torch.zeros(()), 0
        for example in examples:
            ids = torch.from_numpy(example.ids)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            wanted = torch.from_numpy(example.trained)[1:]
            total += F.cross_entropy(logits[wanted], ids[1:][wanted], reduction="sum")
            count += int(wanted.sum())
        torch.testing.assert_close(together, total / count, rtol=1e-5, atol=1e-5)
        shifted = collate(examples, pad_id=0)
        shifted["position_ids"] = torch.arange(shifted["input_ids"].shape[1]).expand(4, -1) * 3
        wrong = trainee(**shifted)["loss"]
    assert (wrong - together).abs() > 1e-4
    assert trainee.tokens == 2 * sum(example.ids.size for example in examples)
