"""Selection of heads by several processes: the same heads and figures as by one, bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from conftest import SETTINGS
from support.ranks import run_ranks
from test_scorer import prompts
from test_select import WINDOW, command

from lolcats.config import load_config
from lolcats.pipeline import linearize
from lolcats.ranks import Ranks, ranks
from lolcats.run import Run
from lolcats.selection import Selection
from lolcats.selection.scorer import Scorer

BUDGET = "attention.softmax_budget=0.5"


def work(model: Path, data: Path, out: Path) -> None:
    """The command, a run and a model without training, with short prompts."""
    sys.modules["lolcats.selection.select"].prompts = lambda *_: prompts()  # type: ignore[attr-defined]
    own, scored, loss = ranks(), list[Any](), Scorer.loss

    def noting(scorer: Scorer, heads: Any) -> float:
        scored.append(heads)
        return loss(scorer, heads)

    Scorer.loss = noting  # type: ignore[method-assign]
    sets = [word for setting in WINDOW for word in ("--set", setting)]
    mine = out / f"{own.size}-{own.rank}.yaml"  # only the first rank writes to its file
    done = command("select", model, "--out", mine, "--heads", 3, *sets)
    assert done.exit_code == 0, done.output
    assert bool(done.output) is own.is_first
    mine.with_suffix(".scored").write_text(str(len(scored)))
    streamed = mine.with_suffix(".streamed")
    done = command("select", model, "--out", streamed, "--heads", 3, "--schedule", "stream", *sets)
    assert done.exit_code == 0, done.output

    if own.size > 1:
        scored.clear()
        runs(model, data, out, scored)
        dist.barrier()


def runs(model: Path, data: Path, out: Path, scored: list[Any]) -> None:
    config = load_config("paper-sinks", [*SETTINGS, BUDGET])
    linearize(str(model), str(data), out / "run", config, merge=False)
    assert scored
    scored.clear()
    linearize(str(model), str(data), out / "run", config, merge=False)
    assert not scored  # the run has its heads
    asked = ["linearize", model, "--out", out / "untrained", "--no-train", "--no-merge", "--set", BUDGET]
    done = command(*asked)
    assert done.exit_code == 0, done.output
    assert scored
    assert bool(done.output) is ranks().is_first


def figures(path: Path) -> Any:
    """What a selection says, without times."""
    found = Selection.read(path)
    return found.heads, found.curve, {name: value for name, value in found.search.items() if name != "seconds"}


def test_two_ranks_select_what_one_does(model_dirs: dict[str, Path], chat_file: Path, tmp_path: Path) -> None:
    for size in (1, 2):
        run_ranks(size, work, model_dirs["llama"], chat_file, tmp_path)
    assert figures(tmp_path / "2-0.yaml") == figures(tmp_path / "1-0.yaml")
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["1-0.yaml", "2-0.yaml"]
    kept = figures(tmp_path / "1-0.yaml")[0]
    assert [figures(tmp_path / f"{size}-0.streamed")[0] for size in (1, 2)] == [kept, kept]
    alone, *shares = (int((tmp_path / f"{name}.scored").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert max(shares) < alone  # both score the empty set, and one a set more in a round of an odd number
    assert alone < sum(shares) <= alone + 2
    for name in ("run", "untrained"):
        record = json.loads((tmp_path / name / "config.json").read_text())["lolcats"]
        assert record["attention"]["softmax_heads"] == Selection.read(tmp_path / name / "selection.yaml").heads
        assert sum(map(len, record["attention"]["softmax_heads"].values())) == 2
    assert Run.open(tmp_path / "run").stage_done("finetune")


def test_items_are_spread_and_come_back_in_order() -> None:
    assert Ranks().spread(lambda x: 2 * x, [3, 1, 2]) == [6, 2, 4]
    assert Ranks().spread(str, []) == []
