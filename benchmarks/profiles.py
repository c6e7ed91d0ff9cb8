"""One step under torch.profiler, in a few numbers: what the host and the GPU did, and what communication was hidden."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import common
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 12  # names of each list
COMMUNICATION = "nccl"  # in the names of its kernels
ANNOTATIONS = ("FSDP::", "nccl:", "ProfilerStep")  # on the GPU's time line, but no kernels

Span = tuple[float, float]


def profiled(step: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds of a second ``step``. Where the GPU is not busy it waits for the host.

    ``communication_hidden``: share of the time of NCCL's kernels in which another kernel ran as well.
    """
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    step()
    common.synchronize(device)
    with profile(activities=kinds) as profiler:
        step()
        common.synchronize(device)
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    kernels = [e for e in events if not (e.is_user_annotation or e.name.startswith(ANNOTATIONS))]
    busy = [(e.name, (e.time_range.start / 1e3, e.time_range.end / 1e3)) for e in kernels]
    averages = profiler.key_averages()
    host = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:MOST]
    on_device = sorted(averages, key=lambda e: -e.self_device_time_total)[:MOST]
    return spans(busy) | {
        "hooks": hooks(averages),
        "host": [[e.key[:90], e.count, e.self_cpu_time_total / 1e3] for e in host],
        "gpu": [[e.key[:90], e.count, e.self_device_time_total / 1e3] for e in on_device if e.self_device_time_total],
    }


def hooks(averages: Iterable[Any]) -> list[list[Any]]:
    """Calls and milliseconds on the host of FSDP2's hooks over all units; some call others."""
    found: dict[str, list[float]] = {}
    for event in averages:
        if event.key.startswith("FSDP::"):
            name = re.split(r" for | \(", event.key)[0]
            calls, time = found.get(name, (0, 0.0))
            found[name] = [calls + event.count, time + event.cpu_time_total / 1e3]
    return [[name, *values] for name, values in sorted(found.items(), key=lambda item: -item[1][1])]


def spans(kernels: list[tuple[str, Span]]) -> dict[str, float]:
    """From first to last kernel: how long, how much of it the GPU was busy, with what, how much of that together."""
    communication = union(span for name, span in kernels if COMMUNICATION in name.lower())
    computing = union(span for name, span in kernels if COMMUNICATION not in name.lower())
    everything = union(span for _, span in kernels)
    together = total(communication) + total(computing) - total(everything)
    return {
        "milliseconds": everything[-1][1] - everything[0][0] if everything else 0.0,
        "busy": total(everything), "computing": total(computing), "communication": total(communication),
        "communication_hidden": together / total(communication) if communication else 0.0,
    }  # fmt: skip


def union(intervals: Iterable[Span]) -> list[Span]:
    """The same points in intervals that do not touch, in order."""
    merged: list[Span] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def total(intervals: list[Span]) -> float:
    return sum(end - start for start, end in intervals)
