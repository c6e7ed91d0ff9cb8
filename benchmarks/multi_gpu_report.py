"""The tables of multi_gpu.py."""

from operator import itemgetter
from typing import Any

import common

SCALING = {2: 0.9, 4: 0.85, 8: 0.8}  # targets: speed of n GPUs against n times one GPU's
LARGER = 3  # times the rows of a micro-batch: does a sharded layer take as long with more to compute?
SHARDED = "stage 2, sharded"  # in results of 2026-11-25 that is what "stage 2" of several GPUs was
Results = list[list[Any]]  # number of ranks, part, what was found


def collect(found: Results, order: list[str], other: Results) -> dict[str, dict[str, Any]]:
    """Part -> number of ranks -> result, with what compares it to one rank's, and to that of another build."""
    parts: dict[str, dict[str, Any]] = {}
    before = {(count, name): result for count, name, result in other}
    for count, name, result in sorted(found, key=itemgetter(0)):
        base = name.split(", ")[0]  # of all forms of sharded stage 2: one rank's whole model
        single = parts.get(base, {}).get("1")
        if count > 1 and single and "missing" not in single and "missing" not in result:
            compare(result, single, count)
        then = before.get((count, SHARDED if name.startswith(SHARDED) and "larger" not in name else name), {})
        if "tokens_per_second" in then and "tokens_per_second" in result:
            result["other"] = {key: then[key] for key in ("tokens_per_second", "seconds", "losses", "peak_gib")}
            one = before.get((1, base), {})
            if count > 1 and "tokens_per_second" in one:
                result["other"]["efficiency"] = then["tokens_per_second"] / count / one["tokens_per_second"]
            result["ratio"] = result["tokens_per_second"] / then["tokens_per_second"]
        parts.setdefault(name, {})[str(count)] = result
    return dict(sorted(parts.items(), key=lambda part: order.index(part[0] if part[0] in order else SHARDED)))


def compare(result: dict[str, Any], single: dict[str, Any], count: int) -> None:
    """Add what compares a result of ``count`` ranks with one rank's."""
    if "losses" in result:
        if result["tokens"] == single["tokens"]:
            pairs = zip(result["losses"], single["losses"], strict=True)
            result["loss_difference"] = max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs)
        result["efficiency"] = result["tokens_per_second"] / count / single["tokens_per_second"]
    for rows, batch in result.get("batches", {}).items():
        batch["speed_up"] = batch["tokens_per_second"] / single["batches"][rows]["tokens_per_second"]
    if "search_seconds" in result:
        result["speed_up"] = single["search_seconds"] / result["search_seconds"]
        result["same"] = result["chosen"] == single["chosen"]


