"""The one typed configuration: recipes (YAML), ``--set a.b=c`` and saved runs all resolve to a :class:`Config`.

Unknown keys, wrong types and impossible combinations raise a :class:`LolcatsError` that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from lolcats.errors import LolcatsError
from lolcats.ranges import check_ranges

T = TypeVar("T")

LISTED_HEADS, BUDGET = "attention.softmax_heads", "attention.softmax_budget"
PLACEMENT = {"transfer": ("order", "block_size", "chunk_tokens", "cuda_graph"), "finetune": ("sharding", "cuda_graph")}
"""Settings that decide where and how a stage is computed; they do not change its result, but for rounding."""

UNTRIED = 4
"""Maximum rows of ``micro_batch_size: auto`` where it is not tried how many fit."""

REMOVED: dict[tuple[str, str], Any] = {("transfer", "window_dropout"): 0.0, ("finetune", "compile"): False}
"""Settings that only older versions have, each with the value at which it changes nothing. That value is still read and
still part of what identifies a run; any other value is refused."""

Kind = Literal["hybrid", "linear", "window", "softmax"]
Control = Literal["window_lora", "teacher_lora"]


@dataclass(frozen=True)
class AttentionConfig:
    """What replaces softmax attention, in every layer unless ``layers`` says otherwise."""

    kind: Kind = "hybrid"
    """``hybrid``: softmax over window and sinks, plus the linear term over older keys; ``linear``: the linear term over
    all keys; ``window``: only window and sinks; ``softmax``: the base model's own attention."""
    layers: dict[str, Kind] = field(default_factory=dict)
    """Layers of another kind, by index or range, e.g. ``{"7": "softmax", "0-3": "linear"}``."""
    softmax_heads: dict[str, list[int]] = field(default_factory=dict)
    """Key/value heads that stay the base model's softmax attention, with the query heads that use them, by layer, e.g.
    ``{"23": [0], "14": [0, 1]}``. Their keys and values are kept for every token."""
    softmax_budget: float = 0.0
    """Choose ``softmax_heads`` by measurement (``lolcats select``): this share of the key/value heads that would be
    linearized, rounded down but at least one; 0.125 keeps an eighth (0 = none, or those of ``softmax_heads``)."""
    feature_map: Literal["hedgehog", "t2r", "exp", "elu"] = "hedgehog"
    """Feature map φ of the linear term; docs/theory/method.md has the formulas."""
    feature_dim: int = 64
    """Columns f of the learned projection of ``hedgehog`` and ``exp``, which have 2f features. Other maps ignore it."""
    window: Literal["terraced", "sliding"] = "terraced"
    """``terraced``: the query's own block of ``window_size`` tokens and the whole block before it; ``sliding``: the
    last ``window_size`` tokens."""
    window_size: int = 64
    sinks: int = 4
    """Number of first tokens of a sequence that every query sees through softmax. The paper uses 0."""
    key_maps: Literal["per_query_head", "per_kv_head"] = "per_query_head"
    """Key feature maps: one per query head (the paper), or one per key/value head, which makes states smaller."""
    gate_init: float = -2.1972
    """Initial value of g. γ = sigmoid(g), initially 0.1, weighs the window against the linear term."""
    feature_inputs: Literal["rotated", "unrotated"] = "rotated"
    """Whether feature maps see q and k after RoPE (the paper) or before it. After RoPE, a student is useless at
    positions it was not trained at; see docs/theory/long_range.md."""
    decay: Literal["none", "retnet"] = "none"
    """For kind ``linear``: ``retnet`` weights a token that is m tokens old by (1 − 2^(−5−h))^m in head h."""
    normalizer: Literal["sum", "group_norm"] = "sum"
    """For kind ``linear``: ``sum`` divides each output by the sum of its weights; ``group_norm`` applies a learned
    group norm per head instead. Together with ``feature_map: t2r`` and ``decay: retnet`` this is SUPRA's attention
    (arXiv 2405.06640, Eq. 12 of the LoLCATs paper), except that feature maps see q and k after RoPE and LoRA is trained
    instead of all weights."""

    def __post_init__(self) -> None:
        check_ranges(self, "attention")
        for name in ("layers", "softmax_heads"):  # numbers of layers may be given as such
            object.__setattr__(self, name, {str(key): value for key, value in getattr(self, name).items()})
        if self.sinks > self.window_size:
            raise LolcatsError(
                f"attention.sinks ({self.sinks}) must not exceed attention.window_size ({self.window_size})."
            )
        if self.softmax_budget and self.softmax_heads:
            raise LolcatsError(
                "attention.softmax_budget chooses the heads that attention.softmax_heads lists: set one of the two."
            )
        changed = [name for name, plain in (("decay", "none"), ("normalizer", "sum")) if getattr(self, name) != plain]
        if changed and "hybrid" in (self.kind, *self.layers.values()):
            raise LolcatsError(
                f"attention.{changed[0]}={getattr(self, changed[0])} only works with linear attention: set "
                "attention.kind=linear, with no hybrid layer in attention.layers."
            )

    @property
    def has_linear(self) -> bool:
        """Whether layers with a linear term are configured."""
        return not {"hybrid", "linear"}.isdisjoint([self.kind, *self.layers.values()])


