"""Several gloo processes on this machine, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in ``count`` processes; an error in one of them is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_enter, (count, port, function, arguments), nprocs=count)


def _enter(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
