"""Effective sequence lengths (the paper's Eq. 9) of rows and heads, and in ``lolcats data stats``."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import sentence, tiny_model
from test_cli import invoke, sets
from torch import Tensor

import lolcats
from lolcats.attention.reference import QUERIES, softmax_weights
from lolcats.config import AttentionConfig
from lolcats.data.rows import Data
from lolcats.evaluation.effective_length import effective_lengths, longest, mean_distances
from lolcats.modeling.layer import override

SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)


def effective_length(weights: Tensor) -> Tensor:
    """The definition, on whole matrices of causal weights (..., T, T) -> (...)."""
    n = torch.arange(weights.shape[-1])
    return (weights * (n[:, None] - n + 1).clamp_min(0)).sum(-1).mean(-1)


def test_definition() -> None:
    assert effective_length(torch.eye(8)) == 1
    first = torch.zeros(8, 8)
    first[:, 0] = 1
    assert effective_length(first) == pytest.approx((1 + 8) / 2)
    uniform = torch.ones(400, 400).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    assert effective_length(uniform).item() == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("tokens", [1, 5, QUERIES, 300])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_distances_are_those_of_the_whole_matrix(tokens: int, softcap: float | None) -> None:
    q, k = torch.randn(2, 4, tokens, 8), torch.randn(2, 2, tokens, 8)
    distances = mean_distances(q, k, 0.7, softcap)
    expected = effective_length(softmax_weights(q, k, 0.7, softcap))
    torch.testing.assert_close(distances[..., 0].mean(-1), expected)


def test_known_attention() -> None:
    """Uniform attention of query n looks back (n + 2) / 2 tokens; attention to only its own token, 1."""
    n = torch.arange(10.0)
    uniform = mean_distances(torch.zeros(1, 1, 10, 4), torch.randn(1, 1, 10, 4), 1.0)
    torch.testing.assert_close(uniform.flatten(), (n + 2) / 2)
    eye = 100 * torch.eye(10)[None, None]
    torch.testing.assert_close(mean_distances(eye, eye, 1.0).flatten(), torch.ones(10))


def test_rows_and_heads_of_a_model() -> None:
    """Gemma's sliding layer stays softmax and is not measured."""
    model = lolcats.convert(tiny_model("gemma3"), SMALL)
    ids = torch.randint(6, 300, (4, 40))
    found = effective_lengths(model, [(ids[:3], None), (ids[3:], None)])
    seen = []
    with override(model, mode="transfer", observer=lambda layer, call: seen.append(call)):
        model(ids, use_cache=False)
    naive = torch.stack([effective_length(softmax_weights(c.q, c.k, c.scale, c.softcap)) for c in seen], 1)
    torch.testing.assert_close(found.rows, naive.mean((1, 2)))
    torch.testing.assert_close(found.heads, naive.mean(0))
    assert found.layers == [1, 2]
    assert found.heads.shape == (2, 4)


def test_documents_apart() -> None:
    model = lolcats.convert(tiny_model(), SMALL)
    ids = torch.randint(6, 300, (1, 40))
    positions = torch.cat([torch.arange(25), torch.arange(15)])[None]
    whole = effective_lengths(model, [(ids, positions)]).rows
    parts = [effective_lengths(model, [(part, None)]).rows for part in ids.split([25, 15], 1)]
    torch.testing.assert_close(whole, (25 * parts[0] + 15 * parts[1]) / 40)


def test_longest_rows_are_kept_in_their_order() -> None:
    model = lolcats.convert(tiny_model(), SMALL)
    rows = torch.randint(6, 300, (9, 32))
    data = Data(rows, rows[:1], rows[:1], "", {}, {"train": torch.arange(32).expand(9, -1), "test": rows[:1]})
    found, kept = longest(data, model, 0.34, 4)
    assert len(kept) == 3
    assert kept.tolist() == sorted(found.rows.argsort(descending=True)[:3].tolist())
    chosen = data.select(kept)
    assert torch.equal(chosen.train, rows[kept])
    assert chosen.positions["train"].shape == (3, 32)
    assert torch.equal(chosen.positions["test"], rows[:1])


def test_command(model_dirs, tmp_path: Path, settings: list[str]) -> None:
    pytest.importorskip("matplotlib")
    rng = random.Random(0)
    for name in ("a", "b"):
        records = [json.dumps({"text": sentence(rng, rng.randint(5, 60))}) for _ in range(150)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(records))
    (tmp_path / "mix.yaml").write_text("sources: [{path: a.jsonl}, {path: b.jsonl}]")
    common = ("data", "stats", model_dirs["llama"], "--picture", tmp_path / "p.png", "--rows", 10, *sets(settings))
    output = invoke(*common, "--data", tmp_path / "mix.yaml")
    assert "share asked for: 50.0%" in output
    assert "effective length of a row of 32" in output
    assert "upper quartile" in output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    lengths = [float(line.split("|")[3]) for line in output.splitlines() if line.startswith("| lowest")]
    assert 1 <= lengths[0] <= 32
    assert "is not a directory" in invoke(
        *common[:3], "--data", tmp_path / "a.jsonl", "--picture", tmp_path / "no" / "p.png", code=2
    )
