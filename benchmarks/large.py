"""The whole path of a 70B model on one GPU, a few steps of each part: stage 1, stage 2 on 4 bits, selection of heads.

    python benchmarks/large.py --against DIR         # writes benchmarks/results/large.json and large.md
    python benchmarks/large.py --only "stage 2|selection"      # parts whose name matches; the others stay
    python benchmarks/large.py --model 405B          # eight layers of a 405B: large_405B.json and large_405B.md
    python benchmarks/large.py --report              # the table again, from the JSON, with today's plan

Weights are random: those of stage 1 are drawn layer by layer, and one layer is quantized to 4 bits and copied for all
others. Each part is a process with a time limit of its own, and what it found is written as it comes; the parts that
say most come first. Kernels are compiled before anything is timed. Stage 1 is also measured with the build in DIR, in
turns. What `lolcats plan` says of the same work stands beside each part.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from large_search import selection, streamed_selection
from large_weights import KEPT, MODELS, Model, geometry, kept_heads, quantized_model, shape

ROOT = Path(__file__).parents[1]
SHOWN = 40  # lines of what a process says before it fails
MARGIN = 30  # seconds before the deadline in which no part begins
LAST = 5  # seconds before the deadline in which none runs
WARM = 1  # steps of stage 2 before the measured ones
GIB = 139.0  # of an H200
LOSSES = ("cross_entropy", "kl")
VARIANTS = [
    {"loss": loss, "rows": rows, "checkpointing": again}
    for rows, again in ((4, False), (2, False), (8, True))
    for loss in LOSSES
]
"""Of stage 2: rows at a time, and whether layers are computed again in the backward pass; by the plan, the fastest
come first."""
OTHERS = "stage 2, other forms"
PARTS = {"stage 2": 240.0, "selection": 120.0, "streamed selection": 120.0, "stage 1": 120.0, OTHERS: 240.0}
"""Seconds that a part may take (stage 1: each build and turn)."""
TOKENS = 8e6
"""Of each stage, in the time of the whole recipe."""
TARGETS = {"cross_entropy": 1500.0, "kl": 1000.0}
"""Tokens/s of stage 2."""


def stage_1(model: Model, device: torch.device, _: Callable[..., None]) -> dict[str, Any]:
    """Streamed, by ``benchmarks/scale.py`` of the build that is measured."""
    import scale

    part = replace(geometry(model), layers=model.stage_1_layers)
    with tempfile.TemporaryDirectory() as place:
        found = scale.Bench(part, device, time.monotonic() + PARTS["stage 1"] / 2, Path(place)).run()
    if "missing" in found:
        return found
    return {**found, "whole_run": scale.whole_run(part, found, scale.Run())}


def stage_2(model: Model, device: torch.device, tell: Callable[..., None]) -> dict[str, Any]:
    """Both losses, each in the first form that runs."""
    wrapped = model_with_lora(model, device, tell)
    for loss in LOSSES:
        variants = (variant for variant in VARIANTS if variant["loss"] == loss)
        next((v for v in variants if "missing" not in told(wrapped, model, v, device, tell)), None)
    return {}


def other_forms(model: Model, device: torch.device, tell: Callable[..., None]) -> dict[str, Any]:
    """The other forms of stage 2."""
    wrapped = model_with_lora(model, device, tell)
    for variant in VARIANTS[len(LOSSES) :]:
        told(wrapped, model, variant, device, tell)
    return {}


def told(
    wrapped: Any, model: Model, variant: dict[str, Any], device: torch.device, tell: Callable[..., None]
) -> dict[str, Any]:  # fmt: skip
    """What :func:`train` found, or why nothing: the next variant may still run."""
    from lolcats.errors import out_of_memory

    try:
        found = train(wrapped, shape(model).vocab_size, model, variant, device)
    except Exception as error:
        traceback.print_exc()
        known = out_of_memory(error)
        found = {"missing": "out of memory" if known else f"{type(error).__name__}: {error}"[:300]}
    common.free(device)
    tell(named(variant), variant | found)
    return found


def model_with_lora(model: Model, device: torch.device, tell: Callable[..., None]) -> Any:
    """Converted, with an eighth of its heads kept."""
    import lolcats
    from lolcats.config import load_config
    from lolcats.stages.finetune.stage import add_lora

    started, config = time.perf_counter(), shape(model)
    built = quantized_model(config, device, in_4_bits=device.type == "cuda")
    recipe = load_config("paper-70b", [*model.settings, f"data.sequence_length={model.length}"])
    attention = replace(recipe.attention, softmax_heads=kept_heads(config))
    wrapped = add_lora(lolcats.convert(built, attention), recipe.finetune)
    common.synchronize(device)
    tell("build", {"seconds": time.perf_counter() - started, "gpu_gib": _allocated(device)})
    return wrapped


def named(variant: dict[str, Any]) -> str:
    again = ", layers computed again" if variant["checkpointing"] else ""
    return f"stage 2, {variant['loss']}, {variant['rows']} rows at a time{again}"


def train(
    wrapped: Any, vocabulary: int, model: Model, variant: dict[str, Any], device: torch.device
) -> dict[str, Any]:  # fmt: skip
    """A few optimizer steps by ``lolcats finetune``'s own stage."""
    from lolcats.config import load_config
    from lolcats.data.rows import Data
    from lolcats.stages.finetune.stage import finetune
    from lolcats.stages.finetune.trainer import WatchSteps

    steps, never, ends = WARM + model.steps, 10**6, list[float]()
    config = load_config("paper-70b", [
        *model.settings, f"data.sequence_length={model.length}", f"finetune.batch_size={model.batch}",
        f"finetune.max_steps={steps}",
        f"finetune.micro_batch_size={variant['rows']}", f"finetune.loss={variant['loss']}",
        f"finetune.gradient_checkpointing={str(variant['checkpointing']).lower()}",
        f"finetune.eval_steps={never}", f"finetune.save_steps={never}", f"finetune.log_steps={never}",
    ])  # fmt: skip
    torch.manual_seed(1)
    ids = torch.randint(vocabulary, (steps * model.batch, model.length))
    wrapped.get_base_model().gradient_checkpointing_disable()
    own: Any = WatchSteps.on_step_end

    def end(*args: Any, **kwargs: Any) -> Any:
        common.synchronize(device)
        ends.append(time.perf_counter())
        if len(ends) == WARM:
            common.reset_peak(device)
        if len(ends) == steps:
            peaks.append(common.peak_gib(device))
        return own(*args, **kwargs)

    peaks: list[float | None] = []
    WatchSteps.on_step_end = end
    try:
        with tempfile.TemporaryDirectory() as directory:
            finetune(wrapped, Data(ids, ids[:1], ids[:1], "benchmark", {}), config, Path(directory))
    finally:
        WatchSteps.on_step_end = own
    seconds = [after - before for before, after in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]
    tokens = model.batch * model.length
    return {"step_seconds": seconds, "tokens_per_second": tokens / statistics.median(seconds), "peak_gib": peaks[0]}


