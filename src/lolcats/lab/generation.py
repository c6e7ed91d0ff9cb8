"""Results of ``lolcats bench``: a JSON file that runs add to, with a Markdown table and a plot of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lolcats.files import write_text
from lolcats.lab.bench import PEERS, Row
from lolcats.report.picture import has_matplotlib
from lolcats.report.table import markdown

KEY = ("device", "family", "hidden", "layers", "dtype", "prompt", "system", "key_maps", "state_dtype", "batch")
HEADER = (
    "system", "key maps", "state", "batch", "new", "decode tokens/s", "ms a step", "bound ms", "share of bound",
    "whole tokens/s", "peak GiB", "state MB a row",
)  # fmt: skip


def write(path: Path, lines: Iterable[Row], command: str) -> str:
    """Add each line to the JSON file as it comes, and write table and plot of the whole file. Returns the table."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    names = ("lolcats", "torch", "transformers", "triton", "liger-kernel")
    about = {"date": str(date.today()), "versions": {name: _version(name) for name in names}, "command": command}
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in lines:
        rows = [row for row in rows if any(row.get(key) != line.get(key) for key in KEY)]
        rows = sorted([*rows, {**line, **about}], key=_order)
        write_text(path, json.dumps({"rows": rows}, indent=1) + "\n")
        write_text(path.with_suffix(".md"), table(rows))
    draw(rows, path.with_suffix(".png"))
    return table(rows)


def _order(row: Row) -> list[str]:
    return [str(row.get(key)) for key in KEY[:-1]] + [f"{row['batch']:09}"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cells(row: Row) -> tuple[str, ...]:
    name = "engine" if row["system"] == "engine" else PEERS[row["system"]]
    start = (name, (row["key_maps"] or "").replace("_", " "), row["state_dtype"] or "", f"{row['batch']:,}")
    if "missing" in row:
        return (*start, row["missing"], *[""] * 7)
    own = row["system"] == "engine"
    return (
        *start, f"{row['new']:,}", f"{row['decode_tokens_per_second']:,.1f}", f"{row['step_ms']:.2f}",
        f"{row['bound_ms']:.2f}" if own else "", f"{row['share_of_bound']:.0%}" if own else "",
        f"{row['whole_tokens_per_second']:,.1f}", _peak(row), _memory(row) if own else "",
    )  # fmt: skip


def _peak(row: Row) -> str:
    """GiB; a row whose peak is not known says why under ``peak_unknown``."""
    return "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"


def _memory(row: Row) -> str:
    """MB of a sequence's state and full windows, and what each token adds to it if heads are kept."""
    fixed, added = row["state_bytes"] + row.get("window_bytes", 0), row.get("token_bytes", 0)  # not in older rows
    return f"{fixed / 1e6:.1f}" + (f" + {added / 1024:.4g} KiB a token" if added else "")


def table(rows: Sequence[Row]) -> str:
    """A Markdown section for each model and device."""
    parts = ["# Generation", ""]
    for group in _groups(rows):
        first, memory = group[0], [r for r in group if (r.get("memory") or {}).get("1000")]
        versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items() if number)
        commands = dict.fromkeys(row["command"] for row in group)
        dates = ", ".join(sorted({row["date"] for row in group}))
        parts += [
            f"## {first['family']}, {first['layers']} layers, hidden size {first['hidden']}, {first['dtype']}: "
            f"{first['device']}",
            "",
            f"{first['heads']} query and {first['kv_heads']} key/value heads of {first['head_dim']}, "
            f"{first['features']} features; {first['window']}; prompts of {first['prompt']} tokens; *new* is the "
            f"number of tokens generated per sequence. {versions}; {dates}.",
            "",
            *(f"- `{command}`" for command in commands),
            "",
            f"The bound of a step: max({first['weight_bytes'] / 1e9:.1f} GB / {first['bandwidth'] / 1e12:.2f} TB/s, "
            f"batch · {2 * first['weights'] / 1e9:.1f} GFLOP / {first['flops'] / 1e12:.0f} TFLOP/s) + batch · state / "
            f"{first['bandwidth'] / 1e12:.2f} TB/s.",
            "",
            markdown(HEADER, [cells(row) for row in group]),
            "",
            *(f"–: {reason}\n" for reason in dict.fromkeys(r["peak_unknown"] for r in group if "peak_unknown" in r)),
            *(
                f"Memory allocated after {r['new']:,} tokens against 1,000 at batch {r['batch']}: "
                f"{r['memory']['end'] / r['memory']['1000'] - 1:+.2%}."
                for r in memory
            ),
        ]
    return "\n".join(parts).rstrip() + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Plot tokens per second and memory against batch size for every system."""
    if not has_matplotlib(path.name):
        return
    from matplotlib import pyplot

    groups = _groups(rows)
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(11, 4 * len(groups)), squeeze=False, layout="constrained")
    for (speed, memory), group in zip(axes, groups, strict=True):
        for label in dict.fromkeys(_label(row) for row in group):
            line = [row for row in group if _label(row) == label and "missing" not in row]
            if not line:
                continue
            batches = [row["batch"] for row in line]
            (drawn,) = speed.plot(batches, [r["decode_tokens_per_second"] for r in line], marker="o", label=label)
            if line[0]["system"] == "engine":
                bound = [1e3 * row["batch"] / row["bound_ms"] for row in line]
                speed.plot(batches, bound, linestyle=":", color=drawn.get_color())
            known = [row for row in line if row["peak_bytes"] is not None]
            memory.plot(
                [row["batch"] for row in known], [row["peak_bytes"] / 2**30 for row in known], marker="o",
                color=drawn.get_color(),
            )  # fmt: skip
        for axis, name in ((speed, "tokens/s (dotted: bound)"), (memory, "peak GiB")):
            axis.set(xscale="log", xlabel="batch", ylabel=name)
            axis.grid(alpha=0.3)
        speed.set(yscale="log", title=f"{group[0]['family']}, hidden {group[0]['hidden']}: {group[0]['device']}")
        speed.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _label(row: Row) -> str:
    if row["system"] != "engine":
        return PEERS[row["system"]]
    return f"engine, key maps {row['key_maps'].replace('_', ' ')}, {row['state_dtype']} state"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows by device, model, dtype and prompt length."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in KEY[:6]), []).append(row)
    return list(groups.values())
