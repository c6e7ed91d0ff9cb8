"""The lm-eval tasks of each suite, and how local Parquet files replace the hub's data.

A local task is lm-eval's own definition (prompt, choices, metrics, few-shot format) with another source of documents:
the columns of a file are renamed to those of the hub's data set. Only ``gsm8k`` has other few-shot examples: always the
first five rows instead of five random ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lolcats.config import DataConfig
from lolcats.data.sources import Record, read_records
from lolcats.errors import LolcatsError
from lolcats.evaluation.harness import Spec, task_manager

PAPER = {"piqa": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "hellaswag": "acc_norm", "winogrande": "acc"}
"""The paper's zero-shot tasks, with the metric that it reports for each."""
SHOTS = 5
OPTIONS = 4
MMLU_TAGS = [f"mmlu_{field}_tasks" for field in ("stem", "other", "social_sciences", "humanities")]
MMLU_METRIC = [{"metric": "acc", "weight_by_size": True}]
GSM8K_METRIC = [{"metric": "exact_match", "filter_list": ["strict-match", "flexible-extract"]}]

Records = list[Record]


def paper_specs(data_dir: Path | None) -> list[Spec]:
    """The paper's five zero-shot tasks and 5-shot MMLU (``mmlu_half`` from local files)."""
    return [*(named_spec(name, data_dir) for name in PAPER), mmlu_spec(data_dir)]


def named_spec(name: str, data_dir: Path | None) -> Spec:
    """The lm-eval task ``name``; for tasks in LOCAL, mmlu_half and gsm8k, with documents from ``data_dir`` if given."""
    if data_dir is not None and name == "mmlu_half":
        return mmlu_spec(data_dir)
    if data_dir is not None and name == "gsm8k":
        return gsm8k_spec(data_dir)
    if data_dir is None or name not in LOCAL:
        return name
    local = LOCAL[name]
    source = partial(local_dataset, path=find_file(data_dir, local.file), split=local.split, convert=local.convert)
    splits = {"training_split": None, "validation_split": None, "test_split": None, f"{local.split}_split": local.split}
    changes = {"custom_dataset": source, **splits, **local.changes}
    return {"group": f"local_{name}", "task": [{"task": name, **changes}]}


MMLU_FILES, GSM8K_FILES = ("mmlu_test_half", "mmlu_dev"), ("gsm8k_train", "gsm8k_test")


def mmlu_spec(data_dir: Path | None, name: str = "mmlu", **changes: Any) -> Spec:
    """5-shot MMLU as one group. From local files: ``NAME_half``, with the subjects in those files."""
    changes = {"num_fewshot": SHOTS, **changes}
    group = {"group": name, "aggregate_metric_list": MMLU_METRIC}
    if data_dir is None:
        index = task_manager().task_index
        names = sorted(task for tag in MMLU_TAGS for task in index[tag].tags)
        return {**group, "task": [{"task": task, **changes} for task in names]}
    test, dev = (find_file(data_dir, file) for file in MMLU_FILES)
    subjects = sorted({record["subject"] for record in _read(test)})
    source = partial(mmlu_dataset, test=test, dev=dev)
    tasks = [
        {"task": f"mmlu_{subject}", "custom_dataset": partial(source, subject=subject), **changes}
        for subject in subjects
    ]
    return {**group, "group": f"{name}_half", "task": tasks}


def permuted_mmlu_spec(data_dir: Path | None) -> Spec:
    """MMLU with every question asked OPTIONS times, rotating its options by one each time; few-shot rows unchanged."""
    fewshot = {"sampler": "first_n", "process_docs": list}
    return mmlu_spec(data_dir, "mmlu_permuted", process_docs=rotate_options, fewshot_config=fewshot)


def gsm8k_spec(data_dir: Path | None) -> Spec:
    """lm-eval's 5-shot GSM8K. Without a local gsm8k_test file, the questions and the name are those of gsm8k_train."""
    if data_dir is None:
        return "gsm8k"
    train, test = find_file(data_dir, GSM8K_FILES[0]), _find(data_dir, GSM8K_FILES[1])
    changes = {
        "custom_dataset": partial(gsm8k_dataset, train=train, test=test),
        "fewshot_config": {"sampler": "first_n"},
    }
    return {
        "group": "gsm8k_local" if test else "gsm8k_train",
        "aggregate_metric_list": GSM8K_METRIC,
        "task": [{"task": "gsm8k", **changes}],
    }