@dataclass(frozen=True)
class DataConfig:
    """How records become packed rows of token ids."""

    format: Literal["auto", "alpaca", "chat", "completion", "text"] = "auto"
    """How a record becomes text; ``auto`` chooses by the columns of the first record."""
    text_column: str = "text"
    """Column that holds the text of a record with ``format: text``."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str = ""
    """Configuration name of a hub data set that has several."""
    sequence_length: int = 1024
    """Tokens per packed row."""
    validation_rows: int = 32
    """Number of packed rows held out to choose the best checkpoint. If the data is too small for the default, fewer are
    held out, at most a tenth of all rows; any other number is kept, or refused."""
    test_rows: int = 32
    """Number of packed rows held out for the final table; they are not used to choose anything. For little data, as
    with ``validation_rows``."""
    skip_broken: bool = False
    """Skip and count records that cannot be used instead of stopping: broken lines of a .jsonl file, broken records of
    other files, text that is not Unicode, and conversations that the chat template cannot render."""
    streaming: bool = False
    """Read a hub data set while it downloads instead of downloading it first. Meant to be used with ``max_tokens``."""
    max_tokens: int = 0
    """Stop reading a source after this many tokens (0 = read all of it)."""
    reset_at_documents: bool = False
    """Treat the documents packed into a row as separate sequences: neither softmax nor linear attention reaches from
    one into the next. Off in the paper."""
    loss: Literal["all", "completion"] = "all"
    """The tokens that stage 2 learns to predict: ``all``, or only those of a ``completion``: the output of an
    instruction, the answers of a conversation."""
    keep_longest_effective: float = 1.0
    """Train only on this fraction of the training rows, those with the longest effective sequence length in the base
    model's attention (Eq. 9 and Table 15 of the paper)."""

    def __post_init__(self) -> None:
        check_ranges(self, "data")


