"""Tiny Parquet files with the columns that ``--data-dir`` expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from conftest import WORDS

SUBJECTS = ("anatomy", "virology")
WARM = "the cat saw warm milk"
FILES: dict[str, list[dict[str, Any]]] = {
    "piqa_valid": [
        {"goal": f"warm {word}", "sol1": "the mat", "sol2": f"like {word}", "label": i % 2}
        for i, word in enumerate(WORDS[:6])
    ],
    "arc_easy_test": [
        {"id": str(i), "question": f"What do {word} like?", "answerKey": "B" if i % 2 else "A",
         "choices": {"text": ["milk", "a mat", "hills"], "label": ["A", "B", "C"]}}
        for i, word in enumerate(WORDS[:6])
    ],
    "arc_challenge_test": [
        {"id": "7", "question": "Who?", "answerKey": "2", "choices": {"text": ["milk", "cats"], "label": ["1", "2"]}}
    ] * 4,
    "hellaswag_val": [
        {"query": "Cats: A cat sat. She", "endings": ["saw a mat.", "sang.", "like.", "far."], "label": i % 4}
        for i in range(5)
    ],
    "winogrande_xl_dev": [
        {"sentence": "The cat saw dogs while _ sat.", "option1": "the cat", "option2": "dogs", "answer": str(1 + i % 2)}
        for i in range(4)
    ],
    "lambada_openai_test": [{"context": "the cat saw warm", "continuation": "milk"}] * 3,
    "wikitext2_raw_test": [
        {"text": t} for t in ("", " = Cats = \n", f" {WARM} . \n", " = = Milk = = \n", " = Dogs = \n", " far . \n")
    ],
    "gsm8k_train": [
        {"question": f"The cat saw {i} dogs and {i} birds. How many?", "answer": f"{i} + {i}\n#### {2 * i}"}
        for i in range(9)
    ],
    "mmlu_dev": [
        {"subject": s, "question": f"{s} {i}?", **{f"choice{c}": f"{WORDS[i]} {c}" for c in range(4)}, "answer": i % 4}
        for s in SUBJECTS for i in range(5)
    ],
    "mmlu_test_half": [
        {"subject": s, "question": f" What is {w}?", **{f"choice{c}": WORDS[c + i] for c in range(4)}, "answer": i % 4}
        for s in SUBJECTS for i, w in enumerate(WORDS[:3])
    ],
    "long_books": [{"title": "Cats", "text": f"{WARM} while birds sing . " * 300}],
}  # fmt: skip


def write_files(root: Path) -> Path:
    """Write some files to the folder itself, some to a subfolder."""
    for number, (name, rows) in enumerate(FILES.items()):
        folder = root / ("eval" if number % 2 else "")
        folder.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")
    return root
