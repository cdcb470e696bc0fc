"""PEFT's mixed batches. Runs inside its own environment: `python -m benchmarks.peers.peft_runner`.

The base-only job runs transformers' own `generate` without PEFT around it.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.common import Meter, versions
from benchmarks.peers.job import Job, Outcome, check, serve_job


def run(job: Job) -> Outcome:
    """Warm up with a few tokens, time the whole job once."""
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    names = [f"lora-{i}" for i in range(len(job.adapters))]
    rows = {}
    if names:
        model = PeftModel.from_pretrained(model, job.adapters[0], adapter_name=names[0]).eval()
        for name, path in zip(names[1:], job.adapters[1:], strict=True):
            model.load_adapter(path, adapter_name=name)
        rows = {"adapter_names": [names[i % len(names)] for i in range(len(job.prompts))]}
    width = max(map(len, job.prompts))
    ids = torch.zeros(len(job.prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(job.prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    def generate(new_tokens: int) -> torch.Tensor:
        out: torch.Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **rows,
        )
        return out[:, width:]

    with torch.inference_mode():
        generate(4)
        with Meter() as meter:
            tokens = generate(job.new_tokens).tolist()
    check(job, tokens)
    return Outcome(
        seconds=meter.seconds,
        tokens=job.tokens,
        foreign=meter.foreign,
        versions=versions(["peft", "torch", "transformers"]),
        first=tokens[0],
    )


if __name__ == "__main__":
    serve_job(run)