@dataclass(frozen=True)
class StageConfig:
    """Optimization settings that both stages share."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 8
    """Rows per optimizer step."""
    micro_batch_size: int | Literal["auto"] = 8
    """Rows per forward and backward pass; gradients are accumulated until ``batch_size`` rows are done. ``auto``: on a
    GPU, as many as fit into its memory, tried before the first step; at most 4 on a CPU, with a sharded base model, and
    in stage 1 with ``transfer.order`` other than ``joint``. A run keeps the number that it began with."""
    epochs: float = 2.0
    """Passes over the training rows, if ``max_steps`` is -1."""
    max_steps: int = -1
    """Number of optimizer steps (-1 = as many as ``epochs`` takes, 0 = skip the stage)."""
    max_grad_norm: float = 1.0
    """Clip gradients to this norm (0 = no clipping)."""
    schedule: Literal["reduce_on_plateau", "constant", "linear", "cosine"] = "reduce_on_plateau"
    """Learning rate schedule; ``linear`` and ``cosine`` decay to 0."""
    warmup_steps: int = 0
    """Linear warmup steps. ``reduce_on_plateau`` has no warmup."""
    plateau_factor: float = 0.1
    """Factor by which ``reduce_on_plateau`` multiplies the learning rate."""
    plateau_patience: int = 10
    """Evaluations without improvement that ``reduce_on_plateau`` tolerates before it reduces the learning rate."""
    min_learning_rate: float = 1e-5
    """Lower bound of the learning rate with ``reduce_on_plateau``."""
    eval_steps: int = 100
    """Optimizer steps between evaluations on the validation rows."""
    save_steps: int = 100
    """Optimizer steps between checkpoints."""
    log_steps: int = 10
    """Optimizer steps between logged training losses."""
    early_stopping_patience: int = 0
    """Stop the stage after this many evaluations without improvement (0 = never)."""
    liger: bool = True
    """On CUDA, train with liger-kernel's fused layers and loss if it is installed and supports the model's family."""

    def __post_init__(self) -> None:
        name = "transfer" if isinstance(self, TransferConfig) else "finetune"
        check_ranges(self, name)
        if self.batch_size % self.rows_at_once:
            raise LolcatsError(
                f"{name}.batch_size ({self.batch_size}) must be a multiple of "
                f"{name}.micro_batch_size ({self.micro_batch_size})."
            )

    @property
    def rows_at_once(self) -> int:
        """``micro_batch_size``; for ``auto``, the number of rows where it is not tried how many fit."""
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        return max(rows for rows in range(1, min(UNTRIED, self.batch_size) + 1) if self.batch_size % rows == 0)


@dataclass(frozen=True)
class TransferConfig(StageConfig):
    """Stage 1, attention transfer: train feature maps and γ to reproduce the output of softmax attention."""

    learning_rate: float = 1e-2
    early_stopping_patience: int = 10
    mse_weight: float = 1000.0
    """Weight of the mean squared error between the outputs of linearized and softmax attention."""
    xent_weight: float = 0.0
    """Weight of the cross-entropy between attention weights (1 for the paper's 405B). Its time is quadratic in the
    sequence length."""
    coupling: Literal["joint", "per_layer"] = "joint"
    """``joint``: all layers share gradient clip, mean loss, plateau, early stopping and best checkpoint (the paper);
    ``per_layer``: each layer has its own."""
    order: Literal["joint", "stream", "blocks"] = "joint"
    """Order of the work, see docs/scale.md. ``joint``: train with the whole model in memory; ``stream``: load one layer
    after another, for a chunk of tokens at a time; ``blocks``: train one block of layers after another and keep hidden
    states on disk. ``stream`` and ``blocks`` need ``coupling: per_layer``."""
    block_size: int = 1
    """Layers per block with ``order: blocks``."""
    chunk_tokens: int = 1_000_000
    """Tokens per chunk with ``order: stream``. Host memory holds their hidden states."""
    cuda_graph: bool | Literal["auto"] = "auto"
    """On CUDA, replay a CUDA graph for rows of one shape, with ``order: joint`` and without ``reset_at_documents``.
    ``auto``: on one GPU, for models in 16 bits without kept heads or experts, if its memory is free and the run has at
    least 20 more steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order != "joint" and self.coupling != "per_layer":
            raise LolcatsError(
                f"transfer.order={self.order} trains layers separately: it needs transfer.coupling=per_layer, which "
                "gives each layer its own gradient clip, schedule, early stopping and best checkpoint."
            )


@dataclass(frozen=True)
class FinetuneConfig(StageConfig):
    """Stage 2, low-rank linearizing: train LoRA on the next-token loss, or to predict as the teacher does."""

    learning_rate: float = 1e-4
    """Learning rate of LoRA. 0: LoRA stays zero, so the weights are the base model's, and stage 2 trains only feature
    maps (``feature_map_learning_rate``)."""
    early_stopping_patience: int = 10
    loss: Literal["cross_entropy", "kl", "mix"] = "cross_entropy"
    """``cross_entropy``: of the next token (the paper); ``kl``: knowledge distillation, the KL divergence of the
    student's distribution over the vocabulary from the teacher's; ``mix``: both, weighted by ``kl_weight``. The teacher
    is the base model, which computes every batch once more."""
    kl_weight: float = 0.5
    """Weight w of the KL divergence with ``loss: mix``; the cross-entropy has 1 - w."""
    kl_temperature: float = 1.0
    """Temperature T of both distributions in the KL divergence, which is multiplied by T²."""
    rank: int = 8
    """Rank of the LoRA matrices."""
    alpha: float = 16.0
    """LoRA scale: updates are multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of the LoRA matrices."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Linear layers to add LoRA to. These four names mean the attention's query, key, value and output projections,
    whatever the family calls them (``qkv_proj``, ``dense`` and so on), and ``mlp`` means all linear layers of the MLPs.
    Other names are module names, e.g. ``gate_proj``."""
    protect_kept: bool = False
    """Train no LoRA for the queries and keys of layers and heads that stay softmax attention, so that they attend as
    in the base model: in these rows of the projections, the merged weights are the base model's. With
    ``attention.kind: softmax``, only those that ``attention.layers`` and ``attention.softmax_heads`` name, if any."""
    use_dora: bool = False
    """DoRA: apply LoRA to the direction of each weight and train its magnitude separately (Liu et al. 2024, arXiv
    2402.09353)."""
    use_rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)."""
    quantize_base: Literal["none", "nf4"] = "none"
    """``nf4``: train LoRA on a base model quantized to 4 bits, to save memory (bitsandbytes, CUDA only). The adapter is
    still applied to the original base model, except in sweeps, which measure it on the one in 4 bits."""
    feature_map_learning_rate: float = 0.0
    """Learning rate of feature maps and γ in stage 2 (0 = frozen, as in the paper). Set it if stage 1 is skipped."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Keep only the input of each decoder layer and recompute the layer in the backward pass: less memory, slower.
    ``auto``: only on a GPU on which some rows do not fit without it, tried before the first step (a sharded model:
    always)."""
    sharding: Literal["auto", "always", "never"] = "auto"
    """How to place the base model on several GPUs. ``always``: shard it across them (FSDP2); ``never``: keep all of it
    on each, which is faster; ``auto``: shard it only if it does not fit on each."""
    cuda_graph: bool | Literal["auto"] = False
    """On CUDA, replay micro-batches of the usual shape as a CUDA graph, except with ``reset_at_documents``. ``auto``:
    only where stage 1 does or heads are kept, without dropout, ``gradient_checkpointing`` and ``quantize_base``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protect_kept and self.use_dora:
            raise LolcatsError(
                "finetune.protect_kept does not work with finetune.use_dora: DoRA's magnitudes change every row of a "
                "weight. Leave out one of the two."
            )
        if self.max_steps != 0 and self.learning_rate == self.feature_map_learning_rate == 0:
            raise LolcatsError(
                "finetune.learning_rate and finetune.feature_map_learning_rate are both 0: stage 2 would not learn "
                "anything. Set one of them, or skip stage 2 with finetune.max_steps=0."
            )


