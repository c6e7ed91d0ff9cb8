"""Generation speed and memory by batch size: the engine next to Hugging Face's ``generate`` on the teacher.

This is ``lolcats bench``, the paper's Figure 8. Everything is measured in one process on one device. A row is one
system at one batch size, with a prompt of random tokens for each sequence, greedy decoding, no stop tokens and no
text. *decode* is the time between the first and the last new token; *whole* includes the prefill. *peak* is the most
memory that PyTorch had allocated on the device while the system ran, the weights among it; on a CPU, the most that the
process has had so far. The peers run before the engine exists, so its states do not count in their peaks. The bound of
a step is the minimum time that the device needs for the weights (or their products) and the states, computed from the
model's own sizes.
"""

from __future__ import annotations

import gc
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Delta, Engine, Request
from lolcats.inference.engine.kept import BLOCK, keeps_keys, kept_layers
from lolcats.inference.engine.room import sequence_bytes
from lolcats.inference.engine.room import state_bytes as fixed_bytes
from lolcats.inference.engine.sampling import SamplingParams
from lolcats.modeling.cache import sliding_windows
from lolcats.modeling.classes import base_class
from lolcats.modeling.convert import convert
from lolcats.modeling.layer import linearized_layers

log = logging.getLogger(__name__)
Row = dict[str, Any]
PEERS: dict[str, str] = {
    "sdpa": "Hugging Face generate, SDPA",
    "static": "Hugging Face generate, static cache, compiled",
}
SHAPES: dict[str, dict[str, int]] = {
    "llama3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 320,
    },
}  # fmt: skip
SPARE = 3 << 30  # bytes to leave free next to the largest batch


@dataclass(frozen=True)
class Options:
    """What to measure.

    batches: batch sizes (0 = the largest that fits). new, peer_new: tokens to generate per sequence with the engine and
    with the peers. bandwidth, flops: bytes and operations per second of the device, for the bound. seconds: time limit;
    no run starts after it, and the current run is cut short; the peers get half of what is left for a batch. runs:
    number of runs per row, which the peers take in turns; the median of times and the highest peak are reported.
    """

    batches: tuple[int, ...] = (1, 16, 64)
    prompt: int = 128
    new: int = 4096
    peers: tuple[str, ...] = ()
    peer_new: int = 64
    state_dtype: torch.dtype = torch.float32
    runs: int = 1
    seconds: float = float("inf")
    bandwidth: float = 3.0e12
    flops: float = 782e12
    prefill_rows: int = 16


@dataclass
class Times:
    """When a generation began, when each step of all its sequences ended, and memory after 1,000 and after all steps.

    new: tokens generated for the last sequence; tokens: for all sequences together. peak: most bytes during the run.
    """

    began: float
    steps: list[float] = field(default_factory=list)
    new: int = 0
    tokens: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    @property
    def decode(self) -> float:
        """Seconds per step."""
        return (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1)

    @property
    def whole(self) -> float:
        return self.steps[-1] - self.began


def random_model(
    shape: str, attention: AttentionConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:  # fmt: skip
    """A linearized Llama of a real geometry with random weights, created directly on ``device``."""
    if shape not in SHAPES:
        raise LolcatsError(f"--random {shape}: expected one of {', '.join(SHAPES)}.")
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, tie_word_embeddings=shape != "llama3-8b")
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return convert(model.eval(), attention)


def linearized(model: PreTrainedModel, attention: AttentionConfig) -> PreTrainedModel:
    """The model, converted with untrained feature maps unless it is already linearized."""
    return model if hasattr(model.config, "lolcats") else convert(model, attention)


