"""Plans as tables and commands, and the error message if nothing fits."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

from lolcats.config import BUDGET, Config
from lolcats.errors import LolcatsError
from lolcats.evaluation.memory import readable
from lolcats.plan.costs import GIB, Machine, Plan, Work, enough_gpus, gpu_need, paper_disk
from lolcats.plan.size import Size

UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
HEADER = ("stage", "schedule", "GPU GiB", "host GiB", "disk GB", "read GB", "hours", "tokens/s", "limited by", "fits")
PAPER_BLOCK = 9  # layers per block of the paper's 405B run: 126 layers in 14 blocks
SELECTION = "selection.yaml"
HEADROOM = 1.1  # factor on the host memory that a plan counts
HARDLY = 1.02  # times as long as the fastest plan that a smaller one may take


def parse_quantity(text: str, option: str, least: float = 0.0) -> float:
    """Parse ``80GiB``, ``3GB/s``, ``20M`` or a plain number as bytes, bytes per second, or tokens.

    Raises:
        LolcatsError: not a quantity, or below ``least``, which means that the unit is missing.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kMGT]i?)?(?:B|B/s)?", text.strip())
    if not match:
        raise LolcatsError(f"{option} {text}: expected a quantity such as 80GiB, 3GB/s or 20M.")
    value = float(match[1]) * UNITS[match[2] or ""]
    if value == math.inf:
        raise LolcatsError(f"{option} {text} is too large.")
    if value < least:
        raise LolcatsError(f"{option} {text} is {value:,.0f} bytes: give a unit, such as {match[1]}GiB.")
    return value


def title(model: str, size: Size, machine: Machine, work: Work) -> str:
    return (
        f"{model}: {size.total / 1e9:.2f} billion parameters, "
        + (f"{size.maps / 1e6:.1f} million in feature maps, " if size.maps else "")
        + f"{size.lora / 1e6:.1f} million in LoRA; "
        + (f"{work.transfer_tokens / 1e6:g}M + " if size.maps else "")
        + f"{work.finetune_tokens / 1e6:g}M tokens on {machine.gpus} × {machine.gpu_memory / GIB:.0f} GiB"
    )


def recommended(plans: Sequence[Plan]) -> list[Plan]:
    """The fastest plan that fits (the first of equally fast ones), or an empty list. Streaming and blocks give the same
    feature maps, so if one of them is fastest, the smaller one is preferred as long as it takes hardly any longer."""
    fitting = sorted((plan for plan in plans if not plan.problems), key=lambda plan: plan.time)
    if not fitting or not _layer_by_layer(fitting[0]):
        return fitting[:1]
    close = [plan for plan in fitting if _layer_by_layer(plan) and plan.time <= HARDLY * fitting[0].time]
    return [min(close, key=lambda plan: plan.peak)]


def _layer_by_layer(plan: Plan) -> bool:
    return plan.stage == "stage 1" and plan.schedule != "joint"


def plan_rows(plans: Sequence[Plan]) -> list[tuple[str, ...]]:
    """A row for each plan, with the columns of ``HEADER``."""
    return [
        (
            plan.stage, plan.schedule, f"{plan.peak / GIB:.1f}", f"{sum(plan.host.values()) / GIB:.0f}",
            f"{sum(plan.disk.values()) / 1e9:,.0f}", f"{plan.read / 1e9:,.0f}", f"{plan.time / 3600:.2f}",
            f"{plan.tokens / plan.time:,.0f}" if plan.tokens else "", plan.limit, "; ".join(plan.problems) or "yes",
        )
        for plan in plans
    ]  # fmt: skip


def part_rows(plan: Plan) -> list[tuple[str, ...]]:
    """The parts of a plan's memory, disk and time: (place, part, amount)."""
    parts = [("GPU", plan.gpu, GIB, "GiB"), ("host", plan.host, GIB, "GiB"), ("disk", plan.disk, 1e9, "GB"),
             ("time", plan.seconds, 3600, "h")]  # fmt: skip
    return [
        (place, name, f"{amount / unit:,.2f} {symbol}")
        for place, amounts, unit, symbol in parts
        for name, amount in amounts.items()
        if amount
    ]


def commands(
    plans: Sequence[Plan], model: str, recipe: str, sets: Sequence[str], machine: Machine, trust: bool = False,
    selection: bool = False, maps: bool = True,
) -> list[str]:  # fmt: skip
    """Commands that run the plans of both stages. A run has one configuration, so stage 1 gets all settings.

    Args:
        selection: a search before stage 1 has left its heads in a file, in place of the budget in recipe or settings.
        maps: whether the model has feature maps. If not, there is no stage 1, and on one GPU one command does it all.
    """
    consent = ["--trust-remote-code"] * trust
    words = ["lolcats", "transfer", model, "--data", "DATA", "--out", "DIR", "--recipe", recipe]
    planned = [text for plan in plans for text in plan.settings]
    if selection:
        words += ["--selection", SELECTION]
        planned.append(f"{BUDGET}=0")
    lines = []
    if not maps and machine.gpus == 1:
        words[1] = "linearize"
        sets = [*_without([BUDGET] * selection, sets), *planned]
        return [shlex.join([*words, *_set(sets), *consent])] if plans else []
    for plan in plans:
        if plan.stage == "stage 1":
            chosen = ["transfer.order"] + ["transfer.coupling"] * _layer_by_layer(plan) + [BUDGET] * selection
            settings = _set([*_without(chosen, sets), *planned])
            lines.append([*words, "--schedule", plan.schedule.split()[0], *settings, *consent])
        else:
            lines.append(["lolcats", "finetune", "DIR", *consent])
    return [shlex.join([*launcher(machine), *line]) for line in lines]


