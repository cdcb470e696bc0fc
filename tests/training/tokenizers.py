"""Tokenizers of several kinds, trained on a few sentences, with chat templates of several kinds."""

from __future__ import annotations

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.tiny import SENTENCES

#: Llama 2's and Mistral's manner: no token of its own between a prompt and its answer.
INSTRUCT = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + '</s>' }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
#: The same, the answer written straight behind the prompt.
TIGHT = INSTRUCT.replace("' ' + m", "m")
#: The same, the space before the answer in the prompt: a token of the whole runs over it.
SPACED = TIGHT.replace("[/INST]'", "[/INST] '")
#: Phi-3's manner: a turn ends with one token, the conversation with another.
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ '</s>' }}{% endif %}"
)
#: Nothing but letters.
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
_TEXTS = [
    *SENTENCES,
    "[INST] Hi [/INST] Yo two Again [/INST]Yo [/INST]Paris",
    "user:Hi assistant:Yo assistant:Yo user:Again",
]


def _fast(backend: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """GPT-2's kind, with merges over everything, spaces and punctuation included."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    # as GPT-2 has it: the span of " Yo" is that of "Yo"
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS * 3, trainer)
    return _fast(backend, template)


def metaspace(template: str, prepend: str = "first") -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a space is a part of the word behind it, and a text begins with one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator([*_TEXTS, "\n"] * 3, trainer)
    return _fast(backend, template)


def word_piece(template: str) -> PreTrainedTokenizerFast:
    """BERT's kind: spaces are dropped, and what goes on inside a word begins with `##`."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(_TEXTS * 3, trainer)
    return _fast(backend, template)
