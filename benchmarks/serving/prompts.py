"""The texts of the job. Changing one makes new results incomparable with old ones."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

#: With SmolLM2's chat template and its default system message about 43 tokens each.
QUESTIONS = (
    "Explain in simple words to a child why the sky is blue.",
    "Write a short letter to a friend about a day at the sea.",
    "What are three good ways to learn a new language quickly?",
    "Tell me how bread is made, from the field to the table.",
    "Describe the city of Paris to someone who has never seen it.",
    "Why do cats purr, and what does it mean when they do?",
    "Give me a simple plan for a week of healthy dinners.",
    "What happens inside a computer when I press a key?",
    "Write the beginning of a story about a lonely lighthouse keeper.",
    "How does a bicycle stay upright while it is moving?",
    "List the planets of the solar system with one fact each.",
    "What should I think about before I adopt a young dog?",
    "Explain the difference between weather and climate with an example.",
    "Write four lines of a poem about the first snow.",
    "How can a small shop find more customers in its town?",
    "What is the history of coffee, told in a few sentences?",
)

#: Repeated until a prompt of the wanted length is full.
PASSAGE = (
    "The river rises in the hills above the old mill, where three springs meet under the roots of "
    "a beech. In summer it is narrow enough to step across; in spring it carries branches, ice and "
    "once a wooden door down to the plain. The people of the valley measured its height every "
    "morning for two hundred years and wrote the number into a book, beside the price of wheat, "
    "the births and the deaths. Nobody had asked them to. When the book was found, it turned out "
    "to be the longest record of its kind, and the hills were full of visitors with instruments. "
)


def job_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The 16 prompts as token ids, with the chat template."""
    prompts: list[list[int]] = []
    for question in QUESTIONS:
        message = {"role": "user", "content": question}
        text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    return prompts


def long_prompt(tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[int]:
    """A prompt of exactly `tokens` tokens."""
    once = len(tokenizer(PASSAGE)["input_ids"])
    ids: list[int] = list(tokenizer(PASSAGE * (tokens // once + 1))["input_ids"])
    return ids[:tokens]
