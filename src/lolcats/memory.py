"""How much memory a process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil


def free_host_memory() -> int:
    """Bytes that this process and its siblings may still take: of the machine, or of the container if that is less."""
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no such container, or no limit
        return int(free)
    return int(min(free, limit - used))
