"""Greedy tokens of vLLM are those of ``generate``, whatever runs beside them and however prompts are cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import engine, generate, references, tokens, wanted
from safetensors.torch import load_file

BEFORE_ROPE = [f"unrotated {name}" for name in ("llama", "qwen2", "qwen3", "gemma3", "phi3", "glm4", "mistral")]
HEADS = ["heads", "heads gemma3", "unrotated heads"]


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "granite", "mistral", "kept", "merged", *HEADS, *BEFORE_ROPE]
)
def test_a_family_generates_as_with_transformers(name: str, models: Path) -> None:
    """Twice: the second time, states after all whole blocks of a prompt come out of the prefix cache."""
    cases = references(models / name)
    assert any(len(set(case["output"])) > 3 for case in cases), "outputs that repeat one token show little"
    with engine(models / name) as llm:
        first, second = generate(llm, cases), generate(llm, cases)
    assert tokens(first) == wanted(cases)
    assert tokens(second) == wanted(cases)
    assert not any(output.num_cached_tokens for output in first)
    assert any(output.num_cached_tokens for output in second)


@pytest.mark.parametrize("name", ["sliding", "kinds", "heads and layers", "unrotated gemma3", "unrotated kinds"])
def test_without_prefix_cache_and_with_whole_prompts(name: str, models: Path) -> None:
    cases = references(models / name)
    with engine(models / name, enable_prefix_caching=False, max_num_batched_tokens=1024, max_num_seqs=8) as llm:
        for _ in range(2):
            outputs = generate(llm, cases)
            assert tokens(outputs) == wanted(cases)
            assert not any(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize("name", ["llama", "unrotated heads"])
def test_compiled(name: str, models: Path) -> None:
    cases = references(models / name)
    with engine(models / name, enforce_eager=False) as llm:
        assert tokens(generate(llm, cases)) == wanted(cases)


def test_preempted_requests_begin_anew(models: Path) -> None:
    """11 blocks of 128 tokens: three requests begin with a block in each layer, and there are two more to grow into."""
    cases = [case for case in references(models / "kept") if len(case["prompt"]) == 120] * 8
    options: dict[str, Any] = {"max_num_seqs": 8, "disable_log_stats": False, "enable_prefix_caching": False}
    with engine(models / "kept", num_gpu_blocks_override=12, **options) as llm:
        outputs = generate(llm, cases)
        counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert tokens(outputs) == wanted(cases)
    assert counted["vllm:num_preemptions"] > 0


@pytest.mark.parametrize("name", ["llama", "heads"])
def test_feature_maps_and_gates_that_are_loaded_again_are_used(name: str, models: Path) -> None:
    """After the first answers: γ, too, which is computed once. (On CPUs, vLLM keeps no other weights to load into.)"""
    from lolcats.vllm.models import OURS, load_feature_maps

    cases = references(models / name)
    exported = {k: x for k, x in load_file(models / name / "model.safetensors").items() if OURS in k}
    changed = {k: x + 3 if k.endswith(".gate") else x for k, x in exported.items()}

    def load(weights: dict[str, torch.Tensor], model: Any) -> None:
        layers = model.linearized.values()
        before = [layer.mixer.gamma for layer in layers]
        load_feature_maps(model.linearized, weights)
        for layer, gamma in zip(layers, before, strict=True):
            assert layer.mixer.gamma is gamma
            torch.testing.assert_close(gamma, torch.sigmoid(layer.lolcats.gate))

    with engine(models / name, enable_prefix_caching=False) as llm:
        assert tokens(generate(llm, cases)) == wanted(cases)
        llm.apply_model(partial(load, changed))
        assert tokens(generate(llm, cases)) != wanted(cases)
        llm.apply_model(partial(load, exported))
        assert tokens(generate(llm, cases)) == wanted(cases)


def test_states_in_bfloat16_take_less_memory(models: Path) -> None:
    """Sums are rounded, so a near tie may fall the other way."""
    cases, sizes, same = references(models / "llama"), [], 0
    for dtype in ("float32", "bfloat16"):
        with engine(models / "llama", additional_config={"lolcats": {"state_dtype": dtype}}) as llm:
            sizes.append(llm.apply_model(state_bytes)[0])
            same = sum(a == b for a, b in zip(tokens(generate(llm, cases)), wanted(cases), strict=True))
    assert sizes[1] < sizes[0]
    assert same >= len(cases) // 2


@pytest.mark.parametrize("name", ["llama", "unrotated gemma3"])
def test_a_model_in_bfloat16(name: str, models: Path) -> None:
    """vLLM builds it with bfloat16 as torch's default dtype. Near ties may fall the other way than in float32."""
    cases = references(models / name)
    with engine(models / name, dtype="bfloat16") as llm:
        parts = {part: str(dtype) for part, _, dtype in llm.apply_model(state_shapes)[0]}
        assert (parts["S"], parts["z"], parts["ring_k"]) == ("torch.float32", "torch.float32", "torch.bfloat16")
        same = sum(a == b for a, b in zip(tokens(generate(llm, cases)), wanted(cases), strict=True))
    assert same >= len(cases) // 2


def state_shapes(model: Any) -> Any:
    return next(iter(model.linearized.values())).layout.shapes


def state_bytes(model: Any) -> int:
    layout = next(iter(model.linearized.values())).layout
    return int(layout.nbytes)


def test_clients_that_leave_lose_nothing_and_leak_nothing(models: Path) -> None:
    """1,000 requests, a third of them aborted at some point: all others are answered, and all memory is free again."""
    from vllm import SamplingParams

    cases = references(models / "llama")
    with engine(models / "llama", enable_prefix_caching=False, max_num_seqs=32, max_num_batched_tokens=512) as llm:
        inside = llm.llm_engine
        blocks = inside.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        free, finished = blocks.get_num_free_blocks(), dict[int, list[int]]()
        for begin in range(0, 1000, 100):
            for number in range(begin, begin + 100):
                case = cases[number % len(cases)]
                params = SamplingParams(temperature=0, max_tokens=1 + number % 6, ignore_eos=True, detokenize=False)
                inside.add_request(str(number), {"prompt_token_ids": case["prompt"]}, params)
            leaving = [str(number) for number in range(begin, begin + 100) if number % 3 == 0]
            while inside.has_unfinished_requests():
                for output in inside.step():
                    if output.finished:
                        finished[int(output.request_id)] = list(output.outputs[0].token_ids)
                inside.abort_request([leaving.pop()] if leaving else [])
        assert blocks.get_num_free_blocks() == free
    for number in range(1000):
        if number % 3:
            assert finished[number] == cases[number % len(cases)]["output"][: 1 + number % 6]
