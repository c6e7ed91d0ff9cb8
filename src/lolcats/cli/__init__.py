"""The command line: translates arguments, prints results, turns a user's mistake into a sentence and exit code 2."""

from lolcats.cli import train, use
from lolcats.cli.app import app

__all__ = ["app", "main", "train", "use"]


def main() -> None:
    app()
