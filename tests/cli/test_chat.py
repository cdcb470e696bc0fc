"""`gossamer chat` against a real server."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cli.running import GOSSAMER, Live, assert_three_lines, environment, run, run_json
from tests.cli.terminal import Terminal


@pytest.fixture(scope="module", autouse=True)
def _adapters(live: Live, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("chat")
    for name, seed in (("left", 11), ("right", 12)):
        run_json("adapters", "push", name, live.adapter(folder, seed), env=live.env)


def expected(live: Live, model: str, *texts: str, system: str | None = None) -> list[str]:
    """The answers of a conversation, by the openai client."""
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    answers = []
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key) as client:
        for text in texts:
            messages.append({"role": "user", "content": text})
            answer = client.chat.completions.create(
                model=model, messages=messages, max_tokens=8, temperature=0
            )
            answers.append(answer.choices[0].message.content or "")
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("model", ["base", "left", "left*0.7+right*0.3"])
def test_one_message(live: Live, model: str) -> None:
    options = ("chat", "--model", model, "-m", "Hello", "--max-tokens", "8")
    (wanted,) = expected(live, model, "Hello")
    assert run(*options, env=live.env).stdout == wanted + "\n"
    document = run_json(*options, env=live.env)
    assert document["content"] == wanted
    assert document["model"] == model
    assert document["usage"]["completion_tokens"] <= 8
    assert 0 < document["first_token_seconds"] <= document["seconds"]


def test_the_models_differ(live: Live) -> None:
    answers = [expected(live, model, "Hello")[0] for model in ("base", "left", "right")]
    assert len(set(answers)) == 3


def test_lines_of_a_pipe_are_a_conversation(live: Live) -> None:
    lines = "Hello\n\nAnd then?\n/reset\n/system Be brief.\n/model left\nHello\n/quit\nnever\n"
    done = subprocess.run(
        [GOSSAMER, "chat", "--json", "--max-tokens", "8"],
        input=lines,
        capture_output=True,
        text=True,
        env=environment(**live.env),
    )
    assert done.returncode == 0, done.stderr
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert [d["model"] for d in documents] == ["base", "base", "left"]
    wanted = expected(live, "base", "Hello", "And then?")
    wanted += expected(live, "left", "Hello", system="Be brief.")
    assert [d["content"] for d in documents] == wanted
    assert wanted[2:] != expected(live, "left", "Hello"), "the system message counts"


def test_a_terminal_has_a_prompt_and_survives_mistakes(live: Live) -> None:
    command = [str(GOSSAMER), "chat", "--max-tokens", "8"]
    with Terminal(command, environment(**live.env)) as terminal:
        terminal.wait_for("base> ")
        terminal.type("/model nothing\n")
        terminal.wait_for("nothing> ")
        terminal.type("Hello\n")
        shown = terminal.wait_for("gossamer adapters ls")
        assert "Error: " in shown
        terminal.type("/nonsense\n")
        assert "no command" in terminal.wait_for("/quit")
        terminal.type("/model right\n")
        terminal.wait_for("right> ")
        terminal.type("Hello\n")
        shown = terminal.wait_for("tokens in")
        (wanted,) = expected(live, "right", "Hello")
        assert wanted.strip() in shown.replace("\r\n", "\n")
        terminal.type("\x04")
        assert terminal.finish() == 0


def test_an_unknown_model_is_three_lines(live: Live) -> None:
    assert_three_lines(run("chat", "--model", "no", "-m", "x", env=live.env), "404", "adapters ls")
    done = subprocess.run(
        [GOSSAMER, "chat", "--model", "no"],
        input="Hello\nHello\n",
        capture_output=True,
        text=True,
        env=environment(**live.env),
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3


def test_a_prompt_that_is_too_long(live: Live) -> None:
    result = run("chat", "-m", "word " * 3000, env=live.env)
    assert_three_lines(result, "400", "Shorten the prompt")


def test_files_are_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("chat", "-m", "x", "--url", "http://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_with_130(live: Live) -> None:
    # What a shell starts in the background ignores interrupts, and so would our child.
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [GOSSAMER, "chat"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**live.env),
    )
    signal.signal(signal.SIGINT, ours)
    with process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("/help\n")
        process.stdin.flush()
        assert process.stderr.readline().startswith("/model")  # it listens now
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
