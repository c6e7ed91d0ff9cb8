"""Several gloo processes on this machine, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def forked() -> Any:
    """Processes forked from one that has everything loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lolcats.pipeline", "transformers.models.llama"])
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_torchrun(rank: int, size: int, port: int) -> None:
    """Make this process one of torchrun's."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)


def run_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(*arguments)`` in ``count`` processes; an error in one of them is raised here."""
    forked()
    start_processes(_enter, (count, free_port(), function, arguments), nprocs=count, start_method="forkserver")


def _enter(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    as_torchrun(rank, count, port)
    try:
        function(*arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
