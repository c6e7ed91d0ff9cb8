"""The same code on a GPU. Skipped, with the reason, where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import lolcats
from lolcats.attention import AttentionSpec, FeatureMap, chunked_attention, parallel_attention
from lolcats.config import AttentionConfig, load_config
from lolcats.pipeline import linearize

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_chunked_equals_reference(window: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 200, 16, device="cuda") for heads in (4, 2, 2))
    phi = FeatureMap("hedgehog", 4, 16, 8).cuda()
    fq, fk = phi(q), phi(k.repeat_interleave(2, 1))
    gamma, spec = torch.full((4,), 0.1, device="cuda"), AttentionSpec("hybrid", window, 16, 4)
    expected = parallel_attention(q, k, v, fq, fk, gamma, spec, 0.25)
    torch.testing.assert_close(chunked_attention(q, k, v, fq, fk, gamma, spec, 0.25), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generation_with_padding() -> None:
    model = lolcats.convert(tiny_model().cuda(), AttentionConfig(window_size=8, sinks=2, feature_dim=8))
    ids = torch.randint(6, 300, (2, 30), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    common = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **common)
    assert torch.equal(together[1, 13:], model.generate(ids[1:, 13:], **common)[0])


def test_whole_job_finds_the_gpu_and_uses_bfloat16(model_dirs, chat_file: Path, settings, tmp_path: Path) -> None:
    run = linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "out", load_config("default", settings))
    assert run.results["ppl_student"] > 1
    assert json.loads((tmp_path / "out" / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    ids = torch.randint(6, 300, (2, 40), device="cuda")
    adapter, merged = (lolcats.load(tmp_path / d, device="cuda") for d in ("out", "out/merged"))
    assert torch.equal(adapter(ids).logits, merged(ids).logits)
