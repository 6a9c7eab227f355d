"""``python -m autofuse``: the command line."""

from __future__ import annotations

from autofuse.cli.app import main

if __name__ == "__main__":
    main()