def report(results: dict[str, Any]) -> str:
    sizes = results["sizes"]
    most = max(results["counts"])
    packages = common.listed(results["versions"])
    small, large = sizes["models"]
    lines = [
        "# Several GPUs",
        "",
        f"`python benchmarks/multi_gpu.py`, {results['date']}, up to {most} × {results['device']}; {packages}.",
        f"Random weights in bf16; {small}, and {large} with recomputed layers in the large stage 2. Every number "
        f"of GPUs trains on the same rows of {sizes['length']} tokens: {most} micro-batches of "
        f"{sizes['transfer_rows']}, {sizes['finetune_rows']} and (large) {sizes['large_rows']} rows a step. Stage 1 is "
        f"data-parallel, {kind_of_stage_2(results['parts'])}. "
        "Efficiency: tokens/s against one GPU's times the number of GPUs. Peak: PyTorch's allocated memory, weights "
        f"included, of the fullest GPU; planned: what `lolcats plan` says. {results['note']}".rstrip(),
        "",
        "| part | GPUs | tokens/s | planned | efficiency | target | losses differ by | peak GiB | planned |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, part in results["parts"].items():
        for count, found in part.items():
            if "missing" in found:
                lines.append(f"| {name} | {count} | {found['missing']} | | | | | | |")
            elif "losses" in found:
                share = f"{found['efficiency']:.2f}" if "efficiency" in found else ""
                differ = f"{100 * found['loss_difference']:.2g} %" if "loss_difference" in found else ""
                speeds = f"{found['tokens_per_second']:,.0f} | {_number(found['predicted_tokens_per_second'], ',.0f')}"
                memory = f"{found['peak_gib'] or 0:.1f} | {_number(found['predicted_gib'], '.1f')}"
                target = SCALING.get(int(count), "")
                lines.append(f"| {name} | {count} | {speeds} | {share} | {target} | {differ} | {memory} |")
    lines += generation_lines(results["parts"].get("generation", {}), sizes)
    lines += other_lines(results["parts"]) + selection_lines(results["parts"].get("selection", {}))
    for name, part in results["parts"].items():
        for found in part.values():
            if "profile" in found:
                lines += [] if name == SHARDED else ["", f"{name}:"]
                lines += profile_lines(found["profile"])
    lines += [f"\n{count} ranks: {what}." for count, what in results["failures"].items()]
    return "\n".join(lines) + "\n"


def generation_lines(counts: dict[str, Any], sizes: dict[str, Any]) -> list[str]:
    """Generation by number of GPUs."""
    rows = []
    for count, found in counts.items():
        for batch_size, batch in found.get("batches", {}).items():
            speed_up = f"{batch['speed_up']:.2f}" if "speed_up" in batch else ""
            times = f"{batch['prefill_seconds']:.3f} | {batch['tokens_per_second']:,.1f}"
            rows.append(f"| {count} | {batch_size} | {times} | {speed_up} |")
    return rows and [
        "",
        f"Generation, greedy, plain PyTorch, {sizes['new_tokens']} tokens after {sizes['prompt']}; heads split "
        "over the GPUs (tensor parallel):",
        "",
        "| GPUs | batch | prefill s | decoded tokens/s | against one GPU |",
        "|---:|---:|---:|---:|---:|",
        *rows,
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def other_lines(parts: dict[str, Any]) -> list[str]:
    """Both builds, measured in one run."""
    rows = [
        f"| {name} | {count} | {found['tokens_per_second']:,.0f} | {found['other']['tokens_per_second']:,.0f} | "
        f"{found['ratio']:.2f} | {_number(found.get('efficiency'), '.2f')} | "
        f"{_number(found['other'].get('efficiency'), '.2f')} |"
        for name, part in parts.items()
        for count, found in part.items()
        if "other" in found
    ]
    head = "| part | GPUs | tokens/s | other build | ratio | efficiency | other build |"
    return ["", "Beside the other build:", "", head, "|---|---:|---:|---:|---:|---:|---:|", *rows] if rows else []


def selection_lines(part: dict[str, Any]) -> list[str]:
    """The search for heads to keep, by number of GPUs."""
    rows = []
    for count, found in part.items():
        if "missing" in found:
            rows.append(f"| {count} | {found['missing']} | | |")
            continue
        same = "" if "same" not in found else "yes" if found["same"] else "no"
        rows.append(f"| {count} | {found['search_seconds']:.1f} | {_number(found.get('speed_up'), '.2f')} | {same} |")
    first = next((found for found in part.values() if "search_seconds" in found), None)
    if first is None:
        return []
    what = f"{first['heads']} heads of {first['shape']}, {first['tokens']:,} tokens a score, random weights"
    head = ["| GPUs | s | against one GPU | same heads |", "|---:|---:|---:|---|"]
    return ["", f"Search for heads to keep ({what}), without loading:", "", *head, *rows]


def kind_of_stage_2(parts: dict[str, Any]) -> str:
    if SHARDED not in parts:
        return "stage 2 sharded (FSDP2)"
    return (
        "stage 2 data-parallel, too, or sharded (FSDP2), then also with "
        f"micro-batches {LARGER} times as large, and against one GPU's stage 2; the large one is sharded"
    )


def profile_lines(found: dict[str, Any]) -> list[str]:
    """One step of the first rank in a sentence; what took longest in short tables."""
    share = 100 * found["communication_hidden"]
    lines = [
        "",
        f"A sharded step under torch.profiler, first rank: {found['milliseconds']:.0f} ms from the first kernel to the "
        f"last; GPU busy {found['busy']:.0f}, computing {found['computing']:.0f}, communicating "
        f"{found['communication']:.0f} ms, of which {share:.0f} % while computing.",
    ]
    for name, title in (
        ("host", "host, without what it calls"),
        ("hooks", "host, with what it calls"),
        ("gpu", "kernel"),
    ):
        if found[name]:
            lines += ["", f"| {title} | calls | ms |", "|---|---:|---:|"]
            lines += [f"| `{what}` | {calls} | {time:.1f} |" for what, calls, time in found[name][:6]]
    return lines
