"""Base models and their tokenizers: a hub id, a local directory, or a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from lolcats.errors import LolcatsError, first_line, out_of_memory
from lolcats.files import hash_file
from lolcats.weights.gguf_header import check_gguf

HINT = "Is it a complete decoder-only language model that transformers knows?"
STRIDE, SAMPLE = 1 << 20, 4096  # bytes: 4 KiB of each MiB of a weight file are hashed


@dataclass(frozen=True)
class Base:
    """Where a base model comes from. ``path`` is absolute for local ones."""

    path: str
    form: Literal["hub", "directory", "gguf"]
    fingerprint: str
    """Identity of the weights. GGUF file: its sha256; directory: sha256 of its files' names, sizes and 4 KiB of each
    MiB, which any training or merging changes; hub model: its commit."""

    @property
    def arguments(self) -> tuple[str, dict[str, Any]]:
        """Path and keywords that transformers' ``from_pretrained`` functions take."""
        if self.form == "gguf":
            return str(Path(self.path).parent), {"gguf_file": Path(self.path).name}
        return self.path, {}


def find_base(model: str, trust: bool = False) -> Base:
    """Look up ``model`` without loading its weights; raise LolcatsError if it is neither on disk nor on the hub.

    Here and below, ``trust``: run Python code that comes with the model (transformers' trust_remote_code).
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise LolcatsError(f"{model} is not a .gguf file: give a hub id, a model directory or a GGUF file.")
        return Base(str(path.resolve()), "gguf", hash_file(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LolcatsError(f"{model} is not a Hugging Face model: the directory has no config.json.")
        return Base(str(path.resolve()), "directory", _hash_directory(path))
    if path.suffix == ".gguf" or path.is_absolute() or model.startswith("."):
        raise LolcatsError(f"{model} does not exist.")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise LolcatsError(f"No model {model!r} on disk or on the Hugging Face hub ({first_line(error)}).") from None
    return Base(model, "hub", f"commit {getattr(config, '_commit_hash', None)}")


def load_model(
    base: Base, dtype: torch.dtype, device: torch.device | str = "cpu", trust: bool = False
) -> PreTrainedModel:
    """The base model in evaluation mode; raise LolcatsError with a reason if it cannot be loaded."""
    path, kwargs = base.arguments
    _check_gguf(base)
    with _readable(base, HINT):
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


def load_quantized(base: Base, dtype: torch.dtype, device: torch.device, trust: bool = False) -> PreTrainedModel:
    """The base model with the weights of its linear layers in NF4 (bitsandbytes), computing in ``dtype``.

    Embeddings, norms and the output layer stay as they are.
    """
    check_quantized(base, device)
    compute = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with _readable(base, HINT):
        model = AutoModelForCausalLM.from_pretrained(
            base.path, dtype=dtype, quantization_config=compute, device_map={"": device}, trust_remote_code=trust
        )
    return model.eval()


def check_quantized(base: Base, device: torch.device) -> None:
    """Raise LolcatsError unless ``base`` can be loaded in 4 bits here. Checked before stage 1, not after it."""
    if device.type != "cuda":
        raise LolcatsError(f"finetune.quantize_base: 4-bit weights need a CUDA GPU, but this runs on {device.type}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LolcatsError("finetune.quantize_base needs bitsandbytes: pip install 'lolcats[quantize]'.")
    if base.form == "gguf":
        raise LolcatsError("finetune.quantize_base: a GGUF file is quantized already; give a hub id or a directory.")


def empty_model(base: Base, trust: bool = False) -> PreTrainedModel:
    """The base model on the meta device: its modules and shapes, but no memory for weights."""
    path, kwargs = base.arguments
    _check_gguf(base)
    with _readable(base, "Is it a decoder-only language model that transformers knows?"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust, **kwargs)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def load_tokenizer(base: Base, trust: bool = False) -> Any:
    path, kwargs = base.arguments
    _check_gguf(base)
    with _readable(base, "It needs a tokenizer beside its weights."):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust, **kwargs)
        except Exception:
            with _readable(base, HINT):  # it reads the configuration first, which may be what is wrong
                AutoConfig.from_pretrained(path, trust_remote_code=trust, **kwargs)
            raise
    _check_words(tokenizer, base)
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
def _readable(base: Base, hint: str) -> Iterator[None]:
    """Turn any error of reading a model into a LolcatsError: damaged files raise struct, index and other errors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LolcatsError) or out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise LolcatsError(
                f"{base.path} comes with its own Python code, which runs only if you allow it: --trust-remote-code."
            ) from error
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


def _check_gguf(base: Base) -> None:
    """Check that a GGUF file can be read and that its header fits the file."""
    if base.form != "gguf":
        return
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise LolcatsError("Reading GGUF files needs the gguf package: pip install 'lolcats[gguf]'.") from None
    check_gguf(Path(base.path))


def _hash_directory(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted([path / "config.json", *path.glob("*.safetensors"), *path.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for offset in range(0, size, STRIDE):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE))
    return "sha256 of samples " + digest.hexdigest()
