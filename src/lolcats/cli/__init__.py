"""The command line: parse arguments, print results, and report a user's mistake in one sentence with exit code 2."""

from lolcats.cli import distill, heads, train, use
from lolcats.cli.app import app

__all__ = ["app", "distill", "heads", "main", "train", "use"]


def main() -> None:
    app()
