"""Base models and their tokenizers: a hub id, a local directory, or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download, try_to_load_from_cache
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from lolcats.errors import LolcatsError, first_line, out_of_memory
from lolcats.files import hash_file
from lolcats.memory import device_room
from lolcats.weights.gguf_header import Header, check_gguf
from lolcats.weights.gguf_nested import nested_arrays_left_out
from lolcats.weights.gguf_tokenizer import mend_tokenizer

HINT = "Is it a complete decoder-only language model that transformers knows?"
NEEDS_CODE = "{} comes with its own Python code, which runs only if you allow it: --trust-remote-code."
COMMIT = "commit "
UNKNOWN = f"{COMMIT}None"  # what was recorded of a hub model while transformers did not tell its commit
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: itself, a scale of 8 bits for each 64, and one of 32 bits for each 256 scales."""
QUANTIZED = 0.5  # of the weights in layers, the least share to be in 4 bits
HUB = ("token", "cache_dir", "local_files_only")
"""Options for files on the hub that are the same for an adapter and its base model."""
STRIDE, SAMPLE = 1 << 20, 4096  # bytes: 4 KiB of each MiB of a weight file are hashed


Quantize = Literal["none", "nf4"]
"""What the weights of linear layers are loaded in: the model's dtype, or 4 bits (bitsandbytes)."""


@dataclass(frozen=True)
class Base:
    """Where a base model comes from. ``path`` is absolute for local ones."""

    path: str
    form: Literal["hub", "directory", "gguf"]
    fingerprint: str
    """Identity of the weights. GGUF file: its sha256; directory: sha256 of its files' names, sizes and 4 KiB of each
    MiB, which any training or merging changes; hub model: its commit."""
    content: str = ""
    """Of a hub model: sha256 of its weights, sampled like a directory's, which knows a copy elsewhere; empty if the
    weights were not on disk or an older version recorded the model."""
    hub: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Options for the files of a hub model (see ``HUB``), which are not recorded."""

    @property
    def record(self) -> dict[str, str]:
        """What is written into run.json and config.json."""
        recorded = {name: getattr(self, name) for name in ("path", "form", "fingerprint", "content")}
        return {name: value for name, value in recorded.items() if value or name != "content"}

    @property
    def arguments(self) -> tuple[str, dict[str, Any]]:
        """Path and keywords that transformers' ``from_pretrained`` functions take."""
        if self.form == "gguf":
            return str(Path(self.path).parent), {"gguf_file": Path(self.path).name}
        return self.path, dict(self.hub)


def find_base(model: str, trust: bool = False, hub: Mapping[str, Any] | None = None) -> Base:
    """Look up ``model`` without loading its weights; raise LolcatsError if it is neither on disk nor on the hub.

    Here and below, ``trust``: run Python code that comes with the model (transformers' trust_remote_code). ``hub``:
    options for files on the hub, of which those in ``HUB`` count.
    """
    hub = {name: value for name, value in (hub or {}).items() if name in HUB}
    path = Path(model).expanduser()
    if path.is_file():
        if not is_gguf(path):
            raise LolcatsError(f"{model} is not a GGUF file: give a hub id, a model directory or a GGUF file.")
        return Base(str(path.parent.resolve() / path.name), "gguf", hash_file(path))  # a link keeps its name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LolcatsError(f"{model} is not a Hugging Face model: the directory has no config.json.")
        return Base(str(path.resolve()), "directory", _hash_directory(path))
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith("."):
        raise LolcatsError(f"{model} does not exist.")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust, **hub)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise LolcatsError(NEEDS_CODE.format(model)) from None
        raise LolcatsError(f"No model {model!r} on disk or on the Hugging Face hub ({first_line(error)}).") from None
    file = try_to_load_from_cache(
        model, "config.json", hub.get("cache_dir")
    )  # newer versions of transformers do not tell the commit
    known = getattr(config, "_commit_hash", None) or (Path(file).parent.name if isinstance(file, str) else None)
    return Base(model, "hub", f"{COMMIT}{known}", hub=hub)


