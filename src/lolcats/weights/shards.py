"""Where a model's weights come from when they are not all in memory: safetensors shards, or a loaded model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lolcats.errors import LolcatsError, first_line
from lolcats.weights.base import Base

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
READERS = 4  # threads that read tensors of one layer


class OtherNames(LolcatsError):
    """A checkpoint that names its tensors differently from the model, or is not in safetensors."""


class WeightSource(Protocol):
    """Gives tensors by their names in the model.

    ``ahead``: whether to read them in a thread before they are needed; otherwise they are created on the device.
    """

    ahead: bool

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        """Raise LolcatsError, naming file and tensor, if one of these (on the meta device, by shape) is missing."""

    def read(self, wanted: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Tensors of these shapes and dtypes: on ``device``, or in host memory if ``ahead`` (pinned for a GPU)."""


class Shards:
    """A directory of safetensors files as transformers writes it, or its copy in the hub's cache.

    Args:
        prefix: name of the decoder in the model, which tensor names in checkpoints may include or omit.
    """

    ahead = True

    def __init__(self, directory: Path, prefix: str = "model") -> None:
        self.directory, self.prefix = directory, f"{prefix}."
        self.files = _index(directory)

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        for file in sorted({self._find(name)[0] for name in wanted}):
            shapes = self._shapes(file)
            for name, tensor in wanted.items():
                place, stored = self._find(name)
                if place == file and shapes.get(stored) != list(tensor.shape):
                    raise LolcatsError(
                        f"{file}: tensor {stored} has shape {shapes.get(stored)}, expected {list(tensor.shape)}."
                    )

    def read(self, wanted: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        def one(name: str) -> Tensor:
            return self._read(name, wanted[name], pinned=device.type == "cuda")

        with ThreadPoolExecutor(READERS, initializer=use_device, initargs=(device,)) as pool:
            return dict(zip(wanted, pool.map(one, wanted), strict=True))

    def read_part(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Read indices start to stop of a tensor's dimension ``dim``, and nothing else of it."""
        file, stored = self._find(name)
        with _readable(file), safe_open(file, framework="pt") as opened:
            return opened.get_slice(stored)[*[slice(None)] * dim, start:stop]

    def _read(self, name: str, like: Tensor, pinned: bool) -> Tensor:
        file, stored = self._find(name)
        with _readable(file), safe_open(file, framework="pt") as opened:
            tensor = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
            return tensor.copy_(opened.get_tensor(stored))

    def _find(self, name: str) -> tuple[Path, str]:
        for stored in (name, name.removeprefix(self.prefix), f"{self.prefix}{name}"):
            if stored in self.files:
                return self.directory / self.files[stored], stored
        raise OtherNames(
            f"{self.directory}: tensor {name} is not in any of its safetensors files, so layers cannot be read from "
            "them one by one."
        )

    def _shapes(self, file: Path) -> dict[str, list[int]]:
        with _readable(file), safe_open(file, framework="pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


class Loaded:
    """The tensors of a model that is in host memory as a whole."""

    ahead = True

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def check(self, wanted: Mapping[str, Tensor]) -> None:
        if missing := [name for name in wanted if name not in self.tensors]:
            raise LolcatsError(f"The loaded model has no tensor {missing[0]} (missing tensors: {len(missing)}).")

    def read(self, wanted: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        return {name: self.tensors[name].to(like.dtype) for name, like in wanted.items()}


def use_device(device: torch.device) -> None:
    """Set a thread's GPU: otherwise pinned memory would involve GPU 0, whichever GPU the process uses."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def shards_of(base: Base, prefix: str) -> Shards:
    """The safetensors files of a directory or of a model of the hub (downloaded unless in the cache)."""
    if base.form == "directory":
        return Shards(Path(base.path), prefix)
    revision = base.fingerprint.removeprefix("commit ")
    try:
        place = snapshot_download(
            base.path, revision=None if revision == "None" else revision, allow_patterns=["*.safetensors", "*.json"]
        )
    except (OSError, ValueError) as error:
        raise LolcatsError(f"Cannot download the weights of {base.path} ({first_line(error)}).") from None
    return Shards(Path(place), prefix)


def _index(directory: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    if (directory / INDEX).exists():
        try:
            files = dict(json.loads((directory / INDEX).read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise LolcatsError(f"{directory / INDEX} is damaged ({type(error).__name__}: {error}).") from None
        for file in sorted(set(files.values())):
            if not (directory / file).exists():
                raise LolcatsError(f"{directory / file} is missing: {INDEX} lists it. Download the model again.")
        return files
    if not (directory / SINGLE).exists():
        raise OtherNames(
            f"{directory} has neither {INDEX} nor {SINGLE}: layers can be read one by one only from safetensors files."
        )
    with _readable(directory / SINGLE), safe_open(directory / SINGLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), SINGLE)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn errors of reading a weight file into a LolcatsError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise LolcatsError(f"{file} is missing. Download the model again.") from None
    except (SafetensorError, OSError) as error:
        raise LolcatsError(f"{file} is damaged or truncated ({error}). Download the model again.") from None
