"""The data of students.py, small enough to be carried to another machine: training files, prompts, evaluation files.

    python benchmarks/students_data.py MODEL --alpaca FILE --textbooks FILE --books FILE --dolly FILE --gsm8k FILE
        --eval DIR --out DATA [--tokens 3600000] [--windows 3] [--prompts alpaca=2000,gsm8k=2000,code=1500,chat=1500]
    lolcats distill-data MODEL --prompts DATA/prompts.jsonl --out DATA/own.jsonl     # the row that needs it

MODEL: whose tokenizer counts. FILEs: any data that lolcats reads: Alpaca's and Dolly's records, documents with a text
column, GSM8K's train part. DIR: Parquet files as ``lolcats evaluate --data-dir`` takes them.

alpaca.parquet, textbooks.parquet, books.parquet   drawn from all records; long documents are cut
both.yaml   Alpaca, and as many tokens of textbooks and books together
own.yaml    a third each: Alpaca, textbooks and books, and own.jsonl, the teacher's own answers
prompts.jsonl   none of which is in alpaca.parquet, nor among the five examples of the evaluation's GSM8K
eval/       the files of DIR, with as much of each long book as --windows windows of 8,192 tokens take
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lolcats.config import DataConfig
from lolcats.data.rows import tokenize_source
from lolcats.data.sources import Record, read_records
from lolcats.data.templates import NO_OUTPUT, alpaca_prompt, instruction_of
from lolcats.evaluation.tasks import SHOTS, find_file
from lolcats.evaluation.text import encode
from lolcats.files import write_text
from lolcats.weights.base import find_base, load_tokenizer

LONGEST = 100_000  # characters of a document, so that rows are of many books
WINDOW, MORE = 8192, 64  # tokens of a window, and more of each book, since the last word is left out
SAMPLE = 200  # records from which characters per token are counted
SPARE = 1.03  # more characters than that count asks for
PROMPT = 4000  # characters of the longest prompt
SHARES = {"alpaca": 1.0, "textbooks": 0.5, "books": 0.5}  # of --tokens in each training file
MIXTURES = {
    "both": {"alpaca.parquet": 2, "textbooks.parquet": 1, "books.parquet": 1},
    "own": {"alpaca.parquet": 2, "textbooks.parquet": 1, "books.parquet": 1, "own.jsonl": 2},
}
COUNTS = {"alpaca": 2000, "gsm8k": 2000, "code": 1500, "chat": 1500}
CODE = re.compile(
    r"\b(python|javascript|java|sql|html|css|regex|regular expression|code|pseudocode|program|algorithm|function that|"
    r"class that|script|json|xml|api|bash|linux)\b|C\+\+|C#", re.IGNORECASE,
)  # fmt: skip
TEACHING = ("alpaca", "textbooks", "books")


def records_of(source: Path) -> list[Record]:
    return read_records(str(source), DataConfig())[0]


def text_of(record: Record) -> str:
    return record["text"] if "text" in record else alpaca_prompt(*instruction_of(record)) + record["output"]


def usable(records: Iterable[Record]) -> list[Record]:
    """Records that say something, long documents cut."""
    told = [r for r in records if str(r.get("output", r.get("text", ""))).strip().lower() not in NO_OUTPUT]
    return [{**r, "text": r["text"][:LONGEST]} if "text" in r else r for r in told]


def per_token(texts: Sequence[str], tokenizer: Any) -> float:
    """Characters per token."""
    return sum(map(len, texts)) / sum(len(encode(tokenizer, text)) for text in texts)


def drawn(records: list[Record], tokens: float, tokenizer: Any, seed: str) -> tuple[list[Record], list[Record]]:
    """Records of about ``tokens`` tokens in random order, and the others."""
    mixed = random.Random(seed).sample(records, len(records))
    left, count = SPARE * tokens * per_token([text_of(r) for r in mixed[:SAMPLE]], tokenizer), 0
    while count < len(mixed) and left > 0:
        left -= len(text_of(mixed[count]))
        count += 1
    return mixed[:count], mixed[count:]


def write_parquet(records: list[Record], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, compression="zstd", compression_level=15)


def training_files(sources: dict[str, Path], tokens: int, tokenizer: Any, out: Path) -> list[Record]:
    """Write them and the mixtures; returns Alpaca's records that are not in them."""
    rest: list[Record] = []
    for name in TEACHING:
        chosen, others = drawn(usable(records_of(sources[name])), SHARES[name] * tokens, tokenizer, name)
        if name == "alpaca":
            asked = {instruction_of(r) for r in chosen}
            rest = [r for r in others if instruction_of(r) not in asked]
        columns = ("instruction", "input", "output", "text")
        path = out / f"{name}.parquet"
        write_parquet([{key: r[key] for key in columns if key in r} for r in chosen], path)
        found = tokenize_source(str(path), tokenizer, DataConfig())
        print(f"{path.name}: {len(chosen):,} records, {int(found.length.sum()):,} tokens", flush=True)
    for name, weights in MIXTURES.items():
        lines = [f"- {{path: {source}, weight: {weight}}}\n" for source, weight in weights.items()]
        write_text(out / f"{name}.yaml", "sources:\n" + "".join(lines))
    return rest