def find_again(
    known: Base, model: str | Path, moved: str = "", trust: bool = False, hub: Mapping[str, Any] | None = None
) -> Base:
    """The base model of the linearized ``model``, at its known place or where it has ``moved`` to.

    Raises:
        LolcatsError: it is not there, or its weights differ from those that ``model`` was trained on.
    """
    try:
        base = find_base(moved or known.path, trust, hub)
    except LolcatsError as error:
        if moved:
            raise
        raise LolcatsError(
            f"The base model of {model} is missing: {error} If it has moved, say where it is now: --base PATH, or "
            "base=PATH in Python."
        ) from None
    if not _same_weights(known, base):
        raise LolcatsError(
            f"{model} was trained on {known.path} with fingerprint {known.fingerprint}, but {base.path} now has "
            f"{base.fingerprint}: adapters only fit their own base model.{_unknown_content(known, base)}"
        )
    return replace(base, fingerprint=known.fingerprint, content=known.content)


def with_content(base: Base) -> Base:
    """``base`` with the fingerprint of its content, if it is known by a commit and its weights are on disk."""
    if base.content or not base.fingerprint.startswith(COMMIT):
        return base
    folder = _hub_folder(base) if base.form == "hub" else Path(base.path)
    return replace(base, content=_hash_weights(folder) if folder else "")


def _same_weights(known: Base, base: Base) -> bool:
    if base.fingerprint == known.fingerprint or (known.fingerprint == UNKNOWN and base.path == known.path):
        return True
    from_hub = known.fingerprint.startswith(COMMIT)
    if base.form == "gguf" or not (from_hub or (known.form, base.form) == ("directory", "hub")):
        return False
    folder = _hub_folder(base, download=True) if base.form == "hub" else Path(base.path)
    if folder is None:
        return False
    if not from_hub:  # a directory that is on the hub now
        return _hash_directory(folder) == known.fingerprint
    if known.content:
        return _hash_weights(folder) == known.content
    commit, snapshots = known.fingerprint.removeprefix(COMMIT), folder.parent
    if known.fingerprint == UNKNOWN:
        return (snapshots.parent.name, snapshots.name) == (f"models--{known.path.replace('/', '--')}", "snapshots")
    return (folder.name, snapshots.name) == (commit, "snapshots")


def _unknown_content(known: Base, base: Base) -> str:
    """A remark on a hub model whose content an older version did not record."""
    if not known.fingerprint.startswith(COMMIT) or known.content or base.form != "directory":
        return ""
    commit = "COMMIT" if known.fingerprint == UNKNOWN else known.fingerprint.removeprefix(COMMIT)
    return (
        " It does not record what the weights were, so a folder is accepted only in the hub's cache: give "
        f"models--{known.path.replace('/', '--')}/snapshots/{commit}, or the hub id."
    )


def _hub_folder(base: Base, download: bool = False) -> Path | None:
    """Where the hub's cache holds the files of a hub model, if it does. ``download``: the weights first."""
    commit = base.fingerprint.removeprefix(COMMIT)
    if download:
        try:
            patterns = ["*.json", "*.safetensors"]
            return Path(snapshot_download(base.path, revision=commit, allow_patterns=patterns, **base.hub))
        except (OSError, ValueError) as error:
            raise LolcatsError(f"Cannot read {base.path} from the hub ({first_line(error)}).") from None
    config = try_to_load_from_cache(base.path, "config.json", base.hub.get("cache_dir"), commit)
    return Path(config).parent if isinstance(config, str) else None


def is_gguf(file: Path) -> bool:
    """Whether a file claims to be GGUF, by its name or its first bytes: in the hub's cache, files are named by their
    hash."""
    with file.open("rb") as stream:
        return file.suffix == ".gguf" or stream.read(4) == b"GGUF"


