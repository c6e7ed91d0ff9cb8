"""How much memory is available."""

from __future__ import annotations

from pathlib import Path

import psutil


def free_host_memory() -> int:
    """Bytes of host memory still available: on the machine, or in the container if that is less."""
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no such container, or no limit
        return int(free)
    return int(min(free, limit - used))
