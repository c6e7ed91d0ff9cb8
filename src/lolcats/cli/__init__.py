"""The command line: parse arguments, print results, and report a user's mistake in one sentence with exit code 2."""

from lolcats.cli import heads, train, use
from lolcats.cli.app import app

__all__ = ["app", "heads", "main", "train", "use"]


def main() -> None:
    app()
