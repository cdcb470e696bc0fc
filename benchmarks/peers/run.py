"""Run a job in another system's process and wait for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from benchmarks.common import ROOT
from benchmarks.peers.job import Job, Outcome
from benchmarks.peers.setup import Peer

#: Starting vLLM takes half a minute on two cores, the job ten seconds; anything near this hangs.
_PATIENCE = 1200.0


class PeerError(Exception):
    """Another system did not finish its job.

    Attributes:
        peer: its label.
        output: the end of what it printed.
    """

    def __init__(self, peer: str, output: str) -> None:
        super().__init__(f"{peer} did not finish its job:\n{output}")
        self.peer = peer
        self.output = output


def run_peer(peer: Peer, job: Job) -> Outcome:
    """One fresh process, one timed run.

    Raises:
        PeerError: it failed or took longer than twenty minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target, log = (Path(folder) / name for name in ("job", "outcome", "log"))
        source.write_text(json.dumps(asdict(job)))
        command = [str(peer.python), "-m", peer.runner, str(source), str(target)]
        with log.open("w") as output:
            status = _finish(command, output)
        if status != 0:
            raise PeerError(peer.label, log.read_text()[-4000:])
        return Outcome(**json.loads(target.read_text()))


def _finish(command: list[str], output: IO[str]) -> int | None:
    """The exit status of a command, None when it had to be stopped; none of its workers is left."""
    # Every system chooses its threads itself; a number left over in our environment would bind it.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