def load_model(
    base: Base, dtype: torch.dtype, device: torch.device | str = "cpu", trust: bool = False,
    quantize: Quantize = "none", attention: Any = None,
) -> PreTrainedModel:  # fmt: skip
    """The base model in evaluation mode; raise LolcatsError with a reason if it cannot be loaded.

    attention: transformers' attn_implementation; None: the model's own choice.
    """
    if quantize != "none":
        return load_quantized(base, dtype, torch.device(device), trust, attention)
    path, kwargs = base.arguments
    kwargs |= {} if attention is None else {"attn_implementation": attention}
    with _reading(base, HINT):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=trust, **kwargs
        )
        if missing := sorted(info["missing_keys"]):  # transformers would continue with random weights
            raise LolcatsError(
                f"{base.path} is incomplete: tensor {missing[0]} is missing (missing tensors: {len(missing)})."
            )
        if base.form == "gguf":
            model = _plain(model)
    return model.to(device).eval()


def load_quantized(
    base: Base, dtype: torch.dtype, device: torch.device, trust: bool = False, attention: Any = None
) -> PreTrainedModel:
    """The base model with the weights of its linear layers in NF4 (bitsandbytes), computing in ``dtype``.

    Embeddings, norms and the output layer stay as they are. Each weight is quantized as it is read, so the model in
    ``dtype`` is nowhere as a whole.
    """
    check_quantized(base, device, trust)
    path, kwargs = base.arguments
    kwargs |= {} if attention is None else {"attn_implementation": attention}
    with _readable(base, HINT):
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            quantization_config=nf4(dtype),
            device_map={"": device},
            trust_remote_code=trust,
            **kwargs,
        )
    return model.eval()


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Weights in NF4 with their scales in 8 bits, computing in ``dtype``."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def check_quantized(
    base: Base, device: torch.device, trust: bool = False, option: str = "--quantize", gradients: bool = False
) -> None:  # fmt: skip
    """Raise LolcatsError unless ``base`` can be loaded in 4 bits here. ``option``: what asks for it.

    ``gradients``: gradients flow through its layers. On CPUs, bitsandbytes packs weights again and gives them none.
    """
    if device.type != "cuda" and (gradients or device.type != "cpu"):
        raise LolcatsError(f"{option}: 4-bit weights need a CUDA GPU, but this runs on {device.type}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LolcatsError(f"{option} needs bitsandbytes: pip install 'lolcats[quantize]'.")
    if base.form == "gguf":
        raise LolcatsError(f"{option}: a GGUF file is quantized already; give a hub id or a directory.")
    if method := getattr(read_config(base, trust), "quantization_config", None):
        name = method.get("quant_method") if isinstance(method, dict) else method.quant_method
        raise LolcatsError(f"{option}: {base.path} is quantized already ({name}): give the original weights.")
    model = empty_model(base, trust)
    linear, inside = _in_linear_layers(model)
    if linear < QUANTIZED * inside:
        raise LolcatsError(
            f"{option}: bitsandbytes quantizes linear layers, which hold only {linear / inside:.0%} of the weights in "
            f"the layers of {base.path}. Most of the others are those of experts, so it would save little memory."
        )
    size = NF4_BYTES * linear + 2 * (sum(p.numel() for p in model.parameters()) - linear)
    if size > (room := device_room(device)):
        raise LolcatsError(
            f"{option}: {base.path} takes about {size / 2**30:.1f} GiB in 4 bits, and there is room for "
            f"{room / 2**30:.1f} GiB on {device.type}. lolcats plan says what fits on which GPU."
        )


def _in_linear_layers(model: PreTrainedModel) -> tuple[int, int]:
    """Weights of linear layers, and all parameters, outside embeddings and output layer."""
    apart = {model.get_input_embeddings(), model.get_output_embeddings()}
    inside = [module for module in model.modules() if module not in apart]
    linear = sum(m.weight.numel() for m in inside if isinstance(m, nn.Linear | Conv1D))
    return linear, sum(p.numel() for module in inside for p in module.parameters(recurse=False))


def read_config(base: Base, trust: bool = False) -> PreTrainedConfig:
    """The base model's configuration; raise LolcatsError with a reason if it cannot be read."""
    path, kwargs = base.arguments
    with _reading(base, HINT):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust, **kwargs)


