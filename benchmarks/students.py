"""Students of one teacher, trained alike but for one setting each (students.yaml), and what each can still do.

    python benchmarks/students_data.py MODEL ... --out DATA
    lolcats select MODEL --heads 14 --out selection.yaml
    python benchmarks/students.py MODEL DATA --selection selection.yaml --out OUT [--only REGEX] [--jobs 3]
        [--minutes 9] [--lengths 1024,4096,8192] [--answers 50] [--gsm8k 160] [--benchmarks] [--set KEY=VALUE ...]
    python benchmarks/students.py --table OUT/results.jsonl

A sweep whose rows name a number of kept heads (``kept=7``); ``--jobs`` processes on one GPU share its rows. Measured of
every row, of the teacher, and of windows with sinks: recall, GSM8K with five examples (strict, and by the last number),
loss and KL divergence from the teacher on long books by position; with --benchmarks also the zero-shot tasks and MMLU.
OUT/results.jsonl has a line for each row as soon as it is there; the same command goes on from it, also elsewhere. A
row that would not end within --minutes is not begun. OUT/students.md is the table. A GGUF file is converted once, into
OUT/model (--minutes 0 does only this). Rows on the teacher's own answers need DATA/own.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import yaml
from quality_runs import STATUS, say, shared_gpus, to_directory

from lolcats.compared import STUDENT, TEACHER, WINDOW_SINKS
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation.recall import BEYOND
from lolcats.files import write_text
from lolcats.lab.sweep.execute import RESULTS, run_sweeps
from lolcats.lab.sweep.plan import DATA, SECTIONS, read_sweep
from lolcats.lab.sweep.table import ROW, UNTRAINED
from lolcats.selection import Selection
from lolcats.weights.base import find_base

ROWS = Path(__file__).with_suffix(".yaml")
KEPT = "kept="
WINDOW = "attention.window_size="
KINDS = {"passkey": "pass key", "needle": "needle", "multi-query": "multi-query"}
SOURCES = {"alpaca": "alpaca.parquet", "both": "both.yaml", "own": "own.yaml"}
OWN = "own.jsonl"
CONTROL = "7 heads, no linear term"
BENCHMARKS = {"piqa": 99_999, "arc_easy": 99_999, "arc_challenge": 99_999, "hellaswag": 2_000, "winogrande": 99_999,
              "mmlu_half": 2_052}  # fmt: skip
TINY = {
    "lengths": (512,), "answers": 5, "gsm8k": 2, "batch": 8,
    "set": ["data.sequence_length=512", "data.validation_rows=2", "data.test_rows=2",
            *(f"{stage}.{key}" for stage in ("transfer", "finetune") for key in ("max_steps=20", "eval_steps=10"))],
}  # fmt: skip
"""What --tiny does where nothing else is said."""
FULL = {"lengths": (1024, 4096, 8192), "answers": 50, "gsm8k": 160, "batch": 64, "set": []}


def settings_of(row: Sequence[str], selections: Sequence[Selection], base: Sequence[str] = ()) -> list[str]:
    """A row's settings, with the heads for their number: those chosen with windows of its own size, where there are
    such, or else the first selection's. base: settings of rows without their own."""
    found = [setting for setting in row if not setting.startswith(KEPT)]
    count = next((int(s.removeprefix(KEPT)) for s in row if s.startswith(KEPT)), 0)
    if count == 0:
        return found
    window = AttentionConfig().window_size
    for setting in (*base, *row):
        if setting.startswith(WINDOW):
            window = int(setting.removeprefix(WINDOW))
    own = [selection for selection in selections if selection.window["window_size"] == window]
    sets = {point.count: point.heads for selection in [*own, *selections][:1] for point in selection.curve}
    if count not in sets:
        known = ", ".join(map(str, sets)) or "none: give --selection"
        raise LolcatsError(f"No set of {count} heads is known. Sets in the selection: {known}.")
    heads = ", ".join(f'"{layer}": {numbers}' for layer, numbers in sets[count].items())
    return [*found, f"attention.softmax_heads={{{heads}}}"]


def of_sweep(setting: str) -> bool:
    """Whether a setting is of the sweep, not of its rows."""
    return setting.split(".")[0].split("=")[0] in SECTIONS