def _allocated(device: torch.device) -> float | None:
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else None


def planned(model: Model, gpu_gib: float) -> dict[str, Any]:
    """What ``lolcats plan`` says of this work on one GPU: tokens/s and GiB of each part."""
    import scale

    from lolcats.config import load_config
    from lolcats.plan import Machine, Work, plan_transfer, quantized, size_of

    settings = [*model.settings, f"data.sequence_length={model.length}"]
    recipe, machine = load_config("paper-70b", settings), Machine(1, gpu_gib * 2**30)
    work, budget = Work(), replace(recipe, attention=replace(recipe.attention, softmax_budget=KEPT))
    plain, g = size_of(shape(model), recipe), geometry(model)
    size = size_of(shape(model), quantized.kept_evenly(budget, plain))
    found: dict[str, Any] = {}
    rows = replace(recipe.transfer, batch_size=g.rows, micro_batch_size=g.rows, eval_steps=scale.Run().eval_steps)
    whole = size_of(shape(replace(model, layers=g.of_layers)), recipe)
    transfers = plan_transfer(whole, replace(recipe, transfer=rows), machine, work)
    stream = next(plan for plan in transfers if plan.schedule == "stream")
    found["stage 1"] = {"tokens_per_second": stream.tokens / stream.time, "gib": stream.peak / 2**30}
    for variant in VARIANTS:
        stage = replace(
            recipe.finetune, batch_size=model.batch, micro_batch_size=variant["rows"], loss=variant["loss"],
            gradient_checkpointing=variant["checkpointing"],
        )  # fmt: skip
        plan = quantized.lora_in_4_bits(size, replace(recipe, finetune=stage), machine, work)
        found[named(variant)] = {"tokens_per_second": plan.tokens / plan.time, "gib": plan.peak / 2**30}
    forms: tuple[tuple[str, quantized.Form], ...] = (("selection", "4 bits"), ("streamed selection", "streamed"))
    for name, form in forms:
        search = quantized.search(plain, budget, machine, model.lengths, form)
        found[name] = {"seconds": search.seconds["computing"], "gib": search.peak / 2**30}
    (export,) = quantized.plan_export(plain, machine)
    return found | {"export": {"seconds": export.time, "gib": 0.0}}


