"""What multi_gpu.py measures: models, rows and settings, and what builds and versions of PyTorch do in other ways."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from lolcats.config import Config, load_config
from lolcats.plan import read_config

TINY_CONFIG = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048}  # fmt: skip

STAGING = {"nccl": ("set_allocate_memory_from_process_group_for_comm", True),
           "symmetric": ("set_symm_mem_for_comm", "NCCL")}  # fmt: skip
"""Methods of FSDP2's units that say where gathered parameters arrive, and their arguments."""


@dataclass(frozen=True)
class Sizes:
    """What is measured. Rows are those of a micro-batch of one GPU."""

    models: tuple[str, str] = ("llama-3-8b", "llama-3.1-70b")
    length: int = 1024
    transfer_rows: int = 8
    finetune_rows: int = 4
    large_rows: int = 2
    steps: int = 6
    large_steps: int = 3
    prompt: int = 128
    new_tokens: int = 32
    batches: tuple[int, ...] = (1, 256)
    settings: tuple[str, ...] = ()
    search: str = "qwen2.5-1.5b"
    search_heads: int = 3
    search_lengths: tuple[int, ...] = (2048, 4096, 8192)


TINY = Sizes(("tiny", "tiny"), 64, 2, 2, 1, 3, 1, 24, 4, (1, 3),
             ("attention.feature_dim=16", "attention.window_size=16", "attention.sinks=2",
              "data.sequence_length=64"), "tiny", 2, (512,))  # fmt: skip


def model_config(name: str) -> Any:
    return LlamaConfig(**TINY_CONFIG) if name == "tiny" else read_config(name)


def kept_and_taught(sizes: Sizes) -> Config:
    """KL from the teacher; one of eight key/value heads of every layer stays softmax attention (one of two if tiny)."""
    shape = model_config(sizes.models[0])
    heads = {i: [i % shape.num_key_value_heads] for i in range(shape.num_hidden_layers)}
    return load_config("paper-sinks", [*sizes.settings, "finetune.loss=kl", f"attention.softmax_heads={heads}"])


def lean_lora(model: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What the trainer puts around each forward and backward pass; builds before LeanLora have nothing there."""
    try:
        from lolcats.stages.finetune.lora import LeanLora
    except ImportError:
        return contextlib.nullcontext
    return LeanLora(model, model.dtype).cast