def plain_teacher(student: PreTrainedModel) -> PreTrainedModel:
    """The family's own softmax model, sharing its weights in memory with a linearized one."""
    from accelerate import init_empty_weights

    family = base_class(type(student))
    config = family.config_class.from_dict(
        {k: v for k, v in student.config.to_dict().items() if k not in ("lolcats", "base_model_type", "model_type")}
    )
    with init_empty_weights(include_buffers=False):
        teacher = family._from_config(config, dtype=student.dtype, attn_implementation="sdpa")
    weights = {name: x for name, x in student.state_dict().items() if ".lolcats." not in name}
    teacher.load_state_dict(weights, assign=True)
    teacher.tie_weights()
    teacher.generation_config.eos_token_id = None
    return teacher.to(student.device).eval()


def benchmark(student: PreTrainedModel, options: Options) -> Iterator[Row]:
    """Yield rows as they are measured. Rows that did not fit or came too late give the reason under ``missing``."""
    deadline = time.monotonic() + options.seconds
    about = describe(student, options)
    teacher = plain_teacher(student) if options.peers else None
    for batch in options.batches:
        peers: dict[str, Callable[[], Times]] = {}
        half = time.monotonic() / 2 + deadline / 2  # of the time that is left; the rest is the engine's
        if teacher is not None and batch:
            peers = {
                peer: partial(peer_times, teacher, batch, options, peer == "static", half) for peer in options.peers
            }
        measured = take_turns(peers, options.runs, half)
        with slots(student, batch, options) as engine:
            if isinstance(engine, Engine):
                batch = engine.table.slots
                measured |= take_turns(
                    {"engine": partial(engine_times, engine, options, deadline)}, options.runs, deadline
                )
            else:
                measured["engine"] = engine
            for name, result in measured.items():
                yield row(name, batch, result, student, engine, options, about)
        engine = "gone"  # free its memory for the next peers and the next one
        _collect(student.device)


@contextmanager
def slots(student: PreTrainedModel, batch: int, options: Options) -> Iterator[Engine | str]:
    """An engine with ``batch`` slots (0 = as many as fit), or the reason why there is none."""
    engine: Engine | str
    _collect(student.device)
    try:
        count = batch or most_slots(student, options)
        engine = Engine(
            student, None, count, piece(options), prefix_bytes=0, batch_sizes=[count], stop_tokens=(),
            state_dtype=options.state_dtype, prefill_rows=options.prefill_rows, context=longest(count, options),
            kept_bytes=count * slot_bytes(student, count, options),
        )  # fmt: skip
    except torch.OutOfMemoryError:
        engine = "out of memory"
    try:
        yield engine
    finally:
        if isinstance(engine, Engine):
            engine.close()
        del engine
        _collect(student.device)


def take_turns(systems: Mapping[str, Callable[[], Times]], runs: int, deadline: float) -> dict[str, list[Times] | str]:
    """The times of all runs by system, or the reason why there are none."""
    results: dict[str, list[Times] | str] = {name: [] for name in systems}
    for _ in range(runs):
        for name, measure in systems.items():
            done = results[name]
            if isinstance(done, str):
                continue
            if time.monotonic() > deadline:
                results[name] = done or "no time left"
                continue
            try:
                done.append(measure())
            except torch.OutOfMemoryError:
                results[name] = "out of memory"
            except LolcatsError as error:
                results[name] = str(error)
    return results


def longest(count: int, options: Options) -> int:
    """Tokens that the first of ``count`` sequences may have at the end, since it starts earlier than the last."""
    return options.prompt + options.new + count + 1


def piece(options: Options) -> int:
    return max(256, options.prompt)


def slot_bytes(student: PreTrainedModel, count: int, options: Options) -> int:
    """Bytes of kept keys for each of ``count`` sequences."""
    layers = kept_layers(student) if keeps_keys(student) else []
    return sequence_bytes(layers, student.dtype, longest(count, options) + 1, BLOCK, piece(options))


