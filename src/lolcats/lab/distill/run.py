"""``lolcats distill-data``: a file of prompts with the teacher's answers, and how it came about.

OUT                  one record for each answer, in the order of the prompts
OUT.meta.yaml        teacher, prompts and their licence, sampling, counts, versions
OUT.progress.jsonl   answers so far, in the order in which they came; gone once OUT is complete
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lolcats.config import DataConfig
from lolcats.data.conversations import Misfit, NoColumn
from lolcats.data.sources import Record, read_records
from lolcats.errors import LolcatsError
from lolcats.files import append_line, check_file, locked, read_json_lines, write_text
from lolcats.lab.distill.prompts import prompt_reader
from lolcats.lab.distill.teacher import Numbered, Sampling, Teacher
from lolcats.modeling.chat import ChatTemplate
from lolcats.version import __version__

ALL_SKIPPED = 20  # first prompts of which at least one must be answered
REASONS = 20  # named in the metadata
SECONDS = 15.0  # between two lines of progress
OWN = ("text", "reason")  # fields of an answer that its record has, or that say why there is none
EMPTY = "the teacher's answer is empty"


@dataclass(frozen=True)
class Task:
    """What is to be made.

    Args:
        prompts: a source of records, as ``--data`` takes them.
        out: a .jsonl file.
        teacher: its record in the metadata, which tells it from any other.
        template: makes conversations of prompts; None for texts that are continued.
        license: of the prompts, as a note.
        keep_cut: also write completions that ended at the limit of tokens, marked with ``cut: true``.
    """

    prompts: str
    out: Path
    teacher: dict[str, Any]
    sampling: Sampling
    template: ChatTemplate | None
    license: str = ""
    keep_cut: bool = False
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def meta(self) -> Path:
        return self.out.with_name(f"{self.out.name}.meta.yaml")

    @property
    def progress(self) -> Path:
        return self.out.with_name(f"{self.out.name}.progress.jsonl")


def check_out(out: Path) -> None:
    """
    Raises:
        LolcatsError: the file cannot be written there, or could not be read as data.
    """
    if out.suffix != ".jsonl":
        raise LolcatsError(f"--out {out}: expected a .jsonl file.")
    check_file(out, "--out")


def distill_data(task: Task, teacher: Callable[[], Teacher], say: Callable[[str], None]) -> dict[str, Any]:
    """Write the file, going on where a killed run stopped, and return its metadata. ``teacher``: loads it.

    Raises:
        LolcatsError: other data is in the way, a prompt or the teacher cannot be used, or nothing was answered.
    """
    with _only_writer(task.out):
        records, broken = read_records(task.prompts, task.data)
        identity = _identity(task, records)
        if task.out.exists() and not task.progress.exists():
            return _complete(task, identity)
        answered = _answered(task, identity)
        prompts, skipped = _prompts(task, records)
        if left := [one for one in prompts if one.number not in answered]:
            if answered:
                say(f"{len(answered):,} prompts are already answered: continuing.")
            skipped += _ask(task, identity, teacher(), left, len(answered), say)
        meta = _metadata(task, identity, records, broken, skipped)
        _write(task, meta)
        return meta


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    with locked(out.with_name(f"{out.name}.lock"), wait=False, remove=True) as ours:
        if not ours:
            raise LolcatsError(f"{out} is being written by another lolcats process. Wait, or choose another --out.")
        yield


def _identity(task: Task, records: list[Record]) -> str:
    """A hash of all that decides what is in the file."""
    parts = {
        "teacher": {name: value for name, value in task.teacher.items() if name not in ("path", "server")},
        "prompts": _hash(records), "sampling": asdict(task.sampling), "chat": task.template is not None,
        "keep_cut": task.keep_cut,
    }  # fmt: skip
    return _hash(parts)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _complete(task: Task, identity: str) -> dict[str, Any]:
    """The metadata of a file that an earlier run has completed."""
    try:
        meta: dict[str, Any] = yaml.safe_load(task.meta.read_text())
        same = meta["run"] == identity
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        same = False
    if not same:
        raise LolcatsError(f"{task.out} exists and holds something else. Remove it, or choose another --out.")
    return meta


def _answered(task: Task, identity: str) -> set[int]:
    """Numbers of the prompts that a killed run has answered."""
    entries = read_json_lines(task.progress)
    if len(entries) < 2:
        task.progress.unlink(missing_ok=True)
        return set()
    if entries[0].get("run") != identity:
        raise LolcatsError(
            f"{task.progress} belongs to a run with another teacher, other prompts or other options. Repeat its "
            "options to continue it, remove the file to start over, or choose another --out."
        )
    return {entry["number"] for entry in entries[1:]}


def _prompts(task: Task, records: list[Record]) -> tuple[list[Numbered], Counter[str]]:
    """The prompts that can be used, and why others cannot."""
    read, prompts, skipped = prompt_reader(task.template), [], Counter[str]()
    for number, record in enumerate(records):
        try:
            prompts.append(Numbered(number, read(record)))
        except NoColumn as error:
            raise LolcatsError(f"Record {number + 1} of {task.prompts} has no prompt: {error}.") from None
        except Misfit as error:
            skipped[str(error)] += 1
    return prompts, skipped


def _ask(
    task: Task, identity: str, teacher: Teacher, prompts: list[Numbered], before: int, say: Callable[[str], None]
) -> Counter[str]:  # fmt: skip
    """Answer the prompts, writing each answer down as it comes; returns why others have none."""
    by_number, skipped = dict(prompts), Counter[str]()
    began = said = time.monotonic()
    done = tokens = 0
    for number, answer in teacher.answers(prompts):
        reason = answer.reason or ("" if answer.text.strip() else EMPTY)
        if reason:
            skipped[reason] += 1
            if skipped.total() == ALL_SKIPPED and not before + done:
                raise LolcatsError(f"The first {ALL_SKIPPED} prompts could not be answered: {reason}.")
            continue
        entry = {"number": number, "record": by_number[number].record(answer.text), **asdict(answer)}
        if not before + done:
            append_line(task.progress, json.dumps({"run": identity}))
        append_line(task.progress, json.dumps({key: value for key, value in entry.items() if key not in OWN}))
        done, tokens = done + 1, tokens + answer.tokens
        if time.monotonic() - said > SECONDS:
            said = time.monotonic()
            say(f"{before + done:,} of {before + len(prompts):,} prompts, {tokens / (said - began):,.0f} tokens/s")
    return skipped


def _metadata(
    task: Task, identity: str, records: list[Record], broken: int, skipped: Counter[str]
) -> dict[str, Any]:  # fmt: skip
    entries = read_json_lines(task.progress)[1:]
    if not entries:
        most = "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common(3))
        raise LolcatsError(f"No prompt of {task.prompts} was answered: {most}.")
    cut = sum(entry["cut"] for entry in entries)
    reasons = dict(skipped.most_common(REASONS))
    if others := skipped.total() - sum(reasons.values()):
        reasons["other reasons"] = others
    written = [entry for entry in entries if task.keep_cut or not entry["cut"]]
    return {
        "teacher": task.teacher,
        "prompts": {"source": task.prompts, "license": task.license or "unknown", "records_sha256": _hash(records)},
        "sampling": asdict(task.sampling),
        "form": "chat" if task.template else "text",
        "counts": {
            "prompts": len(records), "finished": len(entries) - cut, "cut": cut, "skipped": skipped.total(),
            "broken": broken, "written": len(written),
            "prompt_tokens": sum(entry["prompt_tokens"] for entry in written),
            "completion_tokens": sum(entry["tokens"] for entry in written),
        },
        "cut_completions": "kept" if task.keep_cut else "dropped",
        "skipped": reasons,
        "lolcats": __version__,
        "run": identity,
    }  # fmt: skip


def _write(task: Task, meta: dict[str, Any]) -> None:
    entries = sorted(read_json_lines(task.progress)[1:], key=lambda entry: entry["number"])
    lines = [
        json.dumps(entry["record"] | ({"cut": True} if entry["cut"] else {}), ensure_ascii=False) + "\n"
        for entry in entries
        if task.keep_cut or not entry["cut"]
    ]
    write_text(task.meta, yaml.safe_dump(meta, sort_keys=False, allow_unicode=True, width=120))
    write_text(task.out, "".join(lines))
    task.progress.unlink()
