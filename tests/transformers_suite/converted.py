"""Converted models for transformers' own tests. test_suite.py runs this file, with those tests importable."""

from __future__ import annotations

import copy
import functools
import unittest
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
from support.tiny import shrunk
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    MixtralConfig,
)
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers_tests.test_training_mixin import TrainingTesterMixin

import lolcats
from lolcats.config import AttentionConfig

LLAMA = shrunk(LlamaConfig, vocab_size=99, max_position_embeddings=256)
MIXTRAL = shrunk(MixtralConfig, vocab_size=99, max_position_embeddings=256, head_dim=16)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (LLAMA, {}),
    "LlamaWithKeptLayer": (LLAMA, {"layers": {"0": "softmax"}}),
    "LlamaWithKeptHeads": (LLAMA, {"softmax_heads": {"0": [1]}, "window": "sliding"}),
    "Mixtral": (MIXTRAL, {}),
    "MixtralWithKeptHeads": (MIXTRAL, {"softmax_heads": {"1": [0]}}),
}
"""What is tested: the base model's configuration, and settings of the attention."""

LEFT_OUT = {
    "linear attention has no attention weights": [
        "test_attention_outputs",
        "test_retain_grad_hidden_states_attentions",
    ],
    "the attention of a converted model cannot be set to another one: it would silently be softmax": [
        "test_can_set_attention_dynamically",
        "test_sdpa_can_dispatch_non_composite_models",
    ],
    "loading is strict: a missing tensor, or one of another shape in the decoder, is an error": [
        "test_correct_missing_keys",
        "test_load_with_mismatched_shapes",
        "test_model_weights_reload_no_missing_tied_weights",
    ],
    "asks for transformers' tests of generation, which the source distribution does not have": [
        "test_generation_tester_mixin_inheritance",
    ],
}
"""Tests that converted models cannot pass, by reason. Each must exist and must fail."""


class ConvertedTester:
    """What transformers' tests call a model tester: a converted model's configuration, its classes, and inputs."""

    is_training = True
    batch_size, seq_length = 3, 16

    def __init__(self, base: Any, settings: dict[str, Any]) -> None:
        attention = AttentionConfig(**{"window_size": 4, "sinks": 2, "feature_dim": 4, **settings})
        self.config = lolcats.convert(AutoModelForCausalLM.from_config(copy.deepcopy(base)), attention).config
        self.config_class = type(self.config)
        autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)
        self.classes = tuple(auto._model_mapping[self.config_class] for auto in autos)
        self.base_model_class, self.causal_lm_class, self.sequence_classification_class, _ = self.classes
        self.hidden_size, self.num_hidden_layers = self.config.hidden_size, self.config.num_hidden_layers
        self.num_attention_heads = self.config.num_attention_heads

    def get_config(self) -> Any:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {
            "input_ids": ids_tensor(shape, self.config.vocab_size),
            "attention_mask": random_attention_mask(shape),
        }
        return self.get_config(), inputs


class CommonTests(ModelTesterMixin, TrainingTesterMixin):
    """transformers' tests, for one of ``CASES``."""

    tester: ConvertedTester

    def setUp(self) -> None:
        self.model_tester, self.all_model_classes = self.tester, self.tester.classes

    def assertRaises(self, expected: Any, *args: Any, **kwargs: Any) -> Any:
        """Where transformers raises a RuntimeError for a tensor of another shape, lolcats raises its own error."""
        expected = (RuntimeError, lolcats.LolcatsError) if expected is RuntimeError else expected
        return super().assertRaises(expected, *args, **kwargs)  # noqa: PT027

    def test_config(self) -> None:
        fields = self.tester.config.to_dict()
        names = ("base_model_type", "lolcats", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        ConfigTester(self, self.tester.config_class, **{name: fields[name] for name in names}).run_common_tests()


def must_fail(test: Callable[[Any], None], reason: str) -> Callable[[Any], None]:
    """``test``, for which a pass is a failure. It stops at the first subtest that fails."""

    @pytest.mark.xfail(reason=reason, strict=True)
    @functools.wraps(test)
    def whole(self: Any) -> None:
        with patch.object(self, "subTest", lambda *args, **kwargs: nullcontext()):
            test(self)

    return whole


def case(name: str, base: Any, settings: dict[str, Any]) -> type:
    """The tests over one of ``CASES``."""
    tests: Any = type(name, (CommonTests, unittest.TestCase), {"tester": ConvertedTester(base, settings)})
    for reason, names in LEFT_OUT.items():
        for test in names:
            setattr(tests, test, must_fail(getattr(tests, test), reason))
    return tests


globals().update({name: case(name, *settings) for name, settings in CASES.items()})
