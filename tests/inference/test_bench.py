"""``lolcats bench`` on a tiny model: every system, its bound, its files."""

from __future__ import annotations

import itertools
import json
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.config import AttentionConfig
from lolcats.lab import bench, generation
from lolcats.lab.bench import Options, benchmark, bound_seconds, describe, plain_teacher, random_model
from lolcats.modeling.convert import convert


def tiny(key_maps: Any = "per_query_head") -> Any:
    return random_model("tiny", AttentionConfig(feature_dim=8, key_maps=key_maps), torch.device("cpu"), torch.float32)


def test_rows_of_engine_and_peers() -> None:
    options = Options((2, 3), prompt=20, new=12, peers=("sdpa", "static"), peer_new=5, prefill_rows=2, runs=2)
    rows = list(benchmark(tiny(), options))
    assert [(row["system"], row["batch"]) for row in rows] == [
        (system, batch) for batch in (2, 3) for system in ("sdpa", "static", "engine")
    ]
    for row in rows:
        own = row["system"] == "engine"
        assert row["new"] == (12 if own else 5)
        assert row["runs"] == 2
        assert row["decode_tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        assert row["whole_tokens_per_second"] > 0
        assert (row["key_maps"], row["state_dtype"]) == (("per_query_head", "float32") if own else (None, None))
        assert row["dtype"] == "float32"


def test_each_system_has_the_peak_of_its_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of a run here: its number. Peers run while no engine holds memory for its states."""
    runs: list[int] = []  # engines in memory
    engines: weakref.WeakSet[bench.Engine] = weakref.WeakSet()

    class Noted(bench.Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            engines.add(self)
            self.own_cycle = self
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(bench, "Engine", Noted)
    monkeypatch.setattr(bench, "_reset_peak", lambda device: runs.append(len(engines)))
    monkeypatch.setattr(bench, "_peak", lambda device: len(runs))
    options = Options((2, 3), prompt=20, new=12, peers=("sdpa", "static"), peer_new=5, prefill_rows=2, runs=2)
    rows = list(benchmark(tiny(), options))
    assert runs == 2 * [0, 0, 0, 0, 0, 0, 1, 1]  # the first run of static is discarded
    assert [row["peak_bytes"] for row in rows] == [4, 6, 8, 12, 14, 16]


def test_an_engine_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no step")

    monkeypatch.setattr(bench.Engine, "_decode_rows", broken)
    (row,) = benchmark(tiny(), Options((2,), prompt=20, new=12))
    assert row["missing"] == "The engine failed: ValueError: no step"


def test_peers_leave_time_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.take_turns
    limits: list[float] = []

    def turns(systems: Any, runs: int, deadline: float) -> Any:
        limits.append(deadline - time.monotonic())
        return real(systems, runs, deadline)

    monkeypatch.setattr(bench, "take_turns", turns)
    list(benchmark(tiny(), Options((2,), prompt=20, new=12, peers=("sdpa",), peer_new=5, seconds=600)))
    assert limits[0] == pytest.approx(300, abs=10)
    assert limits[1] > 500


def test_a_peak_that_is_not_known_says_why(tmp_path: Path) -> None:
    first, second = benchmark(tiny(), Options((2,), prompt=20, new=12, peers=("sdpa",), peer_new=5))
    lines = [{**first, "peak_bytes": None, "peak_unknown": "It was not measured."}, second]
    text = generation.write(tmp_path / "g.json", lines, "lolcats bench")
    assert generation.cells(lines[0])[-2] == "–"
    assert "\n–: It was not measured.\n" in text
    assert f" {second['peak_bytes'] / 2**30:.1f} |" in text
    assert (tmp_path / "g.png").stat().st_size > 10_000


def test_the_bound_is_computed_from_the_models_own_sizes() -> None:
    model, options = tiny("per_kv_head"), Options(state_dtype=torch.bfloat16, bandwidth=1e9, flops=1e9)
    about = describe(model, options)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96  # q and o, k and v, the gated MLP
    assert about["weights"] == 2 * layer + 320 * 64  # the head; the embedding is not read
    assert about["weight_bytes"] == 4 * about["weights"]
    state = bench.state_bytes(model, torch.bfloat16)
    ring, sums = 2 * 2 * (128 + 4) * 16 * 4, 2 * 16 * (16 * 2 + 4)
    assert state == 2 * (ring + sums + 8)
    assert bound_seconds(about, 1, state, options) == pytest.approx((about["weight_bytes"] + state) / 1e9)
    expected = (100 * 2 * about["weights"] + 100 * state) / 1e9
    assert bound_seconds(about, 100, state, options) == pytest.approx(expected)


def test_kept_heads_count_with_every_token() -> None:
    config = AttentionConfig(window_size=8, feature_dim=8, softmax_heads={"0": [1], "1": [0, 1]})
    model, token = convert(tiny_model(), config), 3 * (8 + 8) * 4
    assert bench.token_bytes(model) == token
    short, long = (bench.state_bytes(model, torch.float32, tokens) for tokens in (0, 100))
    assert long - short == 100 * token
    [row] = bench.benchmark(model, Options(batches=(2,), prompt=5, new=12, bandwidth=1e9))
    assert (row["new"], row["state_bytes"], row["token_bytes"]) == (12, short, token)
    reads = row["weight_bytes"] + 2 * (short + 11 * token)  # on average
    assert row["bound_ms"] == pytest.approx(reads / 1e6, rel=1e-3)
    line = generation.cells({**row, "peak_bytes": 0})[-1]
    assert line == f"{short / 1e6:.1f} + 0.1875 KiB a token"


def test_windows_of_kept_layers_count_up_to_their_size() -> None:
    config = AttentionConfig(window_size=8, feature_dim=8, softmax_heads={"1": [0]})
    model, head = convert(tiny_model("gemma3"), config), 2 * 16 * 4
    assert (bench.token_bytes(model), bench.window_bytes(model)) == (head, 24 * 2 * head)
    fixed, short, long = (bench.state_bytes(model, torch.float32, tokens) for tokens in (0, 10, 100))
    assert (short - fixed, long - fixed) == (10 * 3 * head, 24 * 2 * head + 100 * head)
    [row] = bench.benchmark(model, Options(batches=(3,), prompt=40, new=12, bandwidth=1e9))
    assert (row["new"], row["state_bytes"], row["window_bytes"]) == (12, fixed, 24 * 2 * head)
    line = generation.cells({**row, "peak_bytes": 0})[-1]
    assert line == f"{(fixed + 24 * 2 * head) / 1e6:.1f} + 0.125 KiB a token"


def test_the_teacher_is_the_base_model_in_the_same_memory() -> None:
    base = tiny_model()
    ids = torch.randint(6, 300, (1, 30))
    with torch.no_grad():
        expected = base(ids).logits
        student = convert(base, AttentionConfig(window_size=8, feature_dim=8))
        teacher = plain_teacher(student)
        assert not hasattr(teacher.config, "lolcats")
        torch.testing.assert_close(teacher(ids).logits, expected)
    assert teacher.lm_head.weight.data_ptr() == student.lm_head.weight.data_ptr()


def test_what_comes_too_late_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances one second per reading."""
    seconds = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr(bench, "time", clock)
    rows = list(benchmark(tiny(), Options((1, 2), prompt=4, new=10, peers=("sdpa",), seconds=0)))
    assert {row["missing"] for row in rows} == {"no time left"}
    rows = list(benchmark(tiny(), Options((1,), prompt=4, new=100_000, seconds=20)))
    assert 10 < rows[0]["new"] < 30


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "Engine", type("Engine", (), {"__init__": no_memory}))
    assert [row["missing"] for row in benchmark(tiny(), Options((4,), prompt=4, new=10))] == ["out of memory"]


