"""`python -m gossamer.cli`: the command line of this very interpreter, wherever its script lies."""

from __future__ import annotations

from gossamer.cli import main

if __name__ == "__main__":
    main()
