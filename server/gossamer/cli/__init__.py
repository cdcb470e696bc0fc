"""The command line: `gossamer up | chat | adapters`, `train | jobs | methods | worker`, and
`keys | bench | doctor`.

No module of this room imports torch, a server or a database at its top; a command brings in what it
needs when it runs. So `gossamer --help` is there in a quarter of a second.
"""

from __future__ import annotations


def main() -> None:
    """Run the command that the process's arguments name, and exit with its code."""
    from gossamer.cli.app import app

    app(prog_name="gossamer")
