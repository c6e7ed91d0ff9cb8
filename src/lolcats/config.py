"""The one typed configuration: recipes (YAML), ``--set a.b=c`` and saved runs all resolve to a :class:`Config`.

Unknown keys, wrong types and impossible combinations raise :class:`LolcatsError` naming the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from lolcats.errors import LolcatsError

T = TypeVar("T")

PLACEMENT = ("order", "block_size", "chunk_tokens")  # of stage 1: where its work is done; they change no result
LATER = {"attention": {"feature_inputs": "rotated"}}
"""Settings that came when sweeps had results, at the value that they had had: there they are no part of a row's key."""

Kind = Literal["hybrid", "linear", "window", "softmax"]
Control = Literal["window_lora", "teacher_lora"]


@dataclass(frozen=True)
class AttentionConfig:
    """What replaces softmax attention, in every layer unless ``layers`` says otherwise."""

    kind: Kind = "hybrid"
    """``hybrid``: window + linear term; ``linear``: linear term over all keys; ``window``: window and sinks alone, a
    control; ``softmax``: the base model's own attention."""
    layers: dict[str, Kind] = field(default_factory=dict)
    """Exceptions by layer index or range, e.g. ``{"7": "softmax", "0-3": "linear"}``."""
    feature_map: Literal["hedgehog", "t2r", "exp", "elu"] = "hedgehog"
    feature_dim: int = 64
    """f, columns of the learned projection; hedgehog and exp have 2f features."""
    window: Literal["terraced", "sliding"] = "terraced"
    window_size: int = 64
    sinks: int = 4
    """First tokens of a sequence that every query sees through softmax. 0 is the paper."""
    key_maps: Literal["per_query_head", "per_kv_head"] = "per_query_head"
    gate_init: float = -2.1972
    """Start of g; γ = sigmoid(g) = 0.1 weighs the window against the linear term."""
    feature_inputs: Literal["rotated", "unrotated"] = "rotated"
    """What feature maps see: q and k behind RoPE (the paper), or as they are in front of it. Behind it, a student is
    worthless at positions that it was not trained at; see docs/theory/long_range.md."""
    decay: Literal["none", "retnet"] = "none"
    """Of kind ``linear``: ``retnet`` weighs what is m tokens old by (1 − 2^(−5−h))^m in head h."""
    normalizer: Literal["sum", "group_norm"] = "sum"
    """Of kind ``linear``: outputs are divided by the ``sum`` of weights, or go through a learned ``group_norm`` of each
    head instead. With t2r features and both of these attention is SUPRA's (arXiv 2405.06640, the LoLCATs paper's
    Eq. 12), except that here features come behind RoPE, and LoRA trains instead of all weights."""

    def __post_init__(self) -> None:
        _at_least(self, "attention", feature_dim=1, window_size=1, sinks=0)
        if self.sinks > self.window_size:
            raise LolcatsError(
                f"attention.sinks ({self.sinks}) must not exceed attention.window_size ({self.window_size})."
            )
        changed = [name for name, plain in (("decay", "none"), ("normalizer", "sum")) if getattr(self, name) != plain]
        if changed and "hybrid" in (self.kind, *self.layers.values()):
            raise LolcatsError(
                f"attention.{changed[0]}={getattr(self, changed[0])} is of linear attention alone: it needs "
                "attention.kind=linear, and no hybrid layer in attention.layers."
            )


@dataclass(frozen=True)
class DataConfig:
    """How records become packed rows of token ids."""

    format: Literal["auto", "alpaca", "chat", "text"] = "auto"
    text_column: str = "text"
    split: str = "train"
    """Split of a hub data set."""
    subset: str = ""
    """Configuration name of a hub data set that has several."""
    sequence_length: int = 1024
    validation_rows: int = 32
    """Packed rows held out to choose the best checkpoint."""
    test_rows: int = 32
    """Packed rows held out for the final table; nothing is chosen on them."""
    skip_broken: bool = False
    """Skip and count broken lines of a .jsonl file instead of stopping."""
    streaming: bool = False
    """Read a hub data set while it comes instead of downloading it first; meant with ``max_tokens``."""
    max_tokens: int = 0
    """Stop reading a source behind so many tokens; 0: read all of it."""
    reset_at_documents: bool = False
    """Documents packed into a row are sequences of their own: attention, softmax and linear, does not reach from one
    into the next. Off is the paper."""
    keep_longest_effective: float = 1.0
    """Train on this fraction of the training rows: those with the longest effective sequence length in the base model's
    attention (the paper's Eq. 9 and Table 15)."""

    def __post_init__(self) -> None:
        _at_least(self, "data", sequence_length=2, validation_rows=1, test_rows=1, max_tokens=0)
        if not 0 < self.keep_longest_effective <= 1:
            raise LolcatsError(
                f"data.keep_longest_effective must be above 0 and at most 1, not {self.keep_longest_effective}."
            )


