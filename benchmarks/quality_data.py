"""The data of the sweeps behind ``benchmarks/quality/``: training files, and held-out ones that no row is trained on.

    python benchmarks/quality_data.py --alpaca FILE --textbooks FILE --books FILE --out DIR

FILEs: any data that lolcats reads; Alpaca's records, and documents with a text column. Writes JSON Lines, whose bytes
depend on nothing but these records (sweeps tell data by them), and two mixtures:

alpaca.jsonl, textbooks.jsonl, books.jsonl       less what is held out: every HELD_OUT-th record
alpaca_heldout.jsonl, textbooks_heldout.jsonl, books_heldout.jsonl
prose.yaml   textbooks and books, as many tokens of each
both.yaml    Alpaca, and as many tokens of prose
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lolcats.config import DataConfig
from lolcats.data.sources import Record, read_records
from lolcats.data.templates import NO_OUTPUT
from lolcats.files import write_text

HELD_OUT = {"alpaca": 50, "textbooks": 20, "books": 10}
LONGEST = 80_000  # characters of a held-out document, so that 64 rows of 1,024 tokens are of all four books
MIXTURES = {
    "prose": {"textbooks": 1, "books": 1},
    "both": {"alpaca": 2, "textbooks": 1, "books": 1},
}


def split(records: list[Record], every: int) -> tuple[list[Record], list[Record]]:
    """What to train on, and every ``every``-th record, cut to LONGEST; none of those that say nothing."""
    told = [r for r in records if r.get("output", r.get("text", "")).strip().lower() not in NO_OUTPUT]
    cut = [{**r, "text": r["text"][:LONGEST]} if "text" in r else r for r in told[every - 1 :: every]]
    return [r for i, r in enumerate(told, 1) if i % every], cut


def write(out: Path, sources: dict[str, str]) -> None:
    """All files, from a path for each name of HELD_OUT."""
    out.mkdir(parents=True, exist_ok=True)
    for name, every in HELD_OUT.items():
        records, _ = read_records(sources[name], DataConfig())
        for path, part in zip((f"{name}.jsonl", f"{name}_heldout.jsonl"), split(records, every), strict=True):
            write_text(out / path, "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in part))
            print(f"{path}: {len(part):,} records")
    for name, shares in MIXTURES.items():
        lines = [f"- {{path: {source}.jsonl, weight: {weight}}}\n" for source, weight in shares.items()]
        write_text(out / f"{name}.yaml", "sources:\n" + "".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in HELD_OUT:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write(arguments.out, {name: getattr(arguments, name) for name in HELD_OUT})


if __name__ == "__main__":
    main()