@dataclass(frozen=True)
class Config:
    """Everything a run depends on besides the base model and the data."""

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    controls: list[Control] = field(default_factory=list)
    """Control models to train with the student's data, steps, seed and LoRA settings: ``window_lora`` (window and
    sinks, no linear term) and ``teacher_lora`` (softmax attention; on the cross-entropy if ``finetune.loss`` is ``kl``,
    since it would be its own teacher). They can be added to a finished run."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """``auto``: CUDA if it is available, else CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: bfloat16 on CUDA, float32 elsewhere."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base model. Not a setting of a run: each command needs
    ``--trust-remote-code``; a value in a file is ignored."""
    report_to: list[str] = field(default_factory=list)
    """Trackers to report to, e.g. ``[tensorboard]`` or ``[wandb]``. docs/scale.md has the names for stage 1."""

    def __post_init__(self) -> None:
        check_ranges(self, "")
        unused = self.transfer.max_steps == 0 or not self.attention.has_linear
        if not (unused or self.transfer.mse_weight or self.transfer.xent_weight):
            raise LolcatsError(
                "transfer.mse_weight and transfer.xent_weight are both 0: stage 1 would not learn anything. Set one of "
                "them, or skip stage 1 with transfer.max_steps=0."
            )
        if self.controls and self.finetune.quantize_base != "none":
            raise LolcatsError(
                "controls are trained on the original base model and cannot be compared with a student that is "
                "trained on a quantized one (finetune.quantize_base). Leave out one of the two."
            )
        if self.controls and self.finetune.learning_rate == 0 and self.finetune.max_steps != 0:
            raise LolcatsError(
                "controls are trained with the student's LoRA, and finetune.learning_rate=0 trains none. Leave out one "
                "of the two."
            )
        length, window = self.data.sequence_length, self.attention.window_size
        if self.attention.kind in ("hybrid", "window") and length < 2 * window:
            twice = f"two windows (2 × attention.window_size = {2 * window}), which would hide nothing"
            raise LolcatsError(f"data.sequence_length ({length}) is below {twice}: use longer rows or smaller windows.")


def load_config(recipe: str | None = None, overrides: Iterable[str] = ()) -> Config:
    """Resolve a recipe (a shipped name or a YAML file) and ``a.b=c`` overrides into a :class:`Config`.

    Raises:
        LolcatsError: an unknown recipe or key, a wrong type, or settings that exclude each other.
    """
    tree = _read_recipe(recipe or "default")
    tree.pop("trust_remote_code", None)
    changes = [parse_setting(item) for item in overrides]
    names = [f"{key}." for key, _ in changes]
    if any(name.startswith(f"{LISTED_HEADS}.") for name in names) and f"{BUDGET}." not in names:
        changes.insert(0, (BUDGET, 0.0))  # they replace those that the recipe would have chosen
    for key, value in changes:
        set_key(tree, key, value)
    return from_dict(Config, tree)


def parse_setting(item: str) -> tuple[str, Any]:
    """Split ``a.b=c`` into a dotted key and a value."""
    key, equals, text = item.partition("=")
    if not equals:
        raise LolcatsError(f"--set {item!r}: expected KEY=VALUE, for example transfer.learning_rate=1e-3.")
    if key.strip() == "trust_remote_code":
        raise LolcatsError("trust_remote_code is not a setting: allow it for each command with --trust-remote-code.")
    return key.strip(), read_yaml(text, f"--set {key}")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes() if p.name.endswith(".yaml"))


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists and scalars."""
    return dataclasses.asdict(config)