def pools(alpaca: list[Record], dolly: list[Record], gsm8k: list[Record]) -> dict[str, list[Record]]:
    """What prompts are drawn from, by kind. ``alpaca``: the records that are not trained on."""

    def asked(records: list[Record], code: bool) -> list[Record]:
        found = [{"instruction": r["instruction"], "input": instruction_of(r)[1]} for r in records]
        fitting = [r for r in found if len(r["instruction"] + r["input"]) <= PROMPT]
        return [r for r in fitting if bool(CODE.search(r["instruction"])) is code]

    return {
        "alpaca": asked(alpaca, False), "chat": asked(dolly, False), "code": asked([*alpaca, *dolly], True),
        "gsm8k": [{"instruction": r["question"], "input": ""} for r in gsm8k[SHOTS:]],
    }  # fmt: skip


def prompts(found: dict[str, list[Record]], counts: dict[str, int]) -> list[Record]:
    """So many of each kind, mixed, each text once."""
    chosen: dict[tuple[str, str], Record] = {}
    for kind, count in counts.items():
        some = random.Random(kind).sample(found[kind], min(count, len(found[kind])))
        print(f"{kind}: {len(some):,} of {len(found[kind]):,} prompts", flush=True)
        chosen |= {(r["instruction"], r["input"]): r for r in some}
    return random.Random("prompts").sample(list(chosen.values()), len(chosen))


def evaluation_files(source: Path, windows: int, tokenizer: Any, out: Path) -> None:
    """Copy the Parquet files; of each long book only what ``windows`` windows take, and the examples of gsm8k_train."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.parquet")):
        shutil.copyfile(path, out / path.name)
    books = [r["text"] for r in records_of(find_file(source, "long_books"))]
    cut = [tokenizer.decode(encode(tokenizer, text)[: windows * WINDOW + MORE]) for text in books]
    write_parquet([{"text": text[: text.rindex(" ")]} for text in cut], out / "long_books.parquet")


def counts_of(text: str) -> dict[str, int]:
    given = dict(part.split("=") for part in text.split(","))
    if unknown := given.keys() - COUNTS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected {', '.join(COUNTS)}")
    return {kind: int(count) for kind, count in given.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in (*TEACHING, "dolly", "gsm8k", "eval", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=3_600_000, help="of each mixture (default: 3,600,000)")
    parser.add_argument("--windows", type=int, default=3, help="of each long book (default: 3)")
    parser.add_argument("--prompts", type=counts_of, default=COUNTS, help="number of prompts of each kind")
    a = parser.parse_args(argv)
    tokenizer, gsm8k = load_tokenizer(find_base(a.model)), records_of(a.gsm8k)
    rest = training_files({name: getattr(a, name) for name in TEACHING}, a.tokens, tokenizer, a.out)
    chosen = prompts(pools(rest, usable(records_of(a.dolly)), gsm8k), a.prompts)
    write_text(a.out / "prompts.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen))
    evaluation_files(a.eval, a.windows, tokenizer, a.out / "eval")
    write_parquet(gsm8k[:SHOTS], a.out / "eval" / "gsm8k_train.parquet")


if __name__ == "__main__":
    main()
