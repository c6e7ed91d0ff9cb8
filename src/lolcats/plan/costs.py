"""Memory, disk and time of both stages, computed from sizes and a few measured speeds.

Memory is in bytes. Weights and activations are bf16 (2 bytes), feature maps, gates and LoRA fp32.
Units of the formulas: E hidden size, H query heads, G key/value heads, D head dim, F features, T tokens a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from lolcats.config import UNTRIED, Config, StageConfig
from lolcats.errors import LolcatsError
from lolcats.plan.size import Size

GIB = 2**30
WORKSPACE = 0.1 * GIB  # cuBLAS and small buffers: the rest of what stage 1 took in results/training.json
CONTEXT = 1.5 * GIB  # CUDA context and NCCL, outside PyTorch's allocator
SLACK = 1.05  # fragmentation: the allocator reserves more than is allocated
PROCESS = 4 * GIB  # host memory of one process with torch and CUDA loaded
PIECE = 1024  # tokens whose logits are in memory at a time (modeling/loss.py)
TOKENS = 512  # the same where stage 2 learns from the teacher (stages/finetune/distillation.py)
CHUNK = 1e6  # tokens per chunk of stream (hidden states in host memory), unless reading weights that often is too slow
GATHERED = 3  # decoder layers that FSDP2 holds unsharded: the current one, the next, and a receive buffer


@dataclass(frozen=True)
class Speeds:
    """Calibration of the plans: 8B on one H100 80GB, 2026-11-25, and 70B in 4 bits on one H200, 2026-11-30, both with
    feature maps after RoPE.

    ``python benchmarks/plan_speeds.py`` computes the values from ``benchmarks/results/training.json`` and
    ``large.json``, and a test compares them. Values that were not measured say so.
    """

    matmul: float = 782e12
    """Operations per second of the fastest bf16 matrix product, on one GPU (like all values below)."""
    memory: float = 3.0e12
    """GPU memory bandwidth in bytes per second."""
    forward: float = 0.804
    """Share of ``matmul`` that forward passes without gradients reach, including everything between the products."""
    training: float = 0.921
    """Share of ``matmul`` that the products of passes with gradients reach."""
    between_ns: float = 0.145
    """What lies between these products: ns per token, layer and hidden channel. Products grow with the square of the
    hidden size, so it matters less for larger models."""
    softmax: float = 0.5
    """Share of ``matmul`` that softmax attention reaches. Not measured separately."""
    transfer_ns: float = 5.27
    """Linear attention of stage 1 with its backward, by the kernels: ns per token, head and layer at D = F = 128."""
    finetune_ns: float = 4.72
    """Like ``transfer_ns``, for stage 2."""
    recomputed_layer: float = 2.51e-3
    """Seconds of recomputing a layer in stage 2, per micro-batch, beyond its matrix products: mostly host time."""
    chunked_ns: float = 47.8
    """Like ``transfer_ns``, on the chunked path."""
    sharded_layer: float = 10.7e-3
    """Minimum time in seconds of a sharded decoder layer, forward and backward, however little it computes: 8B on two
    and four H100, 2026-11-27 (``results/multi_gpu.json``)."""
    exposed: float = 0.5
    """Share of the time of gathering in which nothing is computed: 0.42 to 0.60 in profiles of 8B on two and four GPUs
    (``results/multi_gpu.md``, ``LOG.md``)."""
    dequantize: float = 1.71e12
    """Bytes per second that bitsandbytes reads and writes while it turns weights of 4 bits into bf16."""
    search: float = 0.753
    """Share of ``matmul`` that the passes of a search for heads reach."""
    link: float = 300e9
    """Bytes per second that a GPU receives in all-gathers within a node (NVLink). Assumed, not measured."""
    network: float = 40e9
    """The same between nodes (400 Gb/s per GPU). Assumed, not measured."""
    host_link: float = 50e9
    """Bytes per second from pinned host memory to a GPU (PCIe 5.0 x16). Assumed, not measured."""


@dataclass(frozen=True)
class Machine:
    """The available hardware. ``host_memory``, ``read_speed`` and ``disk`` are per node."""

    gpus: int = 1
    gpu_memory: float = 80 * GIB
    host_memory: float = 128 * GIB
    read_speed: float = 3e9
    disk: float = math.inf
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "host_memory", "read_speed", "disk", "gpus_per_node"):
            if not getattr(self, name) > 0:
                raise LolcatsError(f"{name.replace('_', ' ')} must be above 0, not {getattr(self, name):g}.")

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def ranks(self) -> int:
        """Processes per node."""
        return min(self.gpus, self.gpus_per_node)

    def gather_speed(self, speeds: Speeds) -> float:
        return speeds.link if self.nodes == 1 else speeds.network


@dataclass(frozen=True)
class Work:
    """The work to plan: the tokens that each stage trains on, counting repeated text every time."""

    transfer_tokens: float = 20e6
    finetune_tokens: float = 40e6
    block_size: int = 0
    """Layers per block in the schedule ``blocks`` (0 = as many as fit)."""

    def __post_init__(self) -> None:
        if self.transfer_tokens < 1 or self.finetune_tokens < 1 or self.block_size < 0:
            raise LolcatsError("The tokens of both stages must be at least 1 and the block size at least 0.")


ALL_LAYERS = "data.keep_longest_effective needs the whole model in memory"


@dataclass(frozen=True)
class Plan:
    """One way to run one stage. The parts of ``seconds`` overlap, so the longest one is the time."""

    stage: str
    schedule: str
    tokens: float
    gpu: dict[str, float]
    host: dict[str, float]
    disk: dict[str, float]
    read: float
    seconds: dict[str, float]
    settings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """Peak memory that PyTorch allocates on each GPU."""
        return sum(self.gpu.values())

    @property
    def time(self) -> float:
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])


def adam(parameters: float) -> float:
    """Bytes of fp32 weights, gradients and two moments."""
    return 16 * parameters


def forward_operations(size: Size, length: int) -> tuple[float, float]:
    """Operations per token of a forward pass through all decoder layers: (matrix products, softmax attention)."""
    return 2.0 * size.active, 2.0 * length * size.queries * size.head_dim * size.layers


def linear_attention(size: Size, nanoseconds: float) -> float:
    """Seconds of linear attention for one token in all layers."""
    return 1e-9 * nanoseconds * size.linearized * size.heads * size.features * size.head_dim / 128**2


def transfer_token(size: Size, config: Config, speeds: Speeds) -> float:
    """Seconds of stage 1 for one token on one GPU, in all layers, without waiting."""
    length = config.data.sequence_length
    products, attention = forward_operations(size, length)
    seconds = (products / speeds.forward + attention / speeds.softmax) / speeds.matmul
    seconds += linear_attention(size, speeds.transfer_ns if size.kernels else speeds.chunked_ns)
    if config.transfer.xent_weight:  # fp32 attention weights of both with gradients: about ten passes over T / 2
        seconds += 10 * 4 * (length / 2) * size.heads * size.linearized / speeds.memory
    return seconds


def finetune_token(size: Size, config: Config, speeds: Speeds, rows: int = 0) -> float:
    """Seconds of stage 2 for one token on one GPU. Frozen weights need no gradient: 4 operations each, not 6.

    rows: at a time; 0: those of ``config``.
    """
    products, attention = forward_operations(size, config.data.sequence_length)
    head = 4.0 * (size.head or size.embedding)
    kept = 1 - size.linearized * size.heads / (size.layers * size.queries)  # heads that stay softmax attention
    seconds = (2 * products + head) / speeds.training / speeds.matmul
    seconds += 1e-9 * speeds.between_ns * size.layers * size.hidden
    seconds += kept * 3.5 * attention / speeds.softmax / speeds.matmul
    slower = 1.0 if size.kernels else speeds.chunked_ns / speeds.transfer_ns
    seconds += linear_attention(size, slower * speeds.finetune_ns)
    if config.finetune.loss != "cross_entropy":  # the teacher's forward pass, through the head, too
        seconds += (products / speeds.forward + attention / speeds.softmax) / speeds.matmul
        seconds += head / 2 / speeds.forward / speeds.matmul
    if config.finetune.gradient_checkpointing:
        seconds += recomputing(size, config, speeds, rows or config.finetune.rows_at_once)
    return seconds


def recomputing(size: Size, config: Config, speeds: Speeds, rows: int) -> float:
    """Seconds of recomputing all layers for one token, with ``rows`` at a time. Recomputing ends once all activations
    are back, so the last product of an MLP is not made again."""
    products, _ = forward_operations(size, config.data.sequence_length)
    products -= size.layers * size.mlp * size.hidden  # mlp: gate and up; the last product has half as many channels
    each = size.layers * speeds.recomputed_layer / (rows * config.data.sequence_length)
    if not size.kernels:
        each += linear_attention(size, speeds.chunked_ns / 3)
    return products / speeds.forward / speeds.matmul + each


def with_evaluation(config: Config, stage: StageConfig) -> float:
    """Factor of training with validation over training alone: validation takes a third of the work per row."""
    return 1 + config.data.validation_rows / (3 * stage.eval_steps * stage.batch_size)


def transfer_activations(size: Size, rows: int, length: int) -> float:
    """Working memory of one layer in stage 1, without gradients through the layer itself."""
    channels = size.heads * size.head_dim
    mlp = 3 * size.hidden + 1.5 * size.mlp  # the layer's input, residual, norm; gate, up and their product
    if size.kernels:  # q, k, v, target, output, error, gradient; states of every 64 tokens and their gradients
        states = 2 * size.heads * size.features * size.head_dim / 64
        attention = 3 * size.hidden + 5 * channels + 4 * size.kv_heads * size.head_dim + states
    else:
        attention = (
            3 * size.hidden + 60 * channels
        )  # measured: autograd keeps the chunked path's fp32 features and weights
    if size.unrotated:  # x·W in fp32, which the kernels read
        attention += size.unrotated + 2 * size.heads * size.features
    return 2.0 * rows * length * max(mlp, attention)


def finetune_activations(size: Size, rows: int, length: int) -> float:
    """Activations that one decoder layer keeps for backward in stage 2, on average: inputs of norms and LoRA, q, k, v,
    output, gate and up; with feature maps before RoPE, their inputs too. The kernels keep 8 bits of what rounding the
    output lost, and the outputs of kept and linearized heads are kept as they are and put together."""
    channels = 2 * size.queries * size.head_dim + 2 * size.keys * size.head_dim
    lost = size.kernels * size.heads * size.head_dim / 2 * size.linearized / size.layers
    joined = size.queries * size.head_dim * size.parted / size.layers
    return 2.0 * rows * length * (3 * size.hidden + channels + lost + joined + size.unrotated + size.mlp)


def head_memory(size: Size, rows: int, length: int, config: Config) -> float:
    """Logits of one piece, their gradient in place (liger-kernel), and the gradient of the hidden states. To learn from
    the teacher, its hidden states, too, and five times the logits of a piece in fp32."""
    if config.finetune.loss != "cross_entropy":
        return 5 * 4.0 * min(TOKENS, rows * length) * size.vocabulary + 4.0 * rows * length * size.hidden
    return 2.0 * min(PIECE, rows * length) * size.vocabulary + 2.0 * rows * length * size.hidden


def rows_each(name: str, stage: StageConfig, ranks: int) -> list[int]:
    """Rows per micro-batch on each rank, divisors of the rank's share of a batch: the largest that ``micro_batch_size``
    allows; for ``auto`` all of them, largest first."""
    if stage.batch_size % ranks:
        options = [n for n in range(1, stage.batch_size + 1) if stage.batch_size % n == 0]
        raise LolcatsError(
            f"{name}.batch_size is {stage.batch_size} rows, which {ranks} GPUs cannot share equally. Use "
            f"{', '.join(map(str, options))} GPUs, or --set {name}.batch_size={-(-stage.batch_size // ranks) * ranks}."
        )
    each = stage.batch_size // ranks
    most = each if stage.micro_batch_size == "auto" else min(each, stage.micro_batch_size)
    options = [n for n in range(most, 0, -1) if each % n == 0]
    return options if stage.micro_batch_size == "auto" else options[:1]


def first_that_fits(plan_of: Callable[[int], Plan], options: Iterable[int], machine: Machine) -> Plan:
    """The plan with the first of these numbers of rows that fits into the GPU's memory; else the last."""
    for rows in options:
        plan = checked(plan_of(rows), machine)
        if gpu_need(plan.peak) <= machine.gpu_memory:
            break
    return plan