def sweep_of(a: argparse.Namespace, selections: Sequence[Selection]) -> dict[str, Any]:
    """The sweep as its file has it: rows that are asked for and have data, and what to measure."""
    tree: dict[str, Any] = yaml.safe_load(a.rows.read_text())
    rows = {name: row for name, row in tree["rows"].items() if re.search(a.only, name)}
    if not (a.data / OWN).is_file():
        for name in [name for name, row in rows.items() if f"{DATA}own" in row]:
            print(f"Left out, since {a.data / OWN} is missing: {name}", flush=True)
            del rows[name]
    if not rows:
        raise LolcatsError(f"--only {a.only}: no such row. Rows: {'; '.join(tree['rows'])}.")
    tree["base"]["sources"] = {name: str(a.data / file) for name, file in SOURCES.items()}
    tree["base"]["set"] += [setting for setting in a.set if not of_sweep(setting)]
    tree["rows"] = {name: settings_of(row, selections, tree["base"]["set"]) for name, row in rows.items()}
    tree["evaluate"] = {
        "tasks": [*(f"recall-{kind}" for kind in KINDS), "positions", *(["generate"] if a.gsm8k else []),
                  *(["paper"] if a.benchmarks else [])],
        "lengths": list(a.lengths), "limit": a.answers, "kl": True, "batch_size": a.batch,
        "limits": {"gsm8k": a.gsm8k, **(BENCHMARKS if a.benchmarks else {})},
        "data_dir": str(a.data / "eval"), "text": str(a.data / "eval" / "long_books.parquet"),
    }  # fmt: skip
    return tree


def checked_selections(a: argparse.Namespace, model: Path) -> list[Selection]:
    """The selections, which may have been made on the GGUF file or on the directory."""
    own = find_base(str(a.model))
    selections = [Selection.read(path) for path in a.selection]
    for selection, path in zip(selections, a.selection, strict=True):
        if selection.base["fingerprint"] != own.fingerprint:
            selection.check(find_base(str(model)), path)
    return selections


def own_command(a: argparse.Namespace) -> str:
    """This script's, without the places of files."""
    return shlex.join(["students.py", *(Path(word).name for word in a.words)])


def in_this_process(a: argparse.Namespace, file: Path, model: Path, end: float) -> bool:
    """Train and measure what is missing; whether nothing failed."""
    sweep = read_sweep(file, [f"base.model={model}", *filter(of_sweep, a.set)])
    try:
        run_sweeps([sweep], a.out, own_command(a), lambda line: print(line, flush=True), max(0.0, end - time.time()))
    except LolcatsError as error:
        print(error, flush=True)
        return False
    return True