def empty_model(base: Base, trust: bool = False) -> PreTrainedModel:
    """The base model on the meta device: its modules and shapes, but no memory for weights."""
    config = read_config(base, trust)
    with _readable(base, HINT), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def load_tokenizer(base: Base, trust: bool = False) -> Any:
    path, kwargs = base.arguments
    with _reading(base, "It needs a tokenizer beside its weights.") as header:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust, **kwargs)
        except Exception:
            read_config(base, trust)  # it reads the configuration first, which may be what is wrong
            raise
        if header:
            tokenizer = mend_tokenizer(tokenizer, Path(base.path), header)
    _check_words(tokenizer, base)
    return tokenizer


def saved_tokenizer(directory: Path, trust: bool = False) -> Any:
    """The tokenizer that a run saved, as its tokenizer.json says. Its class would replace some of that, and reading the
    configuration beside it may need the base model's code."""
    with _readable(Base(str(directory), "directory", ""), "Its tokenizer files are damaged: restore them from a copy."):
        tokenizer = AutoTokenizer.from_pretrained(directory, config=PreTrainedConfig(), trust_remote_code=trust)
        core, file = tokenizer.backend_tokenizer, Tokenizer.from_file(str(directory / "tokenizer.json"))
        core.normalizer, core.pre_tokenizer = file.normalizer, file.pre_tokenizer
    return tokenizer


def _check_words(tokenizer: Any, base: Base) -> None:
    """Raise LolcatsError if transformers read the tokenizer wrong.

    Without a vocabulary, it makes a tokenizer that turns any text into nothing. Some versions misread the tokenizers of
    some GGUF files: 5.17 loses merges of Gemma 3's, and "the" becomes "t", "he".
    """
    vocabulary, pieces = tokenizer.get_vocab(), tokenizer.tokenize("All the rivers run into the sea")
    if not pieces:
        raise LolcatsError(f"The tokenizer of {base.path} has no vocabulary: tokenizer.json is missing.")
    if base.form == "gguf" and any(word in vocabulary and word not in pieces for word in ("▁the", "Ġthe")):
        raise LolcatsError(
            f"transformers {transformers.__version__} misreads the tokenizer of {base.path}: it splits 'the', which is "
            "in the vocabulary. Try a newer transformers, or give the model as a directory."
        )


@contextmanager
def _reading(base: Base, hint: str) -> Iterator[Header | None]:
    """For what transformers reads: a GGUF file's header is checked first, and errors become LolcatsErrors."""
    header = _check_gguf(base)
    with _readable(base, hint), nested_arrays_left_out(header):
        yield header


@contextmanager
def _readable(base: Base, hint: str) -> Iterator[None]:
    """Turn any error of reading a model into a LolcatsError: damaged files raise struct, index and other errors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LolcatsError) or out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise LolcatsError(NEEDS_CODE.format(base.path)) from error
        raise LolcatsError(f"Cannot load {base.path}: {first_line(error)}. {hint}") from error


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without traces of the GGUF file: transformers would treat it as quantized and refuse to save it."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    with init_empty_weights(include_buffers=False):  # initializing weights takes as long as reading them
        plain = type(model)._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _check_gguf(base: Base) -> Header | None:
    """The header of a GGUF file, after checking that the file can be read and that the header fits it."""
    if base.form != "gguf":
        return None
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LolcatsError("Reading GGUF files needs the gguf package: pip install 'lolcats[gguf]'.") from None
    return check_gguf(Path(base.path))


def _hash_directory(path: Path) -> str:
    return _hash_samples(sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")]))


def _hash_weights(path: Path) -> str:
    """Like a directory's fingerprint, of config.json and the weights that transformers loads; '' if one is missing.

    Copies of a hub model may differ in the files beside these.
    """
    files = [path / "config.json", *_weight_files(path)]
    return _hash_samples(files) if len(files) > 1 and all(file.is_file() for file in files) else ""


def _weight_files(path: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return [path / name]
        if (path / f"{name}.index.json").is_file():
            index = json.loads((path / f"{name}.index.json").read_text())
            return [path / file for file in sorted(set(index["weight_map"].values()))]
    return []


def _hash_samples(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for offset in range(0, size, STRIDE):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE))
    return "sha256 of samples " + digest.hexdigest()
