"""``python -m lolcats.cli``."""

from lolcats.cli import main

if __name__ == "__main__":
    main()
