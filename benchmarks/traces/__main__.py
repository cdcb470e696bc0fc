"""`python -m benchmarks.traces`: write every trace; `--check`: compare them with the generator."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.traces.trace import render
from benchmarks.traces.workloads import TRACES

FOLDER = Path(__file__).parent


def main() -> int:
    """0, or 1 when a file differs from what the generator makes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traces", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 on a difference")
    check = parser.parse_args().check
    status = 0
    for name, make in TRACES.items():
        path, trace = FOLDER / f"{name}.jsonl", make()
        text = render(trace.head, trace.events)
        if not check:
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            print(f"{path.name} is not what the generator makes")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
