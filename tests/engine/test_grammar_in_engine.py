"""Constraints in the engine, and around it: rows, imports, the process that compiles."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Sequence

from gossamer.engine.errors import InvalidRequest
from gossamer.engine.grammar import Choice, Json, Regex, Spec, compile_constraint, tokenizer_info
from gossamer.engine.messages import Failed, Request, Sampling
from tests.engine.constraining import AMBIGUOUS, SCHEMA, TOKENIZER, obeys_schema
from tests.engine.running import ask, prompts, running, text_of
from tests.tiny import VOCAB_SIZE, tiny_model


def test_rows_of_a_batch_follow_their_own_grammars() -> None:
    made = tokenizer_info(TOKENIZER, VOCAB_SIZE)
    specs: Sequence[Spec | None] = [
        Json(SCHEMA),
        Choice(["sea shells", "the"]),
        None,
        Regex("[0-9]{3}-[a-f]{2}"),
        AMBIGUOUS,
    ]
    sampling = Sampling(max_tokens=200, temperature=1.0, seed=5)
    requests = [
        Request(
            str(i),
            prompt,
            sampling=sampling,
            constraint=None if spec is None else compile_constraint(made, spec),
        )
        for i, (prompt, spec) in enumerate(
            zip(prompts((9, 5, 12, 7, 8), VOCAB_SIZE), specs, strict=True)
        )
    ]
    with running(tiny_model("llama")) as engine:
        answers = ask(engine, *requests)
        (alone,) = ask(engine, requests[2])
    assert obeys_schema(json.loads(text_of(answers[0])))
    assert text_of(answers[1]) in ("sea shells", "the")
    assert text_of(answers[2]) == text_of(alone) != ""
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", text_of(answers[3]))
    failed = answers[4][-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, InvalidRequest)
    made.sandbox.close()


def test_llguidance_is_not_needed_to_import_the_engine() -> None:
    code = """
import sys
import gossamer.engine.client, gossamer.engine.grammar
assert "llguidance" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_process_goes_with_its_owner() -> None:
    made = tokenizer_info(TOKENIZER, VOCAB_SIZE)
    compile_constraint(made, Regex("a"))
    child = made.sandbox._child
    assert child is not None
    process = child._process
    assert process.poll() is None
    del made, child
    gc.collect()
    assert process.poll() is not None
