"""A tenant of the tests that trains, with OpenAI's client."""

from __future__ import annotations

from typing import Any

from openai.types.fine_tuning import FineTuningJob

from tests.api.running import Running

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3
PROMPT = "Two adapters may be merged"


class Tenant:
    """A tenant that nobody else uses, with a training file."""

    def __init__(self, server: Running, name: str) -> None:
        self.server, self.name = server, name
        self.key = server.new_key(name)
        self.client = server.client(self.key)
        self.jobs = self.client.fine_tuning.jobs
        self.file = self.client.files.create(file=("a.jsonl", LINES), purpose="fine-tune").id

    def create(self, adapter: Any = None, **fields: Any) -> FineTuningJob:
        """Create a job on the base."""
        extra = {} if adapter is None else {"adapter": adapter}
        return self.jobs.create(
            **{"model": "base", "training_file": self.file, **fields}, extra_body=extra
        )

    def text(self, model: str) -> str:
        """What a model answers."""
        extra = {"ignore_eos": True}
        answer = self.client.completions.create(
            model=model, prompt=PROMPT, temperature=0, max_tokens=12, extra_body=extra
        )
        return answer.choices[0].text
