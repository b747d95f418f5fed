"""`tesapi` and `python -m tesapi`."""

from __future__ import annotations

from tesapi.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
