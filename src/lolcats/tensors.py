"""Tensors in safetensors files: atomic writes with a checksum, and strict loading with errors that name them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.files import give_usual_mode, partial_path

CHECKSUM = "lolcats_sha256"  # key in a safetensors file's metadata


def write_tensors(
    tensors: dict[str, Tensor], path: Path, beside: str = "", more: dict[str, str] | None = None
) -> None:  # fmt: skip
    """Write a safetensors file atomically, with a checksum.

    beside: checksum of a file next to it, stored with its own; more: further metadata.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    written = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    # Only one entry: the order of several is random, and equal tensors should give equal files.
    save_file(written, partial, metadata={CHECKSUM: f"{tensor_hash(written)} {beside}".strip(), **(more or {})})
    give_usual_mode(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, and verify its checksum if it has one."""
    try:
        known, _ = read_checksums(path)
        tensors = load_file(path)
    except FileNotFoundError:
        raise LolcatsError(f"{path} is missing.") from None
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise LolcatsError(f"{path} is damaged or truncated ({error}).") from None
    if known and known != tensor_hash(tensors):
        raise LolcatsError(f"{path} is damaged: the checksum of its tensors does not match.")
    return tensors


def read_checksums(path: Path) -> tuple[str, str]:
    """Checksums of a safetensors file's tensors and of the file next to it; empty if not stored."""
    with safe_open(path, "pt") as file:
        own, _, beside = (file.metadata() or {}).get(CHECKSUM, "").partition(" ")
    return own, beside


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and values of contiguous tensors on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LolcatsError(f"{path} is damaged or truncated ({error}).") from None


def load_strictly(target: dict[str, Tensor], source: dict[str, Tensor], path: Path) -> None:
    """Copy ``source`` into the tensors of ``target``; raise an error that names a missing, extra or mis-shaped one."""
    compare_keys(set(target), set(source), path)
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise LolcatsError(
                f"{path}: tensor {name} has shape {tuple(source[name].shape)}, expected {tuple(tensor.shape)}."
            )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def compare_keys(expected: set[str], found: set[str], path: Path) -> None:
    if missing := sorted(expected - found):
        raise LolcatsError(f"{path}: tensor {missing[0]} is missing (missing tensors: {len(missing)}).")
    if extra := sorted(found - expected):
        raise LolcatsError(f"{path}: unexpected tensor {extra[0]} (unexpected tensors: {len(extra)}).")
