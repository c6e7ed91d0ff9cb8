"""Operations of one training step per decoder layer, counted on a CPU: what the host does for a small model on a GPU.

    python benchmarks/operations.py

Stage 2 with LoRA, of a tiny Llama and Qwen2 in bf16, without liger-kernel. An operation is a call of a torch kernel
that touches memory; views are not counted. Attention runs another path on a GPU and is left out: here it is one
operation forwards and none backwards. Layers are counted by the difference between models of two and of four layers.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.data.rows import Rows
from lolcats.modeling.layer import LinearizedAttention
from lolcats.stages.finetune.stage import FinetuneTrainer, add_lora

FREE = (
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach",
    "alias", "split", "unbind", "as_strided", "empty", "empty_like", "new_empty", "reshape", "split_with_sizes",
    "lift_fresh", "chunk", "narrow", "empty_strided",
)  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.names[name] += 1
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """In place of the kernels."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.kv = k.shape, v.shape
        return q.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return dy, *(dy[:, : shape[1]] for shape in ctx.kv)


def _attention(layer: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _Attention.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]


def finetune_step(family: str, layers: int, directory: Path, **settings: Any) -> Callable[[], None]:
    """One optimizer step of stage 2 with one micro-batch."""
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip
    model = lolcats.convert(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
                            AttentionConfig(feature_dim=8, window_size=8, sinks=2))  # fmt: skip
    stage = FinetuneConfig(batch_size=2, micro_batch_size=2, **settings)
    ids = torch.randint(128, (2, 32))
    trainer = FinetuneTrainer(
        add_lora(model, stage), stage, Rows(ids), Rows(ids), "benchmark", directory, directory / "m"
    )
    trainer.current_gradient_accumulation_steps = 1
    optimizer: Any = trainer.create_optimizer()

    def step() -> None:
        trainer.training_step(trainer.model, {"input_ids": ids, "labels": ids})
        trainer._clip_grad_norm(trainer.model)
        optimizer.step()
        trainer.model.zero_grad()

    return step


def count(family: str, layers: int, **settings: Any) -> Counter[str]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(patch.object(LinearizedAttention, "forward", _attention))
        step = finetune_step(family, layers, directory, **settings)
        step()
        counting = stack.enter_context(Counting())
        step()
    return counting.names


def per_layer(family: str, **settings: Any) -> dict[str, float]:
    """Operations of a step for each layer, most frequent first."""
    less, more = count(family, 2, **settings), count(family, 4, **settings)
    found = {name: (more[name] - less[name]) / 2 for name in more}
    return {name: n for name, n in sorted(found.items(), key=lambda item: -item[1]) if n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="llama,qwen2")
    arguments = parser.parse_args()
    for family in arguments.families.split(","):
        found = per_layer(family)
        print(f"{family}: {sum(found.values()):g} operations a layer; {found}")


if __name__ == "__main__":
    sys.exit(main())