@dataclass(frozen=True)
class StageConfig:
    """Optimization settings that both stages have."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 8
    """Rows an optimizer step."""
    micro_batch_size: int = 8
    """Rows in memory at a time; gradients are accumulated over batch_size / micro_batch_size of them."""
    epochs: float = 2.0
    max_steps: int = -1
    """Optimizer steps; -1 means ``epochs`` decides, 0 skips the stage."""
    max_grad_norm: float = 1.0
    schedule: Literal["reduce_on_plateau", "constant", "linear", "cosine"] = "reduce_on_plateau"
    warmup_steps: int = 0
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    min_learning_rate: float = 1e-5
    eval_steps: int = 100
    save_steps: int = 100
    log_steps: int = 10
    early_stopping_patience: int = 0
    """Evaluations without improvement before the stage stops; 0: never."""
    liger: bool = True
    """On CUDA, train with liger-kernel's fused layers and loss where it is installed and knows the family."""

    def __post_init__(self) -> None:
        name = "transfer" if isinstance(self, TransferConfig) else "finetune"
        _at_least(self, name, batch_size=1, micro_batch_size=1, eval_steps=1, save_steps=1, log_steps=1, max_steps=-1,
                  early_stopping_patience=0, warmup_steps=0, plateau_patience=0)  # fmt: skip
        if self.batch_size % self.micro_batch_size:
            raise LolcatsError(
                f"{name}.batch_size ({self.batch_size}) must be a multiple of "
                f"{name}.micro_batch_size ({self.micro_batch_size})."
            )
        if self.learning_rate <= 0:
            raise LolcatsError(f"{name}.learning_rate must be positive, not {self.learning_rate}.")


@dataclass(frozen=True)
class TransferConfig(StageConfig):
    """Stage 1, attention transfer: feature maps and γ learn the softmax attention's output."""

    learning_rate: float = 1e-2
    early_stopping_patience: int = 10
    mse_weight: float = 1000.0
    xent_weight: float = 0.0
    """Cross-entropy between attention weights (the paper's 405B used 1). Quadratic time in the sequence length."""
    window_dropout: float = 0.0
    """Probability with which a row of a training step hides window and sinks in all hybrid layers: there the linear
    term alone learns softmax attention over the keys that it has, those older than the window. Without, it is trained
    as far as the window leaves something to mend. After arXiv 2510.05901, which hides windows on a schedule."""
    coupling: Literal["joint", "per_layer"] = "joint"
    """Who shares gradient clip, mean loss, plateau, early stopping, best checkpoint: all layers (the paper) or none."""
    order: Literal["joint", "stream", "blocks"] = "joint"
    """Of the work, see docs/scale.md: the whole model in memory; layers streamed through it, a chunk of tokens at a
    time; blocks of layers, hidden states on disk. The last two need ``coupling: per_layer``."""
    block_size: int = 1
    """Layers in a block of ``order: blocks``."""
    chunk_tokens: int = 1_000_000
    """Tokens whose hidden states are in host memory at a time with ``order: stream``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "transfer", block_size=1, chunk_tokens=1)
        if not 0 <= self.window_dropout <= 1:
            raise LolcatsError(f"transfer.window_dropout is a probability, not {self.window_dropout}.")
        if self.order != "joint" and self.coupling != "per_layer":
            raise LolcatsError(
                f"transfer.order={self.order} trains each layer by itself: it needs transfer.coupling=per_layer, which "
                "gives each layer its own gradient clip, schedule, early stopping and best checkpoint."
            )


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """Stage 2, low-rank linearizing: LoRA on next-token loss."""

    learning_rate: float = 1e-4
    early_stopping_patience: int = 10
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Linear layers with LoRA. These four mean the attention's, whatever the family calls them (``qkv_proj``, ``dense``
    and so on); others are names of modules, e.g. ``gate_proj``."""
    use_dora: bool = False
    """DoRA: LoRA on the direction of each weight, its magnitude trained apart (Liu et al. 2024, arXiv 2402.09353)."""
    use_rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)."""
    quantize_base: Literal["none", "nf4"] = "none"
    """``nf4``: train LoRA on a base model in 4 bits (bitsandbytes, CUDA only), for memory. The adapter goes onto the
    untouched base model all the same."""
    feature_map_learning_rate: float = 0.0
    """Rate for feature maps and γ in stage 2; 0 keeps them frozen (the paper). Meant for runs without stage 1."""
    gradient_checkpointing: bool = False
    """Keep only each decoder layer's input for backward and compute the layer again: less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, "finetune", rank=1)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on besides the base model and the data themselves."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    controls: list[Control] = field(default_factory=list)
    """Trained beside the student with the same data, steps, seed and LoRA: ``window_lora`` (window and sinks, no linear
    term) and ``teacher_lora`` (softmax attention). They can be added to a finished run."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 on CUDA, float32 elsewhere."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model. Never on unless asked for."""
    report_to: list[str] = field(default_factory=list)
    """Trackers of transformers.Trainer, e.g. ``[tensorboard]`` or ``[wandb]``. A stage 1 of uncoupled layers or several
    processes does without the Trainer, and without them."""

    def __post_init__(self) -> None:
        if self.controls and self.finetune.quantize_base != "none":
            raise LolcatsError(
                "controls: they train on the base model as it is, which a student on a quantized one "
                "(finetune.quantize_base) cannot be compared with. Leave out one of the two."
            )
        if self.transfer.window_dropout and "hybrid" not in (self.attention.kind, *self.attention.layers.values()):
            raise LolcatsError(
                "transfer.window_dropout hides the window of hybrid attention, which "
                f"attention.kind={self.attention.kind} is not."
            )
        length, window = self.data.sequence_length, self.attention.window_size
        if self.attention.kind in ("hybrid", "window") and length < 2 * window:
            raise LolcatsError(
                f"data.sequence_length ({length}) is below two windows (2 × attention.window_size = {2 * window}): "
                "the linear term would have nothing to learn from. Use longer rows or a smaller window."
            )


