"""Tiny models of the true Hugging Face classes, a tiny tokenizer and small data: they drive the real pipeline."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # readline leaves it to pytest's workers: a console made then has that width for good

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: without a GPU its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lolcats.report import html
from lolcats.run import Run

collect_ignore = ["clients", "vllm"]  # have environments of their own: make test-clients, make test-vllm
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "that",
    "dogs",
    "like",
    "warm",
    "milk",
    "while",
    "birds",
    "sing",
    "far",
    "over",
    "green",
    "quiet",
    "hills",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda **kw: LlamaConfig(**{**COMMON, **kw}),
    "mistral": lambda **kw: MistralConfig(**COMMON, **kw),
    "qwen2": lambda **kw: Qwen2Config(**{**COMMON, **kw}),
    "gemma3": lambda **kw: Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 3, **kw}, head_dim=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def no_reports() -> Iterator[Callable[[Run], None]]:
    """Drawing a report takes longer than training a tiny model: only tests/report does it. Gives the real function."""
    real = html.write_html
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_html", lambda run: None)
        yield real


def tiny_model(family: str = "llama", seed: int = 0, vocab_size: int = 320, **changes: Any) -> Any:
    """A random model whose attention is far from uniform, so that mistakes show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](vocab_size=vocab_size, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(8)
    return model.eval()


def interrupt_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C at the end of an optimizer step, of either stage."""
    from lolcats.stages.finetune.trainer import BestKeeper
    from lolcats.stages.transfer.loop import LayerTrainer

    end_step, on_step_end = LayerTrainer._end_step, BestKeeper.on_step_end

    def first(self: Any, group: Any, units: Any, source: Any, number: int) -> None:
        if number + 1 == step:
            signal.raise_signal(signal.SIGINT)
        end_step(self, group, units, source, number)

    def second(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    patch.setattr(LayerTrainer, "_end_step", first)
    patch.setattr(BestKeeper, "on_step_end", second)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    rng = random.Random(0)
    core.train_from_iterator(
        (sentence(rng, 8) for _ in range(200)),
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short conversations."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    roles = ("user", "assistant", "user", "assistant")
    records = ({"messages": [{"role": r, "content": sentence(rng, 7)} for r in roles]} for _ in range(200))
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """A saved tiny model of each family, with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


SETTINGS = [
    "attention.window_size=8", "attention.sinks=2", "attention.feature_dim=8", "data.sequence_length=32",
    "data.validation_rows=4", "data.test_rows=4", "transfer.max_steps=6", "transfer.batch_size=4",
    "transfer.micro_batch_size=2", "transfer.eval_steps=3", "transfer.save_steps=2", "transfer.log_steps=1",
    "transfer.schedule=cosine", "finetune.max_steps=4", "finetune.batch_size=4", "finetune.micro_batch_size=2",
    "finetune.eval_steps=2", "finetune.save_steps=2", "finetune.log_steps=1", "finetune.learning_rate=1e-2",
]  # fmt: skip


@pytest.fixture
def settings() -> list[str]:
    """Overrides that make a whole run take seconds."""
    return list(SETTINGS)
