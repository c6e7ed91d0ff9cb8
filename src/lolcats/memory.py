"""How much memory is available."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


def free_host_memory() -> int:
    """Bytes of host memory still available: on the machine, or in the container if that is less."""
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no such container, or no limit
        return int(free)
    return int(min(free, limit - used))


def device_room(device: torch.device) -> int:
    """Bytes of weights that ``device`` has room for: 90 % of a GPU's memory, or what is free on the host."""
    if device.type != "cuda":
        return free_host_memory()
    return int(0.9 * torch.cuda.get_device_properties(device).total_memory)


def weights_room(device: torch.device) -> int:
    """Bytes of weights that can be loaded to ``device`` through host memory."""
    return min(free_host_memory(), device_room(device))