def find_file(data_dir: Path, name: str) -> Path:
    """NAME.parquet in ``data_dir`` or in a folder directly under it."""
    if path := _find(data_dir, name):
        return path
    raise LolcatsError(f"{data_dir} holds no {name}.parquet.")


def _find(data_dir: Path, name: str) -> Path | None:
    return next(iter([*data_dir.glob(f"{name}.parquet"), *sorted(data_dir.glob(f"*/{name}.parquet"))]), None)


def local_dataset(path: Path, split: str, convert: Callable[[Records], Records], **_: Any) -> dict[str, Any]:
    """The documents by split, as lm-eval expects from a ``custom_dataset``."""
    return {split: _dataset(convert(_read(path)))}


def mmlu_dataset(test: Path, dev: Path, subject: str, **_: Any) -> dict[str, Any]:
    """Questions and few-shot rows of one subject, in the order of the files."""
    splits = {"test": test, "dev": dev}
    return {
        split: _dataset([_mmlu_document(r) for r in _read(path) if r["subject"] == subject])
        for split, path in splits.items()
    }


def gsm8k_dataset(train: Path, test: Path | None, **_: Any) -> dict[str, Any]:
    """The first rows of ``train`` as examples; questions from ``test``, or from the rest of ``train``."""
    rows = _read(train)
    return {"train": _dataset(rows[:SHOTS]), "test": _dataset(_read(test) if test else rows[SHOTS:])}


def rotate_options(documents: Any) -> Any:
    """Each MMLU document OPTIONS times in a row, with rotation 0, 1, ... of its options."""
    rotated = []
    for document in documents:
        for by in range(OPTIONS):
            choices = document["choices"][by:] + document["choices"][:by]
            rotated.append({**document, "choices": choices, "answer": (document["answer"] - by) % OPTIONS})
    return _dataset(rotated)


def _mmlu_document(record: Record) -> Record:
    choices = [record[f"choice{i}"] for i in range(OPTIONS)]
    return {"question": record["question"], "subject": record["subject"], "choices": choices,
            "answer": record["answer"]}  # fmt: skip


def _same(records: Records) -> Records:
    return records


def _hellaswag(records: Records) -> Records:
    """The output of lm-eval's own preprocessing, which the texts in the file have already been through."""
    return [{"query": r["query"], "choices": r["endings"], "label": str(r["label"])} for r in records]


def _lambada(records: Records) -> Records:
    return [{"text": f"{r['context']} {r['continuation']}"} for r in records]


def _pages(records: Records) -> Records:
    """Join WikiText's lines to pages; a page starts at a top-level heading."""
    pages: list[str] = []
    for line in (r["text"] for r in records):
        if re.fullmatch(r" = [^=].*[^=] = \n", line) or not pages:
            pages.append("")
        pages[-1] += line
    return [{"page": page} for page in pages if page.strip()]


@dataclass(frozen=True)
class Local:
    """A task's local documents: file, lm-eval's split, conversion of the columns, further changes of the task."""

    file: str
    split: str
    convert: Callable[[Records], Records] = _same
    changes: dict[str, Any] = field(default_factory=dict)


LOCAL = {
    "piqa": Local("piqa_valid", "validation"),
    "arc_easy": Local("arc_easy_test", "test"),
    "arc_challenge": Local("arc_challenge_test", "test"),
    "hellaswag": Local("hellaswag_val", "validation", _hellaswag, {"process_docs": None}),
    "winogrande": Local("winogrande_xl_dev", "validation"),
    "lambada_openai": Local("lambada_openai_test", "test", _lambada),
    "wikitext": Local("wikitext2_raw_test", "test", _pages),
}
FILES = {**{name: (local.file,) for name, local in LOCAL.items()}, "mmlu_half": MMLU_FILES, "gsm8k": GSM8K_FILES}
"""The local files of each task; without gsm8k_test, the questions are those of gsm8k_train."""


def files_of(names: Iterable[str], data_dir: Path) -> list[Path]:
    """The files in ``data_dir`` that these tasks read; other tasks read the hub's data."""
    found = (_find(data_dir, file) for name in names for file in FILES.get(name, ()))
    return [path for path in found if path is not None]


def _read(path: Path) -> Records:
    return read_records(str(path), DataConfig())[0]


def _dataset(records: Records) -> Any:
    from datasets import Dataset

    return Dataset.from_list(records)