def most_slots(student: PreTrainedModel, options: Options) -> int:
    """The number of sequences that fit next to the weights, a multiple of 8."""
    if student.device.type != "cuda":
        raise LolcatsError("--batches max needs a GPU, whose free memory is known.")
    free, _ = torch.cuda.mem_get_info(student.device)
    config = student.config.get_text_config()
    logits = 2 * config.vocab_size * student.dtype.itemsize
    activations = options.prompt * 64 * config.hidden_size
    room = free - SPARE - options.prefill_rows * (2 * state_bytes(student, torch.float32) + activations)
    one, count = state_bytes(student, options.state_dtype) + logits, 0
    while True:  # the more sequences, the longer is the first
        fitting = max(1, room // (one + slot_bytes(student, count, options)) // 8 * 8)
        if fitting <= count or not keeps_keys(student):
            return fitting
        count = fitting


def token_bytes(student: PreTrainedModel) -> int:
    """Bytes that each token of a sequence adds: its keys and values in kept heads and layers that see all keys."""
    return sum(size for window, size in _kept_bytes(student) if not window)


def window_bytes(student: PreTrainedModel, tokens: int | None = None) -> int:
    """Bytes of a sequence's keys and values in layers that slide a window: of ``tokens`` tokens, or of any number."""
    return sum((window if tokens is None else min(window, tokens)) * size for window, size in _kept_bytes(student))


def _kept_bytes(student: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Of every layer the window (0 for none), and the bytes of a token's kept keys and values."""
    windows = sliding_windows(student.config)
    for entry in student.config.lolcats["layers"]:
        whole = entry["kind"] == "softmax"
        heads = entry["kv_heads"] if whole else len(entry.get("softmax_heads", ()))
        size = heads * (entry["head_dim"] + entry["value_dim"]) * student.dtype.itemsize
        yield windows.get(entry["layer"], 0) if whole else 0, size


def state_bytes(student: PreTrainedModel, dtype: torch.dtype, tokens: int = 0) -> int:
    """Bytes of state of one sequence: of any length, and the kept keys of ``tokens`` tokens."""
    return fixed_bytes(student, dtype) + window_bytes(student, tokens) + tokens * token_bytes(student)


def prompts(student: PreTrainedModel, batch: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    vocabulary = student.config.get_text_config().vocab_size
    tokens: list[list[int]] = torch.randint(vocabulary, (batch, length), generator=generator).tolist()
    return tokens


def engine_times(engine: Engine, options: Options, deadline: float) -> Times:
    """Fill all slots, then step until every sequence has its tokens; sequences that started earlier get a few more."""
    device, most = engine.model.device, options.new + engine.table.slots + 1
    _reset_peak(device)

    last: list[Delta] = []
    """Deltas that end a request: none has a reason to, but an error."""

    def note(delta: Delta) -> None:
        if delta.finish_reason is not None:
            last.append(delta)

    asked = prompts(engine.model, engine.table.slots, options.prompt)
    requests = [Request(prompt, SamplingParams(max_tokens=most), note, text=False) for prompt in asked]
    _synchronize(device)
    times = Times(time.perf_counter())
    for request in requests:
        engine.submit(request)
    while len(requests[-1].generated) < options.new:
        engine.step()
        if not engine.waiting:
            times.steps.append(time.perf_counter())
        if len(times.steps) == 1000:
            times.memory["1000"] = _memory(device)
        if last:
            raise LolcatsError(f"The engine failed: {last[0].error}")
        if time.monotonic() > deadline and len(times.steps) > 1:
            break
    times.memory["end"] = _memory(device)
    times.peak = _peak(device)
    times.new, times.tokens = len(requests[-1].generated), sum(len(request.generated) for request in requests)
    for request in requests:
        engine.cancel(request)
    return times


class Stopwatch:
    """A streamer for transformers that records the time of each token after the prompt, and stops at the deadline."""

    def __init__(self, times: Times, deadline: float) -> None:
        self.times, self.deadline, self.prompt = times, deadline, True

    def put(self, _: Any) -> None:
        if not self.prompt:
            self.times.steps.append(time.perf_counter())
        self.prompt = False

    def end(self) -> None:
        """Nothing to flush."""

    def late(self, ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """A stopping criterion."""
        late = time.monotonic() > self.deadline and len(self.times.steps) > 1
        return torch.full((len(ids),), late, device=ids.device)


def peer_times(teacher: Any, batch: int, options: Options, static: bool, deadline: float) -> Times:
    """Time Hugging Face's generate. With a static cache it compiles, so the first run is discarded."""
    ids = torch.tensor(prompts(teacher, batch, options.prompt), device=teacher.device)
    cache = {"cache_implementation": "static"} if static else {}

    def generate() -> Times:
        _reset_peak(teacher.device)
        _synchronize(teacher.device)
        times = Times(time.perf_counter())
        watch = Stopwatch(times, deadline)
        teacher.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.peer_new,
            min_new_tokens=options.peer_new, streamer=watch, stopping_criteria=[watch.late], pad_token_id=0, **cache,
        )  # fmt: skip
        times.peak = _peak(teacher.device)
        times.new, times.tokens = len(times.steps), batch * len(times.steps)
        return times

    if static:
        generate()
    return generate()


def row(
    name: str, batch: int, result: list[Times] | str, student: PreTrainedModel, engine: Engine | str, options: Options,
    about: Row,
) -> Row:  # fmt: skip
    """One line of the results."""
    own = name == "engine"
    state = state_bytes(student, options.state_dtype, options.prompt + options.new // 2)  # on average
    line: Row = {**about, "system": name, "batch": batch, "state_dtype": str(options.state_dtype)[6:] if own else None,
                 "key_maps": about["key_maps"] if own else None}  # fmt: skip
    if not result or isinstance(result, str):
        return {**line, "missing": result or "no time left"}
    seconds = statistics.median(times.decode for times in result)
    whole = statistics.median(times.tokens / times.whole for times in result)
    line |= {
        "new": min(times.new for times in result), "runs": len(result), "step_ms": 1e3 * seconds,
        "decode_tokens_per_second": batch / seconds, "whole_tokens_per_second": whole,
        "peak_bytes": max(times.peak for times in result),
    }  # fmt: skip
    if own:
        bound = bound_seconds(about, batch, state, options)
        line |= {
            "state_bytes": state_bytes(student, options.state_dtype), "token_bytes": token_bytes(student),
            "window_bytes": window_bytes(student),
            "bound_ms": 1e3 * bound, "share_of_bound": bound / seconds,
            "memory": result[-1].memory, "graphs": isinstance(engine, Engine) and engine.graphs is not None,
        }  # fmt: skip
    return line


def bound_seconds(about: Row, batch: int, state: int, options: Options) -> float:
    """Minimum time of one step: the longer of reading all weights and multiplying them, plus reading all states."""
    weights = max(about["weight_bytes"] / options.bandwidth, batch * 2 * about["weights"] / options.flops)
    return weights + batch * state / options.bandwidth


def describe(student: PreTrainedModel, options: Options) -> Row:
    """What all rows of a model have in common. ``weights`` counts only those that a token is multiplied with."""
    layers = linearized_layers(student)
    if not layers:
        raise LolcatsError("This model has no linearized layer.")
    layer, config = layers[0], student.config.get_text_config()
    used = {p.data_ptr(): p for m in student.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return {
        "family": getattr(student.config, "base_model_type", ""), "layers": config.num_hidden_layers,
        "heads": layer.geometry.heads, "kv_heads": layer.geometry.kv_heads, "head_dim": layer.geometry.head_dim,
        "hidden": config.hidden_size, "vocabulary": config.vocab_size, "dtype": str(student.dtype)[6:],
        "window": f"{layer.spec.kind}, {layer.spec.window} {layer.spec.window_size}, {layer.spec.sinks} sinks",
        "features": layer.phi_k.num_features, "prompt": options.prompt, "asked": options.new,
        "key_maps": "per_kv_head" if layer.maps < layer.geometry.heads else "per_query_head",
        "weights": sum(p.numel() for p in used.values()), "weight_bytes": sum(p.nbytes for p in used.values()),
        "bandwidth": options.bandwidth, "flops": options.flops,
        "device": torch.cuda.get_device_name(student.device) if student.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _memory(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