def test_command_adds_to_its_files(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        small = ("--prompt", "10", "--new", "6", "--peer-new", "4", "--out", str(tmp_path / "g.json"))
        result = CliRunner().invoke(app, ["bench", *arguments, *small, "--set", "attention.feature_dim=8"])
        assert result.exit_code == 0, result.output
        return result.output

    run("--random", "tiny", "--batches", "1,2")
    run("--random", "tiny", "--batches", "2", "--peers", "", "--state-dtype", "bfloat16", "--set",
        "attention.key_maps=per_kv_head")  # fmt: skip
    shown = run("--random", "tiny", "--batches", "2", "--peers", "")
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [(r["system"], r["key_maps"], r["state_dtype"], r["batch"]) for r in rows] == [
        ("engine", "per_kv_head", "bfloat16", 2), ("engine", "per_query_head", "float32", 1),
        ("engine", "per_query_head", "float32", 2), ("sdpa", None, None, 1), ("sdpa", None, None, 2),
    ]  # fmt: skip
    text = (tmp_path / "g.md").read_text()
    assert text.strip() in shown
    assert text.count("\n| engine | ") == 3
    assert "| engine | per kv head | bfloat16 | 2 | 6 | " in text
    assert (tmp_path / "g.png").stat().st_size > 10_000


def test_a_saved_model_and_mistakes(tmp_path: Path, tokenizer: Any) -> None:
    lolcats.convert(tiny_model(), AttentionConfig(window_size=8, feature_dim=8)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    small = ["--prompt", "4", "--new", "4", "--batches", "1", "--out", str(tmp_path / "g.json")]
    assert CliRunner().invoke(app, ["bench", str(tmp_path / "m"), *small]).exit_code == 0
    for wrong in ([], ["m", "--random", "tiny"], ["--random", "no"], ["--random", "tiny", "--peers", "x"],
                  ["--random", "tiny", "--batches", "0"], ["--random", "tiny", "--state-dtype", "int8"]):  # fmt: skip
        assert CliRunner().invoke(app, ["bench", *wrong, "--out", str(tmp_path / "no.json")]).exit_code == 2
