"""What a base model in 4 bits, the search for heads and export cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lolcats.config import Config
from lolcats.modeling.merge import FILE_BYTES
from lolcats.plan.costs import (
    CONTEXT,
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
from lolcats.selection.select import PASS, Settings, heads_in_budget, passes_of_search, prompt_plan
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

    merge: float = 1e9
    """Bytes of weights per second into which a CPU merges LoRA."""


def nf4_bytes(size: Size) -> float:
    """Weights of a model whose decoder layers are in 4 bits; embedding and output layer stay in bf16."""
    return NF4_BYTES * size.decoder + 2.0 * (size.embedding + size.head)


def dequantized_bytes(size: Size) -> float:
    """What is read and written to turn all weights in 4 bits into bf16 once."""
    return (NF4_BYTES + 2.0) * size.decoder


def plan_quantized(size: Size, config: Config, machine: Machine, work: Work) -> list[Plan]:
    """Plans for stage 2 on a base model in 4 bits, which works on one GPU and without controls: with the recipe's loss
    and, if that is the cross-entropy, with the KL divergence from the teacher, which computes every batch once more."""
    if machine.gpus > 1 or config.controls:
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
    dequantized = micro_batches * (2 + teacher + again) * dequantized_bytes(size) / Speeds().dequantize
    seconds = {
        "computing": whole.seconds["computing"] + dequantized,
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
    speeds, longest = Speeds(), max(lengths)
    count = heads_in_budget(config.attention.softmax_budget or SHARE, size.kv_heads * size.linearized)
    tokens, passes = tokens_of_score(lengths), passes_of_search(count, 2 if form == "streamed" else 3)
    seconds = passes * tokens * sum(forward_operations(size, longest)) / speeds.search / speeds.matmul
    gpu, at_once = search_memory(size, machine, lengths, form)
    host: dict[str, float] = {"processes": PROCESS}
    read = 2.0 * size.total
    recorded = 2.0 * size.layers * tokens * size.hidden
    on_gpu = recorded_on_gpu(gpu, recorded, machine)
    (gpu if on_gpu else host)["hidden states"] = recorded
    if form == "4 bits":
        times = passes * batches_of(lengths, at_once)
        seconds += times * dequantized_bytes(size) / speeds.dequantize
        host["weights while loading"] = 4.0 * largest_tensor(size)
    elif form == "streamed":
        host |= {"a layer and the next": 4.0 * size.layer, "kept free": SPARE + on_gpu * recorded}
        room = machine.host_memory / HEADROOM - sum(host.values())
        host["weights that are kept"] = min(max(0.0, room), 2.0 * size.decoder)
        seconds += streams_of_search(count) * 2.0 * size.decoder / speeds.host_link
        read += (streams_of_search(count) - 1) * (2.0 * size.decoder - host["weights that are kept"])
    else:
        host["weights while loading"] = gpu["weights"]
    how = {"": [], "4 bits": ["--quantize nf4"], "streamed": ["--schedule stream"]}[form]
    parts = {"computing": seconds, "reading": read / machine.read_speed}
    return Plan(
        "select", ", ".join([f"prompts of {longest:,}", *([form] if form else [])]), passes * tokens, gpu, host,
        {"model": 2.0 * size.total}, read, parts, [f"--lengths {','.join(map(str, lengths))}", *how],
    )  # fmt: skip


def search_memory(
    size: Size, machine: Machine, lengths: Sequence[int], form: Form
) -> tuple[dict[str, float], int]:  # fmt: skip
    """GPU memory of a search without what it records, and how many tokens it passes at once: as many as fit, halved as
    ``lolcats select`` does."""
    at_once = PASS["cuda"]
    while True:
        gpu = _search_memory(size, lengths, form, at_once)
        if at_once <= max(lengths) or gpu_need(sum(gpu.values())) <= machine.gpu_memory:
            return gpu, at_once
        at_once //= 2


def _search_memory(size: Size, lengths: Sequence[int], form: Form, at_once: int) -> dict[str, float]:
    tokens = max(min(count, max(1, at_once // length)) * length for length, count in prompts_of(lengths).items())
    gpu = {"weights": 2.0 * size.total, "answers": 0.5 * GIB, "workspace": WORKSPACE}
    backward = 2.0 * tokens * (3 * size.mlp + 10 * size.hidden)  # of one layer: it and its gradients
    if form == "streamed":
        gpu["weights"] = 2.0 * (size.embedding + size.head + size.layer)
        sets = 2.0 * Settings().width * tokens_of_score(lengths) * size.hidden
        forward = 2.0 * tokens * (1.5 * size.mlp + 3 * size.hidden)
        return gpu | {"a layer, for slopes, or sets of heads": max(backward, sets + forward)}
    if form == "4 bits":
        gpu |= {"weights": nf4_bytes(size), "matrices in bf16": 2 * 2.0 * size.hidden * size.mlp / 2}
    return gpu | {"inputs of layers, for slopes": 2.0 * size.layers * tokens * size.hidden, "a layer": backward}


def recorded_on_gpu(gpu: Mapping[str, float], recorded: float, machine: Machine) -> bool:
    """Whether a search records what all layers put out on the GPU: if twice as much is free beside what it holds, and
    what it computes with fits there, too."""
    twice = 2 * recorded <= machine.gpu_memory - CONTEXT - gpu["weights"] - gpu["answers"]
    return twice and gpu_need(sum(gpu.values()) + recorded) <= machine.gpu_memory


def prompts_of(lengths: Sequence[int]) -> Counter[int]:
    """How many prompts of each length a search has."""
    return Counter(length for _, length in prompt_plan(lengths))


def tokens_of_score(lengths: Sequence[int]) -> int:
    return sum(length for _, length in prompt_plan(lengths))


def batches_of(lengths: Sequence[int], at_once: int = PASS["cuda"]) -> int:
    """Batches of one length in which all prompts pass through the model."""
    return sum(math.ceil(count / max(1, at_once // length)) for length, count in prompts_of(lengths).items())


def kept_evenly(config: Config, size: Size) -> Config:
    """The configuration with as many kept heads as its budget allows, over all layers, since the search has not been
    made: for counting. ``size``: with none kept."""
    budget, plain = config.attention.softmax_budget, replace(config.attention, softmax_budget=0.0)
    places = size.places
    count = heads_in_budget(budget, size.kv_heads * len(places)) if budget else 0
    kept = by_layer((places[i % len(places)], i // len(places)) for i in range(count))
    return replace(config, attention=replace(plain, softmax_heads=kept))


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
        f"All of it takes about {hours:.1f} hours ({parts}). The time of export is an estimate: it was never measured."
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
