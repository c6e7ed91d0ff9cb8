"""A converted model without weights whose decoder layers are loaded to the device a few at a time. No code per family.

The family's own decoder forward runs with a stub in place of each layer. The first stub receives the embeddings, and
each one receives the keywords (rotary embeddings, masks, positions) of its layer. They are the same for every batch of
a shape, unless rows hold several documents: then they follow from the positions of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.memory import free_host_memory
from lolcats.modeling.convert import convert
from lolcats.modeling.install import decoder, inputs_of
from lolcats.modeling.layer import LinearizedAttention
from lolcats.weights.base import Base, load_model
from lolcats.weights.shards import Loaded, OtherNames, WeightSource, shards_of, use_device

T = TypeVar("T")
Call = tuple[tuple[Any, ...], dict[str, Any]]
Placed = tuple[dict[str, Any], str, Tensor]
"""A parameter or buffer, with the dictionary of its module and the name under which that holds it."""


class Skeleton:
    """Args:
    model: converted, its base parameters on the meta device, feature maps and gates real.
    source: where the base parameters come from.
    device: where layers compute.
    """

    def __init__(self, model: PreTrainedModel, source: WeightSource, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.model, self.source, self.device = model, source, device
        self.width, self.dtype = 0, model.dtype  # of hidden states, known after the first embedding
        self.tuples = False  # whether layers return tuples, likewise
        self.path = layers_path(model)
        self.layers: Any = model.get_submodule(self.path)
        self._reader = ThreadPoolExecutor(1, initializer=use_device, initargs=(device,))
        self._coming: dict[int, Future[dict[str, Tensor]]] = {}
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._blank: list[Placed] = []
        source.check({name: p for i in range(-1, len(self.layers)) for name, p in self._wanted(i).items()})

    def attention(self, index: int) -> LinearizedAttention | None:
        """The linearized attention of layer ``index``; None if it has none."""
        found = [m for m in self.layers[index].modules() if isinstance(m, LinearizedAttention)]
        return found[0] if found else None

    def bytes(self, index: int) -> int:
        """Size of a layer's base weights; for index −1, of everything else in the decoder."""
        return sum(p.numel() * p.element_size() for p in self._wanted(index).values())

    def read_ahead(self, index: int) -> None:
        """Start reading layer ``index`` into host memory."""
        if self.source.ahead and index not in self._coming:
            wanted = self._wanted(index)
            self._coming[index] = self._reader.submit(self.source.read, wanted, self.device)

    def brought(self, indices: Sequence[int]) -> AbstractContextManager[None]:
        """Keep the base parameters and buffers of these layers on the device for the duration of the block."""
        return replaced([change for index in indices for change in self._on_device(index)])

    def _on_device(self, index: int) -> Iterator[Placed]:
        """The base parameters and buffers of a layer, on the device."""
        coming = self._coming.pop(index, None)
        tensors = coming.result() if coming else self.source.read(self._wanted(index), self.device)
        for module_name, module in self._modules(index):
            for place, name, before in own_tensors(module):
                tensor = tensors.pop(f"{module_name}.{name}", before.detach()).to(self.device, non_blocking=True)
                yield place, name, nn.Parameter(tensor, False) if isinstance(before, nn.Parameter) else tensor

    def bring_rest(self) -> None:
        """Bring all that is outside of the layers to the device, output head included, and what linearized layers add;
        it stays there."""
        self.model.tie_weights()
        inside = f"{self.path}."
        outside = {n: p for n, p in self.model.named_parameters() if p.is_meta and not n.startswith(inside)}
        if not outside:  # it was brought before
            return
        outside |= self._wanted(-1)
        self.source.check(outside)
        found = self.source.read(outside, self.device)
        brought = {id(like): found[name].to(self.device) for name, like in outside.items()}  # tied ones are one tensor
        for name, module in self.model.named_modules():
            if f"{name}.".startswith(inside):
                continue
            for place, own, like in list(own_tensors(module)):
                tensor = brought.get(id(like), like.detach()).to(self.device)
                place[own] = nn.Parameter(tensor, False) if isinstance(like, nn.Parameter) else tensor
        for index in range(len(self.layers)):
            if (layer := self.attention(index)) is not None:
                layer.to(self.device)

    @torch.no_grad()
    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, T) token ids on the device -> input of the first layer, (B, T, E). Call inside ``brought([-1])``.

        Args:
            positions: (B, T) position ids, which restart at 0 for each document; None if each row is one sequence.
        """
        hidden, calls, _ = self._stubbed(ids, positions)
        if positions is None:
            self._calls.setdefault((ids.shape[0], ids.shape[1]), calls)
        self.width, self.dtype = hidden.shape[-1], hidden.dtype
        return hidden

    def prepare(self, rows: Sequence[int], length: int) -> None:
        """Record the layers' keywords for batches of these sizes, and check that they do not depend on the tokens.

        Raises:
            LolcatsError: if they do.
        """
        missing = [n for n in rows if (n, length) not in self._calls]
        if not missing:
            return
        with self.brought([-1]):
            for n in missing:
                ids = torch.zeros(n, length, dtype=torch.long, device=self.device)
                self.embed(ids)
            _, others, _ = self._stubbed(ids + 1)
        self._check_same(self._calls[n, length], others, "the tokens")

    def prepare_packed(self, length: int) -> None:
        """Check that the layers' keywords for rows of several documents depend only on positions.

        Raises:
            LolcatsError: if they do not.
        """
        positions = (torch.arange(length, device=self.device) % ((length + 1) // 2))[None]
        ids = torch.zeros_like(positions)
        with self.brought([-1]):
            hidden = self.embed(ids, positions)
            _, first, _ = self._stubbed(ids, positions)
            _, others, _ = self._stubbed(ids + 1, positions)
        self._check_same(first, others, "the tokens")
        self._check_same(first, self.calls(hidden, positions), "weights outside of the layers")

    def _check_same(self, calls: list[Call], others: list[Call], cause: str) -> None:
        if not all(_same(a, b) for a, b in zip(calls, others, strict=True)):
            raise LolcatsError(
                f"{type(self.model).__name__} passes its layers an argument besides hidden states that depends on "
                f"{cause}, so they cannot be trained one by one: use transfer.order=joint."
            )

    def calls(self, hidden: Tensor, positions: Tensor | None = None) -> list[Call]:
        """Each layer's arguments besides hidden states (B, T, E); ``positions`` as in :meth:`embed`."""
        if positions is None:
            return self._calls[hidden.shape[0], hidden.shape[1]]
        with self._blanked():
            return self._stubbed(torch.zeros_like(positions), positions)[1]

    def _blanked(self) -> AbstractContextManager[None]:
        """For the block's duration, parameters outside of layers are zeros that take little memory, on the device."""
        if not self._blank:
            self._blank = [
                (place, name, self._zeros(t) if isinstance(t, nn.Parameter) else t.to(self.device))
                for _, module in self._modules(-1)
                for place, name, t in own_tensors(module)
            ]
        return replaced(self._blank)

    def run(self, index: int, hidden: Tensor, calls: list[Call]) -> Tensor:
        """Layer ``index`` on hidden states (B, T, E) with its arguments in ``calls``."""
        args, kwargs = calls[index]
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def _stubbed(
        self, ids: Tensor, positions: Tensor | None = None, tuples: bool = False
    ) -> tuple[Tensor, list[Call], list[Tensor]]:
        """Embeddings, each layer's further arguments, and the hidden states that reached each stub."""
        calls: list[Call] = []
        reached: list[Tensor] = []
        parent, _, name = self.path.rpartition(".")
        owner: Any = self.model.get_submodule(parent)
        setattr(owner, name, nn.ModuleList(_Stub(layer, calls, reached, tuples) for layer in self.layers))
        try:
            decoder(self.model)(**inputs_of(ids, positions))
        except (RuntimeError, TypeError, ValueError, IndexError):
            if tuples or not calls:
                raise
        finally:
            setattr(owner, name, self.layers)
        if not tuples and (len(calls) < len(self.layers) or any(h.shape != reached[0].shape for h in reached)):
            return self._stubbed(ids, positions, tuples=True)  # this family takes element 0 of what a layer returns
        self.tuples = tuples
        return reached[0], calls, reached

    def _modules(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        """Modules whose own tensors belong to layer ``index`` (−1: to no layer, output head excluded), by name."""
        root = f"{self.path}.{index}" if index >= 0 else _name(self.model, decoder(self.model))
        for name, module in self.model.get_submodule(root).named_modules(prefix=root):
            inside = f"{name}.".startswith(f"{self.path}.")
            if ".lolcats" not in name and (index >= 0 or not inside):
                yield name, module

    def _zeros(self, like: Tensor) -> nn.Parameter:
        zeros = torch.zeros(like.shape[-1:], dtype=like.dtype, device=self.device).expand(like.shape)
        return nn.Parameter(zeros, requires_grad=False)

    def _wanted(self, index: int) -> dict[str, Tensor]:
        """What files hold of a layer: its parameters, and buffers that are not computed."""
        return {
            f"{path}.{name}": tensor
            for path, module in self._modules(index)
            for _, name, tensor in own_tensors(module)
            if name not in module._non_persistent_buffers_set
        }


class _Stub(nn.Module):
    """Stands in for a layer, with its attributes: passes hidden states on and records the rest of the call."""

    def __init__(self, layer: nn.Module, calls: list[Call], reached: list[Tensor], tuples: bool) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.__dict__["_noted"] = (calls, reached, tuples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls, reached, tuples = self.__dict__["_noted"]
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        reached.append(hidden)
        calls.append((args, kwargs))
        return (hidden,) if tuples else hidden


def own_tensors(module: nn.Module) -> Iterator[Placed]:
    """The parameters and buffers of a module itself."""
    places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return ((place, name, tensor) for place in places for name, tensor in place.items() if tensor is not None)


@contextmanager
def replaced(tensors: Sequence[Placed]) -> Iterator[None]:
    """For the block's duration, put these tensors where they say."""
    before = [place[name] for place, name, _ in tensors]
    try:
        for place, name, tensor in tensors:
            place[name] = tensor
        yield
    finally:
        for (place, name, _), tensor in zip(tensors, before, strict=True):
            place[name] = tensor


def light_weights(model: nn.Module) -> AbstractContextManager[None]:
    """For the block's duration, replace each base weight on the meta device by one expanded element in host memory.

    PEFT creates LoRA matrices on the device of the base weights, and they must be initialized with real values.
    """
    return replaced([
        (place, name, nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=False))
        for module in model.modules()
        for place, name, p in own_tensors(module)
        if p.is_meta
    ])  # fmt: skip


def build_skeleton(
    base: Base, attention: AttentionConfig, dtype: torch.dtype, device: torch.device, seed: int, trust: bool = False
) -> Skeleton:  # fmt: skip
    """The skeleton of a base model, with the feature maps that :func:`convert` would give the loaded one."""
    if base.form == "gguf":  # its tensors are quantized and named differently: transformers reads it whole
        return _of_loaded(load_model(base, dtype, trust=trust), attention, dtype, device, seed, trust)
    model = empty_model(AutoConfig.from_pretrained(base.path, trust_remote_code=trust), dtype, trust)
    source = shards_of(base, model.base_model_prefix)
    torch.manual_seed(seed)
    convert_empty(model, attention)
    try:
        return Skeleton(model, source, device)
    except OtherNames as error:
        size, free = sum(p.numel() * p.element_size() for p in model.parameters()), free_host_memory()
        if size > free:
            raise LolcatsError(
                f"{error} transformers could rearrange them with the whole model in host memory, but it takes "
                f"{size / 2**30:.1f} GiB, and only {free / 2**30:.1f} GiB are free."
            ) from None
        return _of_loaded(load_model(base, dtype, trust=trust), attention, dtype, device, seed, trust)


def _of_loaded(
    whole: PreTrainedModel, attention: AttentionConfig, dtype: torch.dtype, device: torch.device, seed: int, trust: bool
) -> Skeleton:  # fmt: skip
    """The skeleton of a model that stays in host memory."""
    model = empty_model(whole.config, dtype, trust)
    torch.manual_seed(seed)
    convert_empty(model, attention)
    tensors = {name: t.detach() for name, t in (*whole.named_parameters(), *whole.named_buffers())}
    return Skeleton(model, Loaded(tensors), device)


def empty_model(config: Any, dtype: torch.dtype, trust: bool = False) -> PreTrainedModel:
    """A model of that configuration: parameters on the meta device, in the dtypes that loading would give them."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    keep = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        keep |= set(model._keep_in_fp32_modules or ())
    if keep:
        wide = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in sorted(keep)))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if wide.search(name):
                tensor.data = tensor.data.float()
    return model.eval().requires_grad_(False)


def convert_empty(model: PreTrainedModel, attention: AttentionConfig) -> PreTrainedModel:
    """:func:`convert` for a model of :func:`empty_model`."""
    return without_values(model, lambda: convert(model, attention))


def without_values(model: PreTrainedModel, run: Callable[[], T]) -> T:
    """``run()``, which probes a model of :func:`empty_model`: on the meta device or, if its family looks at values,
    with zeros that share memory."""
    own = [entry for module in model.modules() for entry in own_tensors(module)]

    def put(change: Callable[[Tensor], Tensor]) -> None:
        for place, name, tensor in own:
            place[name] = change(tensor)

    try:
        put(lambda t: t.to("meta") if not isinstance(t, nn.Parameter) else t)
        return run()
    except LolcatsError:
        if hasattr(model.config, "lolcats"):  # refused after probing
            raise
        zeros: dict[Any, Tensor] = {}
        put(lambda t: t if t.device.type != "meta" else nn.Parameter(_zeros(t, zeros), requires_grad=False))
        return run()
    finally:
        put(lambda t: t)


def _zeros(like: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """Zeros that take little memory: one element per matrix, one tensor per shape for stacks (strides matter)."""
    if like.ndim < 3:
        return torch.zeros((), dtype=like.dtype).expand(like.shape)
    key = (like.shape, like.dtype)
    if key not in known:
        known[key] = torch.zeros(like.shape, dtype=like.dtype)
    return known[key]


def layers_path(model: PreTrainedModel) -> str:
    """Name of the list of decoder layers: the one that contains all converted attention modules."""
    names = [entry["name"] for entry in model.config.lolcats["layers"]]
    parts = names[0].split(".")
    for end in range(len(parts), 0, -1):
        path = ".".join(parts[:end])
        if isinstance(model.get_submodule(path), nn.ModuleList) and all(n.startswith(f"{path}.") for n in names):
            return path
    raise LolcatsError(
        f"{type(model).__name__} does not keep its layers in a list, so they cannot be loaded one by one."
    )


def _name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _same(a: Any, b: Any) -> bool:
    """Whether two calls' arguments hold equal tensors."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return True