def load_config(recipe: str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Resolve a recipe (a shipped name or a YAML file) and ``a.b=c`` overrides into a :class:`Config`.

    Raises:
        LolcatsError: an unknown recipe or key, a wrong type, or settings that cannot be together.
    """
    tree = _read_recipe(recipe or "default")
    for item in overrides:
        set_key(tree, *parse_setting(item))
    return from_dict(Config, tree)


def parse_setting(item: str) -> tuple[str, Any]:
    """``a.b=c`` as a dotted key and a value."""
    key, equals, text = item.partition("=")
    if not equals:
        raise LolcatsError(f"--set {item!r}: expected KEY=VALUE, for example transfer.learning_rate=1e-3.")
    return key.strip(), read_yaml(text, f"--set {key}")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes() if p.name.endswith(".yaml"))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_dict(cls: type[T], tree: Mapping[str, Any], path: str = "") -> T:
    """Build dataclass ``cls`` from ``tree``; unknown keys and wrong types are errors that name the key."""
    if not isinstance(tree, Mapping):
        raise LolcatsError(f"{path or 'configuration'}: expected a mapping, got {tree!r}.")
    hints = get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {path}{near[0]}?" if near else f" Known: {', '.join(known)}."
            raise LolcatsError(f"Unknown configuration key {path}{key}.{hint}")
    return cls(**{key: _coerce(hints[key], value, f"{path}{key}") for key, value in tree.items()})


def _coerce(hint: Any, value: Any, path: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{path}.")  # type: ignore[arg-type]
    if origin is Literal:
        options = get_args(hint)
        if value in options:
            return value
        raise LolcatsError(f"{path}: expected one of {', '.join(map(str, options))}, got {value!r}.")
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _coerce(next(a for a in get_args(hint) if a is not type(None)), value, path)
    if origin is list and isinstance(value, list):
        return [_coerce(get_args(hint)[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _coerce(get_args(hint)[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 1e-2 as a string
            return float(value)
        except (TypeError, ValueError):
            pass
    elif (hint is int and isinstance(value, int) and not isinstance(value, bool)) or (
        hint in (bool, str) and isinstance(value, hint)
    ):
        return value
    raise LolcatsError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}.")


def _at_least(config: Any, section: str, **minimum: int) -> None:
    for name, least in minimum.items():
        if getattr(config, name) < least:
            raise LolcatsError(f"{section}.{name} must be at least {least}, not {getattr(config, name)}.")


def _recipes() -> Iterable[Any]:
    return resources.files("lolcats.recipes").iterdir()


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe in recipe_names():
        text = resources.files("lolcats.recipes").joinpath(f"{recipe}.yaml").read_text()
    elif Path(recipe).is_file():
        text = Path(recipe).read_text()
    else:
        raise LolcatsError(f"Unknown recipe {recipe!r}: not a file, nor one of {', '.join(recipe_names())}.")
    tree = read_yaml(text, recipe) or {}
    if not isinstance(tree, dict):
        raise LolcatsError(f"Recipe {recipe}: expected a mapping of sections, got {type(tree).__name__}.")
    return tree


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers that are none are ValueErrors
        raise LolcatsError(f"{where}: not valid YAML ({error}).") from None


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise LolcatsError(f"--set {dotted}: {name} is a value, not a section.")
    tree[last] = value