def search_command(
    plan: Plan, model: str, budget: float, recipe: str, sets: Sequence[str] = (), trust: bool = False
) -> str:  # fmt: skip
    """The command that chooses heads, beside the windows that the others have in recipe and settings."""
    words = ["lolcats", "select", model, "--out", SELECTION, "--budget", f"{budget:g}", "--beyond", "1"]
    options = [word for setting in plan.settings for word in setting.split()]
    settings = _set(_without([BUDGET], sets))
    return shlex.join([*words, *options, "--recipe", recipe, *settings, *["--trust-remote-code"] * trust])


def _set(settings: Sequence[str]) -> list[str]:
    return [word for text in dict.fromkeys(settings) for word in ("--set", text)]


def _without(names: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The settings without those of these names."""
    return [text for text in settings if text.partition("=")[0].strip() not in names]


def launcher(machine: Machine) -> list[str]:
    """The words before ``lolcats``: torchrun if there are several processes, to run on every node."""
    if machine.gpus == 1:
        return []
    words = ["torchrun", "--nproc-per-node", str(machine.ranks), "--no-python"]
    if machine.nodes > 1:
        words[1:1] = ["--nnodes", str(machine.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST_NODE:29500"]
    return words


def paper_line(size: Size, work: Work, plans: Sequence[Plan]) -> str:
    """Compare the disk space of the paper's block-wise training with ours."""
    ours = next(plan for plan in plans if plan.schedule.startswith("blocks"))
    kept = ours.disk["hidden states at two boundaries"]
    return (
        "Hidden states on disk: the paper's blocks store 2 × tokens × hidden × layers / k bytes, "
        f"{paper_disk(size, work, PAPER_BLOCK) / 1e12:.2f} TB in blocks of {PAPER_BLOCK}; {ours.schedule} here keep "
        f"two boundaries, {kept / 1e12:.2f} TB; stream and joint store nothing."
    )


def generation_line(size: Size, tokens: int = 32768) -> str:
    """What a sequence takes while text is generated."""
    kept = f", up to {readable(size.window)} for the windows of layers that slide one" if size.window else ""
    kept += f" and {readable(size.token)} a token for the keys of kept heads and layers" if size.token else ""
    whole = size.state + size.window + tokens * size.token
    teacher = size.teacher_window + tokens * size.teacher_token
    return (
        f"Generation in bf16: a sequence takes {readable(size.state)}{kept}; at {tokens:,} tokens {readable(whole)}, "
        f"the base model's cache {readable(teacher)}."
    )


def time_line(size: Size) -> str:
    """A note if the times do not apply to this model, else empty."""
    if not size.unrotated:
        return ""
    return "Times were measured with attention.feature_inputs=rotated; unrotated was not measured."


def refusal(plans: Sequence[Plan], size: Size, config: Config, machine: Machine, work: Work) -> str:
    """Why no plan of a stage fits, and what would fit; empty if a plan fits."""
    if any(not plan.problems for plan in plans):
        return ""
    best = min(plans, key=lambda plan: (len(plan.problems), plan.peak))
    text = (
        f"{best.stage.capitalize()} does not fit in any form. The closest, {best.schedule}: {'; '.join(best.problems)}."
    )
    if best.stage == "stage 1":
        needs = f"{_host_need(best):.0f} GiB of host memory and {gpu_need(best.peak) / GIB:.0f} GiB on each GPU"
        return f"{text} {_less(best)}This plan needs {needs}."
    if found := enough_gpus(size, config, machine, work):
        host = f"{_host_need(found[1]):.0f} GiB of host memory in each node"
        return f"{text} It would fit on {found[0]} such GPUs ({found[1].schedule}, one row at a time) with {host}."
    return f"{text} No number of such GPUs is enough: they cannot hold even a few decoder layers."


def no_search(plans: Sequence[Plan]) -> str:
    """Why no search for heads fits, and what else gives a run its heads; empty if one fits."""
    if any(not plan.problems for plan in plans):
        return ""
    least = plans[-1]  # the shortest prompts, one layer at a time
    return (
        f"The search for heads does not fit in any form. The closest, {least.schedule}: {'; '.join(least.problems)}. "
        "Run lolcats select on a larger machine and give its file with --selection, or list heads in "
        "attention.softmax_heads."
    )


def _host_need(plan: Plan) -> float:
    return sum(plan.host.values()) * HEADROOM / GIB


def _less(plan: Plan) -> str:
    """Advice on what to reduce first."""
    if any(problem.startswith("GPU") for problem in plan.problems):
        return "Use a smaller transfer.micro_batch_size or a smaller --block-size. "
    return ""