def share(stage: StageConfig, machine: Machine) -> int:
    """Rows per step of stage 1 on the GPU that has most of them, which the others wait for."""
    return -(-stage.batch_size // machine.gpus)


def plan_transfer(size: Size, config: Config, machine: Machine, work: Work, speeds: Speeds | None = None) -> list[Plan]:
    """Plans for the three schedules of stage 1, each with the problems that prevent it on this machine, if any."""
    speeds = speeds or Speeds()
    stage, each = config.transfer, share(config.transfer, machine)
    rows = min(stage.rows_at_once, each)
    plans = [checked(schedule(size, config, machine, work, speeds, rows), machine) for schedule in (stream, blocks)]
    if config.data.keep_longest_effective < 1:
        plans = [replace(plan, problems=[*plan.problems, ALL_LAYERS]) for plan in plans]
    whole = partial(joint, size, config, machine, work, speeds)
    if stage.micro_batch_size == "auto":
        return [first_that_fits(whole, [n for n in range(each, 0, -1) if each % n == 0], machine), *plans]
    smaller = [f"transfer.micro_batch_size={rows}"] if rows != stage.micro_batch_size else []
    return [replace(plan, settings=plan.settings + smaller) for plan in (checked(whole(rows), machine), *plans)]


def joint(size: Size, config: Config, machine: Machine, work: Work, speeds: Speeds, rows: int) -> Plan:
    """All layers at once on every GPU; ranks are data-parallel."""
    weights = 2.0 * size.total
    gpu = {
        "weights": weights, "feature maps, gradients, Adam": adam(size.maps),
        "activations": transfer_activations(size, rows, config.data.sequence_length), "workspace": WORKSPACE,
    }  # fmt: skip
    host = {"processes": PROCESS * machine.ranks, "weights while loading": weights * machine.ranks}
    compute = transfer_compute(size, config, machine, work, speeds)
    seconds = {"computing": compute, "reading": weights / machine.read_speed}
    disk = {"model": weights, "checkpoints": checkpoints(size.maps)}
    return Plan("stage 1", "joint", work.transfer_tokens, gpu, host, disk, weights, seconds)


def stream(size: Size, config: Config, machine: Machine, work: Work, speeds: Speeds, rows: int) -> Plan:
    """Layer by layer over a chunk of tokens, with its hidden states in host memory; then the next chunk."""
    step = config.transfer.batch_size * config.data.sequence_length
    held = config.data.validation_rows * config.data.sequence_length  # validation rows pass through with every chunk
    host = {
        "processes": PROCESS * machine.ranks, "a layer and the next": 2 * 2.0 * size.layer * machine.ranks,
        "feature maps, Adam, best": 16.0 * size.maps * machine.ranks,
    }  # fmt: skip
    room = machine.nodes * (0.9 * machine.host_memory - sum(host.values())) / (2 * size.hidden) - held
    compute = transfer_compute(size, config, machine, work, speeds)
    hides = (
        2 * 2.0 * size.decoder / machine.read_speed / (compute / work.transfer_tokens)
    )  # reading is half of computing
    chunk = step * max(1, int(min(max(CHUNK, hides), room, work.transfer_tokens) // step))
    host["hidden states of a chunk"] = 2.0 * size.hidden * (chunk + held) / machine.nodes
    chunks = math.ceil(work.transfer_tokens / chunk)
    read = chunks * 2.0 * size.decoder + 2.0 * size.embedding
    hidden = 4.0 * size.hidden * work.transfer_tokens * size.layers / machine.gpus  # into and out of every layer
    seconds = {
        "computing": compute + chunks * 2.0 * size.decoder / speeds.host_link,  # the copy of a layer does not overlap
        "reading": read / machine.read_speed,
        "copying": hidden / speeds.host_link,
    }
    disk = {"model": 2.0 * size.total, "feature maps, Adam, best": 16.0 * size.maps}
    gpu = layer_memory(size, config, rows, layers=1)
    settings = [f"transfer.chunk_tokens={chunk}"]
    return Plan("stage 1", "stream", work.transfer_tokens, gpu, host, disk, read, seconds, settings)


def blocks(size: Size, config: Config, machine: Machine, work: Work, speeds: Speeds, rows: int) -> Plan:
    """Blocks of k layers in turn, each over all tokens; hidden states at both ends of a block are stored on disk."""
    k = work.block_size or next(
        (k for k in range(size.layers, 0, -1)
         if gpu_need(sum(layer_memory(size, config, rows, k).values())) <= machine.gpu_memory), 1
    )  # fmt: skip
    k = min(k, size.layers)
    boundaries = math.ceil(size.layers / k) - 1
    hidden = 2.0 * size.hidden * work.transfer_tokens
    read = 2.0 * size.decoder + 2.0 * size.embedding + boundaries * hidden
    host = {
        "processes": PROCESS * machine.ranks, "a layer and the next": 2 * 2.0 * size.layer * machine.ranks,
        "feature maps, Adam, best": 16.0 * size.maps * machine.ranks,
    }  # fmt: skip
    disk = {
        "model": 2.0 * size.total, "hidden states at two boundaries": min(2, boundaries) * hidden,
        "feature maps, Adam, best": 16.0 * size.maps,
    }  # fmt: skip
    seconds = {
        "computing": transfer_compute(size, config, machine, work, speeds),
        "reading and writing": (read + boundaries * hidden) / machine.read_speed,
    }  # fmt: skip
    gpu, settings = layer_memory(size, config, rows, k), [f"transfer.block_size={k}"]
    return Plan("stage 1", f"blocks of {k}", work.transfer_tokens, gpu, host, disk, read, seconds, settings)


def paper_disk(size: Size, work: Work, block: int) -> float:
    """Disk space in the paper's cost model of block-wise training, which stores the input of every block."""
    return 2.0 * work.transfer_tokens * size.hidden * size.layers / block


def layer_memory(size: Size, config: Config, rows: int, layers: int) -> dict[str, float]:
    """GPU memory with ``layers`` layers of the model at a time."""
    length = config.data.sequence_length
    return {
        "weights": 2.0 * size.layer * layers,
        "embedding": 2.0 * size.embedding if layers > 1 else 0.0,  # the first block starts from token ids
        "feature maps, gradients, Adam": adam(size.maps / size.linearized * layers),
        "hidden states in and out": 4 * 2.0 * rows * length * size.hidden,
        "activations": transfer_activations(size, rows, length), "workspace": WORKSPACE,
    }  # fmt: skip


def transfer_compute(size: Size, config: Config, machine: Machine, work: Work, speeds: Speeds) -> float:
    """Seconds of computing, including validation and gradient all-reduces, which do not overlap with anything."""
    seconds = work.transfer_tokens * transfer_token(size, config, speeds) * with_evaluation(config, config.transfer)
    steps = work.transfer_tokens / (config.transfer.batch_size * config.data.sequence_length)
    reduced = 2 * 4.0 * size.maps * (machine.gpus - 1) / machine.gpus
    busy = config.transfer.batch_size / share(config.transfer, machine)
    return seconds / busy + steps * reduced / machine.gather_speed(speeds)


def checkpoints(parameters: float) -> float:
    """Bytes of two checkpoints (weights and moments) and the best weights."""
    return 2 * 12.0 * parameters + 4.0 * parameters


def plan_finetune(size: Size, config: Config, machine: Machine, work: Work, speeds: Speeds | None = None) -> list[Plan]:
    """Plans for stage 2 as in the recipe and with gradient checkpointing.

    On several GPUs, each comes with the whole base model on every GPU and with it sharded over all of them (FSDP2),
    unless ``finetune.sharding`` selects one.
    """
    recomputed = [True] if config.finetune.gradient_checkpointing is True else [False, True]
    variants = [
        replace(config, finetune=replace(config.finetune, gradient_checkpointing=again)) for again in recomputed
    ]
    forms = {"always": [True], "never": [False], "auto": [False, True]}[config.finetune.sharding]
    forms = forms if machine.gpus > 1 else [False]
    options = rows_each("finetune", config.finetune, machine.gpus)
    few = [rows for rows in options if rows <= UNTRIED] or options
    return [
        first_that_fits(
            partial(lora, size, variant, machine, work, speeds, sharded), few if sharded else options, machine
        )
        for sharded in forms
        for variant in variants
    ]


def lora(
    size: Size, config: Config, machine: Machine, work: Work, speeds: Speeds | None = None, sharded: bool = False,
    rows: int = 0,
) -> Plan:  # fmt: skip
    """LoRA with the whole base model on every GPU, or with it sharded over all of them.

    rows: per micro-batch on each GPU; 0: the most that ``finetune.micro_batch_size`` allows.
    """
    speeds, stage, length, ranks = speeds or Speeds(), config.finetune, config.data.sequence_length, machine.gpus
    rows = rows or rows_each("finetune", stage, ranks)[0]
    weights = 2.0 * size.total
    held = weights
    if sharded:
        held = weights / ranks if size.head else 2.0 * (size.decoder / ranks + size.embedding)  # tied: not sharded
    layer, trains_maps = finetune_activations(size, rows, length), stage.feature_map_learning_rate > 0
    kept = 2.0 * rows * length * size.hidden if stage.gradient_checkpointing else layer
    gathered = GATHERED * 2.0 * size.layer if sharded else 0.0
    in_backward = gathered + (layer if stage.gradient_checkpointing else 0) + 2.0 * rows * length * size.mlp
    in_head = head_memory(size, rows, length, config) + (2.0 * (size.head + size.layer) if sharded else 0)
    gpu = {
        "weights": held, "feature maps": adam(size.maps) if trains_maps else 4.0 * size.maps,
        "LoRA, gradients, Adam": adam(size.lora), "activations kept for backward": kept * size.layers,
        "gathered layers or logits": max(in_backward, in_head), "workspace": WORKSPACE,
    }  # fmt: skip
    loading = 2.0 * max(size.embedding, size.head, size.layer) if sharded else weights
    host = {"processes": PROCESS * machine.ranks, "weights while loading": loading * machine.ranks}
    token = finetune_token(size, config, speeds, rows)
    seconds = {"computing": work.finetune_tokens * token / ranks * with_evaluation(config, stage)}
    if ranks > 1:  # once per step, without overlap
        trained = size.lora + (size.maps if trains_maps else 0)
        steps = work.finetune_tokens / (stage.batch_size * length)
        seconds["computing"] += steps * 2 * 4.0 * trained * (ranks - 1) / ranks / machine.gather_speed(speeds)
    if sharded:  # every micro-batch gathers the weights in each forward pass and again in backward
        micro_batches = work.finetune_tokens / (rows * length * ranks)
        passes = 2 if stage.loss == "cross_entropy" else 3
        gathers = passes * weights * (ranks - 1) / ranks
        seconds["gathering"] = micro_batches * gathers / machine.gather_speed(speeds)
        seconds["computing, waiting for shards"] = seconds["computing"] + speeds.exposed * seconds["gathering"]
        seconds["handling shards"] = micro_batches * size.layers * speeds.sharded_layer
    seconds["reading"] = weights / machine.read_speed
    disk = {"model": weights, "checkpoints": checkpoints(size.lora), "merged model": weights}
    settings = ["finetune.gradient_checkpointing=true"] if stage.gradient_checkpointing else []
    settings += [f"finetune.micro_batch_size={rows}"] if rows != stage.micro_batch_size != "auto" else []
    settings += [f"finetune.sharding={'always' if sharded else 'never'}"] if ranks > 1 else []
    form = "sharded (FSDP2)" if sharded else "whole on each GPU" if ranks > 1 else "one GPU"
    form += ", recomputed" if stage.gradient_checkpointing else ""
    return Plan("stage 2", form, work.finetune_tokens, gpu, host, disk, weights, seconds, settings)


def gpu_need(peak: float) -> float:
    """Memory that a GPU needs for a peak of allocated bytes."""
    return peak * SLACK + CONTEXT


def checked(plan: Plan, machine: Machine) -> Plan:
    """The plan with the problems that prevent it on this machine."""
    needs = (
        ("GPU memory", gpu_need(plan.peak), machine.gpu_memory, plan.gpu),
        ("host memory", sum(plan.host.values()), machine.host_memory, plan.host),
        ("disk", sum(plan.disk.values()), machine.disk, plan.disk),
    )
    problems = [
        f"{name}: needs {need / GIB:.0f} GiB (most for {max(parts, key=parts.__getitem__)}), has {have / GIB:.0f} GiB"
        for name, need, have, parts in needs
        if need > have
    ]
    return replace(plan, problems=problems)


def enough_gpus(size: Size, config: Config, machine: Machine, work: Work) -> tuple[int, Plan] | None:
    """The smallest power of two of these GPUs that stage 2 fits on, ignoring host memory and disk, and its plan."""
    for gpus in (2**n for n in range(11)):
        stage = replace(config.finetune, batch_size=max(config.finetune.batch_size, gpus), micro_batch_size=1)
        stage = replace(stage, batch_size=-(-stage.batch_size // gpus) * gpus)
        larger = replace(machine, gpus=gpus, host_memory=math.inf, disk=math.inf)
        for plan in plan_finetune(size, replace(config, finetune=stage), larger, work):
            if not plan.problems:
                return gpus, plan
    return None