def in_processes(a: argparse.Namespace, file: Path, model: Path, end: float, places: dict[str, str]) -> bool:
    """The same, the rows shared by processes that each have a log; they end with this one."""
    threads = max(1, (os.cpu_count() or 1) // a.jobs)
    fixed = {"OMP_NUM_THREADS": str(threads), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    words = [word for setting in filter(of_sweep, a.set) for word in ("--set", setting)]
    begun: dict[Path, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for number in range(a.jobs):
            log = a.out / f"job-{number}.log"
            command = [sys.executable, "-m", "lolcats.cli", "sweep", str(file), str(model), "--out", str(a.out),
                       "--deadline", f"{max(1.0, end - time.time()):.0f}", *words]  # fmt: skip
            with log.open("ab") as out:
                begun[log] = subprocess.Popen(command, env={**fixed, **os.environ, **places}, stdout=out, stderr=out)
        said = time.time()
        while any(process.poll() is None for process in begun.values()):
            time.sleep(0.5)
            if time.time() > said + STATUS:
                said = time.time()
                say(begun)
                write_table(a.out / RESULTS)
        say(begun)
    finally:
        for process in begun.values():
            process.terminate()
        failed = [process.wait() for process in begun.values()]
        say_own_command(a.out / RESULTS, own_command(a))
    return not any(failed)


def say_own_command(path: Path, command: str) -> None:
    """Put ``command`` in the place of those of the processes that it began."""
    if path.is_file():
        results = common.read_lines(path)
        for result in results:
            if result["command"].startswith("lolcats sweep"):
                result["command"] = command
        write_text(path, "".join(json.dumps(result) + "\n" for result in results))


def write_table(path: Path) -> None:
    """students.md beside results, once there are some."""
    if path.is_file() and (results := common.read_lines(path)):
        write_text(path.with_name("students.md"), table(results))


def table(results: list[dict[str, Any]]) -> str:
    """A line for each model, measured as most were: the untrained ones of the sweep, then rows in the order of ROWS."""
    alike = common.alike([r for r in results if r["kind"] in (ROW, UNTRAINED)])
    newest = {(r["kind"], r["name"], r.get("seed")): r for r in alike}
    controls = {seed: r["systems"][STUDENT.in_sweeps] for (_, name, seed), r in newest.items() if name == CONTROL}
    several = len({seed for _, _, seed in newest if seed is not None}) > 1
    metrics = list(dict.fromkeys(m for r in newest.values() for system in r["systems"].values() for m in system))
    lengths = sorted({int(m.split("@")[1].split()[0]) for m in metrics if "@" in m})
    past = max((m for m in metrics if m.startswith("positions nll ")), key=lambda m: int(m.split("-")[1]), default="")
    at = past.removeprefix("positions nll ")
    teacher = next((r["bytes"]["8192"][0] for r in newest.values() if "bytes" in r), None)
    head = ["model", *(f"{title}, {' / '.join(f'{n:,}' for n in lengths)}" for title in KINDS.values()),
            "GSM8K, strict / last number", f"books at {at}: nats", "KL",
            f"nats above the control at {_before(past)} / {at}", "zero-shot", "MMLU-half", "MiB at 8,192",
            "tokens, millions", "seconds: training + measuring + rest"]  # fmt: skip
    lines = []
    order = [TEACHER.in_sweeps, WINDOW_SINKS.in_sweeps, *yaml.safe_load(ROWS.read_text())["rows"]]
    place = {name: number for number, name in enumerate(order)}
    for (kind, name, seed), result in sorted(newest.items(), key=lambda pair: place.get(pair[0][1], len(place))):
        found = next(iter(result["systems"].values())) if kind == UNTRAINED else result["systems"][STUDENT.in_sweeps]
        size = result["bytes"]["8192"][1] if "bytes" in result else teacher if name == TEACHER.in_sweeps else None
        lines.append([
            f"{name}, seed {seed}" if several and seed is not None else name,
            *(" / ".join(_percent(found, f"{kind}@{n} {BEYOND}") for n in lengths) for kind in KINDS),
            f"{_percent(found, 'strict-match', True)} / {_percent(found, 'flexible-extract', True)}",
            _nats(found, past), _nats(found, f"positions kl {at}"),
            _difference(found, controls.get(seed, {}), past), _percent(found, "zero-shot average", True),
            _percent(found, "mmlu_half acc", True), "–" if size is None else f"{size / 2**20:.1f}",
            " + ".join(f"{count / 1e6:.2f}" for count in result.get("tokens", {}).values()) or "–", _seconds(result),
        ])  # fmt: skip
    text = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
    return f"# Students\n\n{NOTE}\n\n{text}\n\n{_origin(list(newest.values()))}\n"


def _before(past: str) -> str:
    """The bucket of positions before ``past``."""
    start = int(past.rpartition(" ")[2].split("-")[0] or 0)
    return f"{start // 2}-{start - 1}"


def _difference(found: dict[str, Any], control: dict[str, Any], past: str) -> str:
    """Nats more than the control, paired by windows of text, at :func:`_before` and at the last positions."""
    cells = []
    for metric in (f"positions nll {_before(past)}", past):
        items = (some.get(metric, {}).get("items", ()) for some in (found, control))
        pairs = list(zip(*items, strict=False))
        if len(pairs) < 2 or found is control:
            return "–"
        gaps = [a - b for a, b in pairs]
        cells.append(f"{statistics.mean(gaps):+.3f} ({statistics.stdev(gaps) / math.sqrt(len(gaps)):.3f})")
    return " / ".join(cells)


NOTE = (
    "Recall: percent of answers beyond the window all of whose tokens are the most likely ones, by length of prompt. "
    "GSM8K with five examples. Nats and KL from the teacher (also nats): a token of books, at these positions. "
    "In brackets: standard error. *Nats above the control*: more than "
    f'"{CONTROL}" has, paired by windows of text (those of one book are not independent). '
    "MiB: the cache of one sequence. Among the prompts of the teacher's own answers are "
    "questions of GSM8K's train part; no other row has seen them."
)


def _entry(found: dict[str, Any], part: str) -> dict[str, Any]:
    return next((entry for metric, entry in found.items() if part in metric), {})


def _percent(found: dict[str, Any], part: str, error: bool = False) -> str:
    entry = _entry(found, part)
    if entry.get("value") is None:
        return "–"
    spread = f" ({100 * entry['stderr']:.1f})" if error and entry["stderr"] else ""
    return f"{100 * entry['value']:.{1 if error else 0}f}{spread}"


def _nats(found: dict[str, Any], metric: str) -> str:
    entry = found.get(metric, {})
    if entry.get("value") is None:
        return "–"
    return f"{entry['value']:.3f}" + (f" ({entry['stderr']:.3f})" if entry["stderr"] else "")


def _seconds(result: dict[str, Any]) -> str:
    spent = result["seconds"]
    if result["kind"] == UNTRAINED:
        return f"{spent['evaluation']:.0f}"
    parts = [spent.get("transfer", 0) * (not result.get("transfer_of")) + spent.get("finetune", 0), spent["evaluation"]]
    parts += [max(0.0, spent["all"] - sum(parts))] if "all" in spent else []
    return " + ".join(f"{part:.0f}" for part in parts)


def _origin(results: Iterable[dict[str, Any]]) -> str:
    kinds = ("command", "hardware", "commit", "date")
    facts = {key: sorted({str(r[key]) for r in results if r.get(key)}) for key in kinds}
    return "; ".join(f"{key} {', '.join(values)}" for key, values in facts.items() if values)


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("data", nargs="?", type=Path, help="what students_data.py has written")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="only write the table of these results")
    parser.add_argument(
        "--selection", type=Path, action="append", default=[], metavar="FILE",
        help="of lolcats select; its curve has the sets of heads. Of several, a row takes the one with its own window",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--rows", type=Path, default=ROWS, help="file of rows (default: students.yaml)")
    parser.add_argument("--only", default="", help="regular expression of the rows to make")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the rows (default: 1)")
    parser.add_argument("--mps", action="store_true", help="let their kernels run side by side (NVIDIA's MPS)")
    parser.add_argument("--minutes", type=float, default=600, help="begin no row that would not end by then")
    parser.add_argument("--lengths", type=numbers, help="of prompts and of books' windows (default: 1024,4096,8192)")
    parser.add_argument("--answers", type=int, help="in a cell of recall (default: 50)")
    parser.add_argument("--gsm8k", type=int, help="questions, the first ones (default: 160; 0 for none)")
    parser.add_argument("--batch", type=int, help="rows of 1,024 tokens to measure at a time (default: 64)")
    parser.add_argument("--benchmarks", action="store_true", help="also the five zero-shot tasks and half of MMLU")
    parser.add_argument(
        "--set", action="append", default=[], help="a setting of rows without their own, or of the sweep"
    )
    parser.add_argument("--tiny", action="store_true", help="rows of 512 tokens, 20 steps: tries the script on a CPU")
    a = parser.parse_args(argv)
    if not a.table and not (a.model and a.data and a.out):
        parser.error("give MODEL, DATA and --out, or --table")
    for name, value in (TINY if a.tiny else FULL).items():
        given = getattr(a, name)
        setattr(a, name, [*value, *given] if name == "set" else value if given is None else given)
    a.words = list(argv)
    return a


def main(argv: Sequence[str] | None = None) -> None:
    a = arguments_of(sys.argv[1:] if argv is None else argv)
    if a.table:
        return write_table(a.table)
    end = time.time() + 60 * a.minutes
    a.data, a.out = a.data.resolve(), a.out.resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    model = a.model
    if model.is_file():
        model = a.out / "model"
        to_directory(a.model.resolve(), model)
    if a.minutes <= 0:
        return print(f"Nothing is begun; the model is {model}.")
    common.chosen_device(a, "20 GiB")
    tree = sweep_of(a, checked_selections(a, model))
    file = a.out / "students.yaml"
    write_text(file, yaml.safe_dump(tree, sort_keys=False, width=120))
    if a.jobs == 1:
        done = in_this_process(a, file, model, end)
    else:
        with shared_gpus(a.out) if a.mps else nullcontext({}) as places:
            done = in_processes(a, file, model, end, places)
    write_table(a.out / RESULTS)
    if not done:
        sys.exit("Not every row was made: see above, and the logs.")


if __name__ == "__main__":
    main()
