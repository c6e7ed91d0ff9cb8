"""What a base model in 4 bits, the search for heads and export cost. Estimates: see :class:`Guesses`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lolcats.config import Config
from lolcats.modeling.merge import FILE_BYTES
from lolcats.plan.costs import (
    GIB,
    PROCESS,
    WORKSPACE,
    Machine,
    Plan,
    Speeds,
    Work,
    checked,
    forward_operations,
    gpu_need,
    lora,
)
from lolcats.plan.size import Size
from lolcats.selection.result import by_layer
from lolcats.selection.search import added_at
from lolcats.selection.select import Settings, prompt_plan
from lolcats.selection.streamed import SPARE
from lolcats.weights.base import NF4_BYTES

Loss = Literal["cross_entropy", "kl", "mix"]
LENGTHS = ((2048, 4096, 8192), (1024, 2048, 4096), (1024, 2048))
"""Prompts of a search: what ``lolcats select`` takes by default, and shorter ones for models that leave less room."""
Form = Literal["", "4 bits", "streamed"]
FORMS: tuple[Form, ...] = ("", "4 bits", "streamed")
"""Of the model that is searched: as it is, in 4 bits, one layer at a time on the GPU. The first that fits is best."""
HEADROOM = 1.1
"""Host memory for each byte that a streamed search counts."""
MOST_ROWS = 16
"""Rows at a time; more save hardly any time."""
SHARE = 0.125
"""Of the key/value heads, what ``lolcats select`` keeps by default."""
PATIENCE = 45 * 60
"""Seconds that a search should take at most."""


@dataclass(frozen=True)
class Guesses:
    """Speeds that were never measured."""

    dequantize: float = 1.5e12
    """Bytes per second that bitsandbytes reads and writes while it turns weights of 4 bits into bf16."""
    search: float = 0.5
    """Share of ``Speeds.matmul`` that the passes of a search reach."""
    merge: float = 1e9
    """Bytes of weights per second into which a CPU merges LoRA."""


def nf4_bytes(size: Size) -> float:
    """Weights of a model whose decoder layers are in 4 bits; embedding and output layer stay in bf16."""
    return NF4_BYTES * size.decoder + 2.0 * (size.embedding + size.head)


def dequantizing(size: Size, passes: int, guesses: Guesses) -> float:
    """Seconds of turning all weights in 4 bits into bf16, ``passes`` times."""
    return passes * (NF4_BYTES + 2.0) * size.decoder / guesses.dequantize


def plan_quantized(size: Size, config: Config, machine: Machine, work: Work) -> list[Plan]:
    """Plans for stage 2 on a base model in 4 bits, which works on one GPU: with the recipe's loss and, if that is the
    cross-entropy, with the KL divergence from the teacher, which computes every batch once more."""
    if machine.gpus > 1:
        return []
    losses: tuple[Loss, ...] = (config.finetune.loss,)
    if losses == ("cross_entropy",):
        losses = ("cross_entropy", "kl")
    return [_fastest(size, config, machine, work, loss) for loss in losses]


def _fastest(size: Size, config: Config, machine: Machine, work: Work, loss: Loss) -> Plan:
    """The fastest plan that fits, else the smallest. More rows at a time share the dequantized weights; keeping all
    activations saves a forward pass, and leaves room for fewer rows."""
    stage, plans = config.finetune, list[Plan]()
    for again in (False, True):
        for rows in (n for n in range(min(stage.batch_size, MOST_ROWS), 0, -1) if stage.batch_size % n == 0):
            changed = replace(stage, micro_batch_size=rows, gradient_checkpointing=again, loss=loss)
            plan = checked(lora_in_4_bits(size, replace(config, finetune=changed), machine, work), machine)
            more = [f"finetune.micro_batch_size={rows}"] if stage.micro_batch_size not in ("auto", rows) else []
            plans.append(replace(plan, settings=[*plan.settings, *more]))
    return min(plans, key=lambda plan: (len(plan.problems), plan.peak if plan.problems else plan.time))


def lora_in_4_bits(size: Size, config: Config, machine: Machine, work: Work) -> Plan:
    """LoRA on a base model in 4 bits, with the rows, the loss and the gradient checkpointing of ``config``."""
    stage, whole = config.finetune, lora(size, config, machine, work)
    teacher, again = stage.loss != "cross_entropy", bool(stage.gradient_checkpointing)
    micro_batches = work.finetune_tokens / (stage.rows_at_once * config.data.sequence_length)
    dequantized = micro_batches * dequantizing(size, 2 + teacher + again, Guesses())
    seconds = {
        "computing (estimated)": whole.seconds["computing"] + dequantized,
        "reading": 2.0 * size.total / machine.read_speed,
    }
    gpu = {**whole.gpu, "weights": nf4_bytes(size), "matrices in bf16": 2 * 2.0 * size.hidden * size.mlp / 2}
    host = {"processes": PROCESS, "a tensor, read and quantized": 4.0 * largest_tensor(size)}
    settings = ["finetune.quantize_base=nf4", f"finetune.gradient_checkpointing={str(again).lower()}"]
    form = "4 bits" + ", KL loss" * teacher + ", recomputed" * again
    return Plan("stage 2", form, work.finetune_tokens, gpu, host, whole.disk, 2.0 * size.total, seconds, settings)


def plan_select(size: Size, config: Config, machine: Machine) -> list[Plan]:
    """Plans for the search for heads on one GPU, from long prompts to short ones: on the model as it is if it fits,
    otherwise in 4 bits, otherwise with one layer at a time on the GPU."""
    for form in FORMS:
        plans = [checked(search(size, config, machine, lengths, form), machine) for lengths in LENGTHS]
        if any(not plan.problems for plan in plans):
            break
    return plans


def search(size: Size, config: Config, machine: Machine, lengths: Sequence[int], form: Form = "") -> Plan:
    """The search for an eighth of the heads, or as many as ``attention.softmax_budget`` allows."""
    speeds, guesses, longest = Speeds(), Guesses(), max(lengths)
    count = max(1, int((config.attention.softmax_budget or SHARE) * size.kv_heads * size.linearized))
    tokens, passes = sum(length for _, length in prompt_plan(lengths)), passes_of_search(count)
    products, attention = forward_operations(size, longest)
    seconds = passes * tokens * (products + attention) / guesses.search / speeds.matmul
    gpu = {
        "weights": 2.0 * size.total, "inputs of layers, for slopes": 2.0 * size.layers * longest * size.hidden,
        "activations": 2.0 * longest * (8 * size.hidden + 2 * size.mlp), "answers": 0.5 * GIB, "workspace": WORKSPACE,
    }  # fmt: skip
    host = {"processes": PROCESS, "hidden states": 2.0 * size.layers * tokens * size.hidden}
    read = 2.0 * size.total
    if form == "4 bits":  # prompts of the longest length may go through one by one
        seconds += dequantizing(size, math.ceil(passes * tokens / longest), guesses)
        gpu["weights"], host["weights while loading"] = nf4_bytes(size), 4.0 * largest_tensor(size)
    elif form == "streamed":
        del gpu["inputs of layers, for slopes"]
        gpu["weights"] = 2.0 * (size.embedding + size.head + 2 * size.layer)
        gpu["hidden states of sets"] = 2.0 * Settings().width * tokens * size.hidden
        host |= {"a layer and the next": 4.0 * size.layer, "kept free": SPARE}
        room = machine.host_memory / HEADROOM - sum(host.values())
        host["weights that are kept"] = min(max(0.0, room), 2.0 * size.decoder)
        seconds += streams_of_search(count) * 2.0 * size.decoder / speeds.host_link
        read += (streams_of_search(count) - 1) * (2.0 * size.decoder - host["weights that are kept"])
    else:
        host["weights while loading"] = gpu["weights"]
    how = {"": [], "4 bits": ["--quantize nf4"], "streamed": ["--schedule stream"]}[form]
    parts = {"computing (estimated)": seconds, "reading": read / machine.read_speed}
    return Plan(
        "select", ", ".join([f"prompts of {longest:,}", *([form] if form else [])]), passes * tokens, gpu, host,
        {"model": 2.0 * size.total}, read, parts, [f"--lengths {','.join(map(str, lengths))}", *how],
    )  # fmt: skip


def kept_evenly(config: Config, size: Size) -> Config:
    """The configuration with as many kept heads as its budget allows, over all layers, since the search has not been
    made: for counting. ``size``: with none kept."""
    budget, plain = config.attention.softmax_budget, replace(config.attention, softmax_budget=0.0)
    count = int(budget * size.kv_heads * size.linearized) if size.linearized == size.layers else 0
    heads = by_layer((i % size.layers, i // size.layers) for i in range(count))
    return replace(config, attention=replace(plain, softmax_heads=heads))


def passes_of_search(count: int) -> float:
    """Forward passes through all layers until ``count`` heads are chosen, and those of the curve up to there."""
    kept, passes = 0, 0.0
    while kept < count:
        added = min(added_at(kept, count), Settings().width)
        kept += added
        passes += 1 + 3 + (Settings().width + (added > 1)) / 2 + 1  # hidden states, slopes, candidates, right answers
        if kept > 1 and added == 1:  # each kept head, or the least steep ones, is left out once
            passes += min(kept, Settings().width) / 2 + 3 * (Settings().width < kept == count)
    return passes + 7  # the teacher's answers, the first slopes, a model without heads, the last hidden states


def streams_of_search(count: int) -> float:
    """How often all layers are brought to the GPU until ``count`` heads are chosen, with the curve up to there."""
    kept, streams = 0, 1.0
    while kept < count:
        added = min(added_at(kept, count), Settings().width)
        kept += added
        streams += 3 + (kept > 1 and added == 1)  # slopes, candidates, hidden states; all sets without a kept head
        streams += Settings().width < kept == count and added == 1  # slopes of the last of these sets
    return streams + 4  # the teacher's answers for both kinds of prompts, a model without heads, right answers


def chosen_search(plans: Sequence[Plan]) -> list[Plan]:
    """The longest prompts that fit and take at most ``PATIENCE``, otherwise the shortest that fit."""
    fitting = [plan for plan in plans if not plan.problems]
    return [next((plan for plan in fitting if plan.time <= PATIENCE), fitting[-1])] if fitting else []


def plan_export(size: Size, machine: Machine) -> list[Plan]:
    """The merged model, written file by file on the CPU."""
    weights = 2.0 * size.total
    steps = 2 * weights / machine.read_speed + weights / Guesses().merge
    host = {"processes": PROCESS, "a file and its copies": merging_memory(size)}
    disk = {"model": weights, "merged model": weights}
    plan = Plan(
        "export", "file by file", 0.0, {}, host, disk, weights, {"reading, merging, writing (estimated)": steps}
    )
    return [checked(plan, machine)]


def merging_memory(size: Size) -> float:
    """The tensors of a file, twice while it is written, a matrix of LoRA in fp32, feature maps and LoRA."""
    return (
        2.0 * max(FILE_BYTES, 2.0 * largest_tensor(size)) + 4.0 * largest_tensor(size) + 4.0 * (size.maps + size.lora)
    )


def largest_tensor(size: Size) -> float:
    """Parameters of the largest tensor."""
    return float(max(size.embedding, size.head, size.hidden * size.mlp / 2))


def path_line(plans: Sequence[Plan]) -> str:
    """The time of all steps together; what was never measured is said."""
    parts = ", ".join(f"{plan.stage} {plan.time / 3600:.1f}" for plan in plans)
    hours = sum(plan.time for plan in plans) / 3600
    return (
        f"All of it takes about {hours:.1f} hours ({parts}). Times of select, of stage 2 in 4 bits and of export are "
        "estimates: they were never measured."
    )


def what_would_fit(plans: Sequence[Plan]) -> str:
    """The GPU that stage 2 in 4 bits would fit on; empty if it fits here or was not planned."""
    if not plans or any(not plan.problems for plan in plans):
        return ""
    least = min(plans, key=lambda plan: plan.peak)
    return (
        f"In 4 bits, stage 2 fits on one GPU with {math.ceil(gpu_need(least.peak) / GIB)} GiB and "
        f"{math.ceil(sum(least.host.values()) * 1.1 / GIB)} GiB of host memory."
    )
