"""`/v1/completions` through the openai client, against a real engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from openai.types import Completion

from tests.api.running import Running
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = "The capital of France is"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def complete(api: Running, **options: Any) -> Completion:
    options = {"model": "base", "prompt": PROMPT, **GREEDY, **options}
    answer: Completion = api.client().completions.create(**options)
    return answer


def test_greedy_tokens_are_those_of_generate(api: Running) -> None:
    answer = complete(api, extra_body={"ignore_eos": True, "return_token_ids": True})
    choice: Any = answer.choices[0]
    prompt = torch.tensor([tiny_tokenizer().encode(PROMPT)])
    reference: Any = tiny_model("llama")
    with torch.inference_mode():
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
        )
    assert choice.prompt_token_ids == prompt[0].tolist()
    assert choice.token_ids == expected[0, prompt.shape[1] :].tolist()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt.shape[1]
    assert answer.usage.completion_tokens == 12
    assert choice.finish_reason == "length"


def test_all_forms_of_a_prompt_say_the_same(api: Running) -> None:
    tokens = tiny_tokenizer().encode(PROMPT)
    texts = [
        [choice.text for choice in complete(api, prompt=prompt).choices]
        for prompt in (PROMPT, [PROMPT], tokens, [tokens])
    ]
    assert texts[0][0]
    assert all(found == texts[0] for found in texts)


def test_more_prompts_than_the_engine_gets_at_once(api: Running) -> None:
    prompts = [f"Count to {i}" for i in range(40)]
    answer = complete(api, prompt=prompts, max_tokens=2, n=2)
    assert [choice.index for choice in answer.choices] == list(range(80))
    alone = complete(api, prompt=prompts[37], max_tokens=2)
    assert answer.choices[74].text == answer.choices[75].text == alone.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 160


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "Count to ten:"]])
def test_a_stream_adds_up_to_the_plain_reply(api: Running, prompt: Any) -> None:
    plain = complete(api, prompt=prompt, n=2, echo=True)
    texts = [""] * len(plain.choices)
    reasons: list[Any] = [None] * len(plain.choices)
    usages = []
    for chunk in api.client().completions.create(
        model="base",
        prompt=prompt,
        n=2,
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    ):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in plain.choices]
    assert reasons == [choice.finish_reason for choice in plain.choices]
    assert usages[-1] == plain.usage or usages[-1].total_tokens == plain.usage.total_tokens  # type: ignore[union-attr]
    assert not any(usages[:-1])


def test_the_async_client_streams_many_at_once(api: Running) -> None:
    expected = complete(api).choices[0].text

    async def one(client: Any) -> str:
        stream = await client.completions.create(model="base", prompt=PROMPT, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with api.async_client() as client:
            return await asyncio.gather(*(one(client) for _ in range(24)))

    assert asyncio.run(all_of_them()) == [expected] * 24


def test_a_seed_repeats_itself_and_another_does_not(api: Running) -> None:
    def say(seed: int) -> list[str]:
        options = {"temperature": 1.5, "max_tokens": 16, "seed": seed, "n": 3}
        return [choice.text for choice in complete(api, **options).choices]

    assert say(7) == say(7)
    assert say(7) != say(8)
    assert len(set(say(7))) > 1


def test_stop_strings_end_the_text_before_or_after_them(api: Running) -> None:
    whole = complete(api).choices[0].text
    stop = whole[3:6]
    cut: Any = complete(api, stop=[stop, "never"]).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = complete(
        api, stop=stop, extra_body={"ignore_eos": True, "include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == whole[: whole.index(stop) + len(stop)]


def test_logprobs_are_log_probabilities_and_the_greedy_token_is_the_likeliest(
    api: Running,
) -> None:
    answer = complete(api, logprobs=4)
    lists = answer.choices[0].logprobs
    assert lists is not None
    assert len(lists.tokens or []) == len(lists.top_logprobs or []) == 12
    for token, value, top in zip(
        lists.tokens or [], lists.token_logprobs or [], lists.top_logprobs or [], strict=True
    ):
        assert value < 0
        assert len(top) >= 4
        assert max(top, key=lambda label: top[label]) == token
        assert top[token] == value


def test_an_echoed_prompt_can_be_scored_without_any_new_token(api: Running) -> None:
    answer = complete(api, echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    tokens = tiny_tokenizer().encode(PROMPT)
    values: list[Any] = list(choice.logprobs.token_logprobs or [])
    assert len(values) == len(tokens)
    with torch.inference_mode():
        logits = tiny_model("llama")(torch.tensor([tokens])).logits[0]
    expected = logits.log_softmax(-1)[range(len(tokens) - 1), tokens[1:]].tolist()
    assert values[0] is None
    assert values[1:] == pytest.approx(expected, abs=1e-4)
    assert values[1:] != pytest.approx([value + 0.01 for value in expected], abs=1e-4)


def test_a_repeated_prompt_finds_its_keys_and_values(api: Running) -> None:
    prompt = "A sparse adapter changes a few weights and leaves the rest as it was. " * 3
    for _ in range(2):
        answer = complete(api, prompt=prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_biases_and_allowed_tokens_are_obeyed(api: Running) -> None:
    token = tiny_tokenizer().encode("x")[0]
    biased = complete(api, max_tokens=3, logit_bias={str(token): 100})
    assert biased.choices[0].text == "xxx"
    allowed = complete(
        api, max_tokens=3, extra_body={"allowed_token_ids": [token], "ignore_eos": True}
    )
    assert allowed.choices[0].text == "xxx"


def test_fields_that_have_no_effect_are_accepted(api: Running) -> None:
    expected = complete(api).choices[0].text
    body = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "ignore_eos": True}
    answer = complete(api, user="me", best_of=1, extra_body=body)
    assert answer.choices[0].text == expected