def identity_of(config: Config) -> dict[str, Any]:
    """:func:`to_dict`, and removed settings at the values that change nothing: what identifies a run of any version."""
    found = to_dict(config)
    for (section, name), neutral in REMOVED.items():
        found[section][name] = neutral
    return found


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def from_dict(cls: type[T], tree: Mapping[str, Any], path: str = "") -> T:
    """Build dataclass ``cls`` from ``tree``; unknown keys and wrong types are errors that name the key."""
    if not isinstance(tree, Mapping):
        raise LolcatsError(f"{path or 'configuration'}: expected a mapping, got {tree!r}.")
    hints, tree = get_type_hints(cls), _without_removed(cls, tree)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {path}{near[0]}?" if near else f" Known: {', '.join(known)}."
            raise LolcatsError(f"Unknown configuration key {path}{key}.{hint}")
    return cls(**{key: _coerce(hints[key], value, f"{path}{key}") for key, value in tree.items()})


def _without_removed(cls: type, tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a section without those in REMOVED, which must have the values that change nothing."""
    sections = [name for name, hint in get_type_hints(Config).items() if hint is cls]
    removed = {name: neutral for (section, name), neutral in REMOVED.items() if section in sections}
    for name in removed.keys() & tree.keys():
        if tree[name] != removed[name]:
            raise LolcatsError(
                f"{sections[0]}.{name} was removed in this version: it may be left out or be {removed[name]}, which "
                f"changes nothing, but not {tree[name]}."
            )
    return {key: value for key, value in tree.items() if key not in removed}


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
        return _coerce_union(get_args(hint), value, path)
    if origin is list and isinstance(value, list):
        return [_coerce(get_args(hint)[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(k): _coerce(get_args(hint)[1], v, f"{path}.{k}") for k, v in value.items()}
    if hint is float and not isinstance(value, bool):
        try:  # YAML reads 1e-2 as a string
            number = float(value)
            if math.isfinite(number):
                return number
            raise OverflowError
        except OverflowError:
            raise LolcatsError(f"{path}: expected a finite number, got {str(value)[:20]}.") from None
        except (TypeError, ValueError):
            pass
    elif (hint is int and isinstance(value, int) and not isinstance(value, bool)) or (
        hint in (bool, str) and isinstance(value, hint)
    ):
        return value
    raise LolcatsError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}.")


def _coerce_union(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    """One of several words or None as it is, anything else as the remaining type."""
    words = [word for hint in hints if get_origin(hint) is Literal for word in get_args(hint)]
    if value in words or (value is None and type(None) in hints):
        return value
    plain = next(hint for hint in hints if hint is not type(None) and get_origin(hint) is not Literal)
    if words and not isinstance(value, int):
        raise LolcatsError(f"{path}: expected {plain.__name__} or {', '.join(words)}, got {value!r}.")
    return _coerce(plain, value, path)


def _recipes() -> Iterable[Any]:
    return resources.files("lolcats.recipes").iterdir()


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe in recipe_names():
        text = resources.files("lolcats.recipes").joinpath(f"{recipe}.yaml").read_text()
    elif Path(recipe).is_file():
        text = Path(recipe).read_text()
    else:
        raise LolcatsError(f"Unknown recipe {recipe!r}: expected a YAML file or one of {', '.join(recipe_names())}.")
    tree = read_yaml(text, recipe) or {}
    if not isinstance(tree, dict):
        raise LolcatsError(f"Recipe {recipe}: expected a mapping of sections, got {type(tree).__name__}.")
    return tree


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # invalid dates and numbers are ValueErrors
        raise LolcatsError(f"{where}: not valid YAML ({error}).") from None


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise LolcatsError(f"--set {dotted}: {name} is a value, not a section.")
    tree[last] = value
