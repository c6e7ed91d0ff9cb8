"""Families whose decoder in vLLM was compared with transformers', and those whose maps would see other values."""

from __future__ import annotations

import logging

from lolcats.errors import LolcatsError

log = logging.getLogger(__name__)

COMPARED = frozenset(
    {
        "Apertus", "Arcee", "Cohere", "Ernie4_5", "Exaone4", "GPT2", "GPTNeoX", "Gemma", "Gemma2", "Gemma3", "Gemma4",
        "Glm4", "Granite", "GraniteMoe", "HunYuanDenseV1", "Llama", "Mistral", "Mixtral", "Nemotron", "Olmo", "Olmo2",
        "Olmo3", "Olmoe", "Phi", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3", "StableLm",
        "Starcoder2",
    }
)  # fmt: skip
"""Tiny models of them gave the greedy tokens of ``generate`` on vLLM 0.32."""
REORDERED = frozenset({"Llama4"})
"""vLLM reorders the channels of queries and keys when it loads weights. Softmax attention does not change by that."""


def check_family(architecture: str) -> None:
    """Warn of a family that was not compared. ``architecture``: vLLM's name of the base model.

    Raises:
        LolcatsError: a family that is known to differ.
    """
    family = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if family in REORDERED:
        raise LolcatsError(
            f"vLLM's {architecture} reorders the channels of queries and keys, so feature maps would see them in a "
            "different order than in training. Use lolcats serve."
        )
    if family not in COMPARED:
        log.warning(
            "Linearized models of vLLM's %s have not been compared with transformers. Compare a few greedy answers "
            "with those of lolcats generate first.", architecture,
        )  # fmt: skip