WORK: dict[str, Callable[[Model, torch.device, Callable[..., None]], dict[str, Any]]] = {
    "stage 1": stage_1, "stage 2": stage_2, "selection": selection, "streamed selection": streamed_selection,
    OTHERS: other_forms,
}  # fmt: skip


def work(part: str, model: Model) -> None:
    """Measure in this process, whose lolcats is the build to measure; a line for each result."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def tell(name: str, found: dict[str, Any]) -> None:
        print("FOUND " + json.dumps([name, found]), flush=True)

    found = common.attempt(lambda: WORK[part](model, device, tell), float("inf"))
    if found:
        tell(f"{part}, the rest" if "missing" in found else part, found)


def measured(
    part: str, model: str, source: Path, seconds: float, heard: Callable[[str, dict[str, Any]], None]
) -> str:  # fmt: skip
    """:func:`work` in a process whose lolcats is that of ``source``. Returns what went wrong, if anything did; what an
    error says is shown."""
    own = [str(source / "src"), str(source / "benchmarks")]
    path = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, __file__, "--work", part, "--model", model, "--source", str(source)]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        late = threading.Timer(seconds, child.kill)
        late.start()
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("FOUND "):
                heard(*json.loads(line.removeprefix("FOUND ")))
        code = child.wait()
        out_of_time = not late.is_alive() and code != 0
        late.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if code or any(line.startswith("Traceback") for line in said):
        print(*said[-SHOWN:], sep="\n", file=sys.stderr, flush=True)
    return "out of time" if out_of_time else (said or ["no message"])[-1][:300] if code else ""


def turns(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Path]]:
    """(name, part, build) of all processes, in their order."""
    others = [Path(arguments.against).resolve()] if arguments.against else []
    for part in ("stage 2", "selection", "streamed selection"):
        yield part, part, ROOT
    for turn in range(arguments.turns):
        for source in [*others, ROOT]:
            yield f"stage 1, {'this' if source == ROOT else 'other'} build, turn {turn + 1}", "stage 1", source
    yield OTHERS, OTHERS, ROOT


def run(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    name, deadline = output(arguments), time.monotonic() + arguments.deadline
    known = common.read(arguments.out, name) if (arguments.out / f"{name}.json").exists() else {"parts": {}}
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30 if device.type == "cuda" else GIB
    plan = ThreadPoolExecutor(1).submit(planned, MODELS[arguments.model], gib)  # while the first part begins
    results: dict[str, Any] = {
        "date": str(date.today()), "device": common.hardware(device), "model": arguments.model,
        "against": Path(arguments.against).name or known.get("against", ""), "gpu_gib": gib, "parts": known["parts"],
        "versions": common.installed("torch", "transformers", "peft", "bitsandbytes", "triton", "liger-kernel"),
    }  # fmt: skip

    def heard(key: str, part: str, title: str, found: dict[str, Any]) -> None:
        title = title.replace(part, key)  # a turn of stage 1
        results["parts"][title] = found
        print(f"{title}: {json.dumps(found)}", file=sys.stderr, flush=True)
        results["plan"] = plan.result()
        common.write(results, report(results), arguments.out, name)

    for key, part, source in turns(arguments):
        if not re.search(arguments.only, key):
            continue
        left = deadline - time.monotonic()
        wrong = (
            measured(part, arguments.model, source, min(PARTS[part], left - LAST), partial(heard, key, part))
            if left > MARGIN
            else "no time left"
        )
        if wrong:
            heard(key, part, f"{part}, the rest", {"missing": wrong})
    return results


def output(arguments: argparse.Namespace) -> str:
    return "large" if arguments.model in ("70B", "tiny") else f"large_{arguments.model}"


def report(results: dict[str, Any]) -> str:
    model, plan = MODELS[results["model"]], results["plan"]
    all_layers, planned_layers = geometry(model).of_layers, f"{model.layers} layers"
    if all_layers != model.layers:
        planned_layers += f" (stage 1: of all {all_layers})"
    other = f"; other build: {results['against']}" if results["against"] else ""
    lines = [
        f"# The path of a {results['model']} model on one GPU", "",
        f"`python benchmarks/large.py`, {results['date']}, {results['device']}, {common.listed(results['versions'])}. "
        f"Llama-3.1-{results['model']} geometry with random weights. Stage 1: {model.stage_1_layers} layers, streamed, "
        f"hours extrapolated to all layers and 20M tokens{other}. Stage 2: {model.layers} layers in NF4, rows of "
        f"{model.length:,}, {model.batch} a step, {KEPT:.1%} of the key/value heads kept, LoRA of recipe paper-70b. "
        "Selection: a round of the search, extrapolated by passes through the model; streamed: from host memory, and "
        "the plan without reading files. What its layers put out is recorded on the GPU if it fits there twice. "
        f"*Plan*: what `lolcats plan` says of {planned_layers}, with speeds that come from the rows of 70B in "
        "`large.md` and from `training.md` (`plan_speeds.py`).", "",
        "| part | measured | peak GiB | plan | plan GiB | target |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    own = results["model"] != "405B"  # the targets are those of a 70B model
    lines += [_row(name, part, plan, own) for name, part in results["parts"].items()]
    for line in filter(None, (_ratio(results["parts"]), _recipe(results["parts"], plan, own))):
        lines += ["", line]
    return "\n".join(lines) + "\n"


def _row(name: str, part: dict[str, Any], plan: dict[str, Any], own: bool) -> str:
    """own: the targets are those of this model."""
    said = plan.get(name, plan.get(name.partition(",")[0], {}))
    peak = part.get("peak_gib", part.get("peak_gpu_gib"))
    gib = "" if peak is None else f"{peak:.1f}"
    plan_gib = f"{said['gib']:.1f}" if said else ""
    if "missing" in part:
        return f"| {name} | {part['missing']} | | | | |"
    if "whole_run" in part:
        whole = part["whole_run"]
        value = f"{whole['tokens_per_second']:,.0f} tokens/s, {whole['hours']:.2f} h"
        target = "26 GiB" * own
        return f"| {name} | {value} | {gib} | {said['tokens_per_second']:,.0f} tokens/s | {plan_gib} | {target} |"
    if "tokens_per_second" in part:
        value = f"{part['tokens_per_second']:,.0f} tokens/s"
        target = f"{TARGETS[part['loss']]:,.0f} tokens/s, 120 GiB" * own
        return f"| {name} | {value} | {gib} | {said['tokens_per_second']:,.0f} tokens/s | {plan_gib} | {target} |"
    if "passes" in part:
        value = f"{part['seconds'] / 60:.1f} min for {part['heads']} heads, {part['passes']:.0f} passes"
        return f"| {name} | {value} | {gib} | {said['seconds'] / 60:.1f} min | {plan_gib} | {'45 min' * own} |"
    held = "" if part["gpu_gib"] is None else f"{part['gpu_gib']:.1f}"
    return f"| {name} | {part['seconds']:.1f} s | {held} | | | |"


def _ratio(parts: dict[str, Any]) -> str:
    """Stage 1 of this build against the other one: medians of the steps of all turns."""
    steps = {
        build: [
            part["step_seconds"] for name, part in parts.items() if f"{build} build" in name and "whole_run" in part
        ]
        for build in ("this", "other")
    }
    if not all(steps.values()):
        return ""
    this, other = (1e3 * statistics.median(steps[build]) for build in ("this", "other"))
    return (
        f"A step of stage 1 in one layer takes {this:.2f} ms, and {other:.2f} ms with the other build: "
        f"{other / this:.2f} times as fast (target: 1.15)."
    )


def _recipe(parts: dict[str, Any], plan: dict[str, Any], whole: bool) -> str:
    """Hours of all steps with ``TOKENS`` in each stage, from what was measured. ``whole``: all layers were run."""
    found = list(parts.values())
    stage_1 = [x["whole_run"]["tokens_per_second"] for name, x in parts.items() if "this" in name and "whole_run" in x]
    stage_2 = max(
        (x["tokens_per_second"] for x in found if x.get("loss") == "cross_entropy" and "peak_gib" in x), default=0
    )
    searches = [
        parts[name]["seconds"] for name in ("selection", "streamed selection") if "passes" in parts.get(name, {})
    ]
    if not (whole and stage_1 and stage_2 and searches):
        return ""
    hours = {
        "selection": min(searches) / 3600, "stage 1": TOKENS / statistics.median(stage_1) / 3600,
        "stage 2": TOKENS / stage_2 / 3600, "export, by the plan": plan["export"]["seconds"] / 3600,
    }  # fmt: skip
    listed = ", ".join(f"{name} {value:.2f}" for name, value in hours.items())
    return (
        f"All of it with {TOKENS / 1e6:g}M tokens in each stage, on the cross-entropy: {sum(hours.values()):.2f} h "
        f"({listed}; target: 4.5)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["70B", "405B", "tiny"], default="70B", help="geometry (default: 70B)")
    parser.add_argument("--against", default="", help="directory of another build, for stage 1")
    parser.add_argument("--turns", type=int, default=2, help="processes of each build (default: %(default)s)")
    parser.add_argument("--only", default="", help="parts whose name has a match of this regular expression")
    parser.add_argument("--deadline", type=float, default=410, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="directory of the results")
    parser.add_argument("--report", action="store_true", help="only write the table again, with today's plan")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too: tries the script")
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        sys.path.insert(0, str(arguments.source / "benchmarks"))
        work(arguments.work, MODELS[arguments.model])
        return
    arguments.model = "tiny" if arguments.tiny else arguments.model
    if arguments.report:
        results = common.read(arguments.out, output(arguments))
        results["plan"] = planned(MODELS[arguments.model], results.get("gpu_gib", GIB))
        common.write(results, report(results), arguments.out, output(arguments))
    else:
        run(arguments, common.chosen_device(arguments, "139 GB"))
    print((arguments.out / f"{output(arguments)}.md").read_text())


if __name__ == "__main__":
    main()
