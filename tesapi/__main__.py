"""`tesapi` and `python -m tesapi`."""

from __future__ import annotations

from tesapi.cli.commands import cli


def main() -> None:
    """Run the command line."""
    cli(prog_name="tesapi")


if __name__ == "__main__":
    main()
