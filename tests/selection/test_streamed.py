"""Layers that come to the device one after another give the scores, slopes and heads of the whole model."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scorer import SETS, WINDOW, base_of, prompts, scorer_of
from test_select import command

from lolcats.config import AttentionConfig, load_config
from lolcats.data.inputs import Inputs
from lolcats.modeling.skeleton import build_skeleton
from lolcats.pipeline.job import start
from lolcats.selection import Selection, Settings
from lolcats.selection.scorer import Scorer
from lolcats.selection.search import grow, units_of
from lolcats.selection.streamed import Kept, StreamedScorer
from lolcats.weights.base import find_base


def both(folder: Path, family: str = "llama") -> tuple[Scorer, StreamedScorer]:
    """Of the same weights, in memory and in files."""
    base = base_of(family)
    base.save_pretrained(folder)
    skeleton = build_skeleton(
        find_base(str(folder)), AttentionConfig(**WINDOW), torch.float32, torch.device("cpu"), seed=0
    )
    return scorer_of(base), StreamedScorer(skeleton, prompts(), batch_tokens=120)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_streamed_scores_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    whole, streamed = both(tmp_path, family)
    assert streamed.heads == whole.heads
    shift = 1 if family == "gemma3" else 0
    sets = [[(layer + shift, head) for layer, head in heads] for heads in SETS]
    for batch, other in zip(whole.batches, streamed.batches, strict=True):
        torch.testing.assert_close(other.teacher, batch.teacher)
    assert streamed.losses(sets) == pytest.approx(whole.losses(sets), rel=1e-4, abs=1e-6)
    for kept in sets:
        assert streamed.move_to(kept) == pytest.approx(whole.move_to(kept), rel=1e-4, abs=1e-6)
        shares = dict.fromkeys(kept, 1.0)
        (loss, slopes), (expected, others) = streamed.slopes(shares), whole.slopes(shares)
        assert loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert slopes == pytest.approx(others, rel=1e-3, abs=1e-6)
        assert streamed.losses(sets) == pytest.approx(whole.losses(sets), rel=1e-4, abs=1e-6)
    asked: list[Any] = [*sets, None, whole.heads]
    assert streamed.exacts(asked) == whole.exacts(asked)


def test_streamed_search_finds_the_heads_of_the_whole_model(tmp_path: Path) -> None:
    """The same sets on the way, too, and what is scored together takes one pass over the weights."""
    whole, streamed = both(tmp_path)
    trails = [grow(scorer, [], units_of(scorer, False), 5, 4, lambda _: None) for scorer in (whole, streamed)]
    assert [found.units for found in trails[1]] == [found.units for found in trails[0]]
    assert [found.loss for found in trails[1]] == pytest.approx([found.loss for found in trails[0]], rel=1e-4)
    streamed.move_to([])
    before, passes = streamed.streams, streamed.passes
    streamed.losses([[head] for head in streamed.heads])
    assert streamed.streams - before == pytest.approx(1)
    assert streamed.passes - passes == pytest.approx(6), "four sets from the first layer on, four from the second"
    before = streamed.streams
    (loss,) = streamed.losses([[(0, 0), (1, 3)]])
    assert streamed.move_to([(0, 0), (1, 3)]) == loss
    assert streamed.slopes({(0, 0): 1.0, (1, 3): 1.0})[0] == pytest.approx(loss)
    assert streamed.streams - before <= 2, "forwards once, and backwards once"
    with pytest.raises(ValueError, match="sets of heads"):
        streamed.slopes({(0, 0): 0.5})


def test_only_one_layer_and_what_is_around_the_layers_has_weights(tmp_path: Path) -> None:
    _, streamed = both(tmp_path)
    held = set[int]()
    run = streamed.skeleton.run

    def watched(index: int, *arguments: Any) -> Any:
        layers = [not p.is_meta for layer in streamed.blocks for n, p in layer.named_parameters() if "lolcats" not in n]
        held.add(sum(layers))
        return run(index, *arguments)

    streamed.skeleton.run = watched  # type: ignore[method-assign]
    streamed.move_to([(0, 1)])
    streamed.slopes({(0, 1): 1.0})
    assert held == {9}, "of a layer of a Llama"
    assert all(p.is_meta for n, p in streamed.model.named_parameters() if ".layers." in n and "lolcats" not in n)


def test_weights_are_kept_as_long_as_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, streamed = both(tmp_path)
    source = streamed.skeleton.source
    assert isinstance(source, Kept)
    assert len(source.kept) == 2, "both layers, after the teacher's pass"
    reads, read = list[int](), source.source.read
    monkeypatch.setattr(source.source, "read", lambda *arguments: reads.append(1) or read(*arguments))
    before = streamed.move_to([(0, 1)])
    assert not reads
    monkeypatch.setattr("lolcats.selection.streamed.free_host_memory", lambda: 0)
    source.kept.clear()
    streamed.known.clear()
    assert streamed.move_to([(0, 1)]) == pytest.approx(before)
    assert reads
    assert not source.kept


def test_the_command_streams_to_the_same_file(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    options = ["--heads", 2, "--lengths", 2048, "--beyond", 1, "--set", "attention.window_size=8"]
    files = [tmp_path / "joint.yaml", tmp_path / "stream.yaml"]
    for file in files:
        done = command("select", model_dirs["llama"], "--out", file, "--schedule", file.stem, *options)
        assert done.exit_code == 0, done.output
    whole, streamed = map(Selection.read, files)
    assert [point.heads for point in streamed.curve] == [point.heads for point in whole.curve]
    assert [point.exact for point in streamed.curve] == [point.exact for point in whole.curve]
    for point, other in zip(streamed.curve, whole.curve, strict=True):
        assert point.loss == pytest.approx(other.loss, abs=2e-5)
    assert streamed.heads == whole.heads
    done = command("select", model_dirs["llama"], "--out", files[0], "--schedule", "stream", "--quantize", "nf4")
    assert done.exit_code == 2
    assert "leave out --quantize" in done.output
    assert "expected joint or stream" in command("select", "m", "--out", files[0], "--schedule", "blocks").output


def test_a_run_in_turn_chooses_its_heads_in_turn(
    model_dirs: dict[str, Path], chat_file: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budget and stage 1 layer by layer: the heads of a run that holds the whole model, without loading all of it."""
    module = importlib.import_module("lolcats.selection.select")
    monkeypatch.setattr(module, "prompt_plan", lambda lengths: [("codes", length) for length in lengths])
    short = Settings(lengths=(2048,), beyond=1.0)
    monkeypatch.setattr("lolcats.pipeline.heads.Settings", lambda seed: replace(short, seed=seed))
    said, heads = list[str](), list[Any]()
    for order in (["transfer.order=joint"], ["transfer.order=stream", "transfer.coupling=per_layer"]):
        config = load_config("paper-sinks", [*settings, *order, "attention.softmax_budget=0.5", "device=cpu"])
        out = tmp_path / order[0].rpartition("=")[2]
        if "order=stream" in order[0]:
            monkeypatch.setattr(Inputs, "model", lambda *_: pytest.fail("loaded as a whole"))
        start(Inputs(str(model_dirs["llama"])), str(chat_file), out, config, said.append)
        heads.append(Selection.read(out / "selection.yaml").heads)
    assert heads[0] == heads[1]
    assert any("layer by layer to choose heads" in line for line in said)
