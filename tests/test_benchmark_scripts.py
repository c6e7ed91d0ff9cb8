"""The benchmark scripts run, at sizes too small to measure anything."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import sentence
from support.interpreted import DEVICE
from support.scripts import FOLDER, script

from lolcats.attention import use_backend
from lolcats.config import load_config
from lolcats.selection.result import Point, Selection
from lolcats.weights.base import find_base, with_content


@pytest.fixture(scope="module")
def training() -> ModuleType:
    return script("training")


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return script("scale")


def test_random_weights_are_those_of_seed_and_name(scale: ModuleType) -> None:
    wanted = {"a.weight": torch.empty(6, 4, device="meta"), "a.norm.weight": torch.empty(4, device="meta"),
              "a.bias": torch.empty(4, device="meta"), "b.weight": torch.empty(6, 4, device="meta")}  # fmt: skip
    first = scale.Random(3, std=0.1).read(wanted, torch.device("cpu"))
    again = scale.Random(3, std=0.1).read(dict(reversed(wanted.items())), torch.device("cpu"))
    assert all(torch.equal(first[n], again[n]) for n in wanted)
    assert not torch.equal(first["a.weight"], first["b.weight"])
    assert not torch.equal(first["a.weight"], scale.Random(4, std=0.1).read(wanted, torch.device("cpu"))["a.weight"])
    assert first["a.weight"].std() == pytest.approx(0.1, rel=0.5)
    assert (first["a.norm.weight"] == 1).all()
    assert (first["a.bias"] == 0).all()


def test_a_part_that_is_missing_says_why() -> None:
    common = script("common")

    def too_large() -> dict[str, int]:
        raise torch.OutOfMemoryError

    later = time.monotonic() + 100
    assert common.attempt(lambda: {"found": 1}, later) == {"found": 1}
    assert common.attempt(too_large, later) == {"missing": "out of memory"}
    assert common.attempt(too_large, 0) == {"missing": "no time left"}


@pytest.mark.parametrize(
    "name",
    ["training", "scale", "multi_gpu", "attention", "long_range", "training_steps", "large", "large_405B"],
)
def test_committed_tables_are_those_of_their_results(name: str) -> None:
    """Reading the JSON and writing its table again changes nothing."""
    if name == "attention":
        pytest.importorskip("triton")
    if not (FOLDER / "results" / f"{name}.json").exists():
        pytest.skip("not measured yet")
    common, module = script("common"), script(name.removesuffix("_405B"))
    results = common.read(FOLDER / "results", name)
    assert module.report(results) == (FOLDER / "results" / f"{name}.md").read_text()


def test_sections_of_another_gpu_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those that stay keep the heading of the GPU that measured them."""
    pytest.importorskip("triton")
    attention = script("attention")
    monkeypatch.setattr(
        attention, "sections", lambda _: {name: ("n", lambda name=name: iter([[name]])) for name in ("One", "Two")}
    )
    for device, only in (("an H100", ""), ("an H200", "Two")):
        monkeypatch.setattr(attention.common, "hardware", lambda _, device=device: device)
        results = attention.run(tmp_path, [], only)
    assert results["device"] == "an H100"
    assert [section.get("device") for section in results["sections"].values()] == [None, "an H200"]
    table = (tmp_path / "attention.md").read_text()
    assert "`python benchmarks/attention.py`, an H100, torch" in table
    assert f"## Two\n{results['sections']['Two']['date']}, an H200\n" in table


def make_small(patch: pytest.MonkeyPatch, module: Any, heads: int, kv_heads: int) -> None:
    """Let a benchmark of the kernels take 20 tokens of small heads, in fp32."""
    problem = sys.modules["attention_problem"]
    sizes = {"DEVICE": torch.device(DEVICE), "H": heads, "G": kv_heads, "D": 16, "F_COLUMNS": 16}
    for name, value in sizes.items():
        patch.setattr(problem, name, value)
        if hasattr(module, name):
            patch.setattr(module, name, value)
    random = problem.Problem.random
    patch.setattr(problem.Problem, "random", lambda *given: random(*given, dtype=torch.float32))
    patch.setattr(module, "SHAPES", ((1, 20),))


def test_launches_of_the_state_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row ends in the fastest."""
    pytest.importorskip("triton")
    variants = script("attention_variants")
    make_small(monkeypatch, variants, heads=4, kv_heads=2)
    times = iter([9.0, 5.0, 7.0, 6.0])
    monkeypatch.setattr(variants, "replayed", lambda function: (function(), next(times))[1])
    rotated = variants.Problem.random(1, 40, 2)
    row = variants.row(rotated, "1 × 40", torch.ones(1, 4, 40, 16, device=DEVICE), "cuDNN, contiguous", 10.0)
    assert row == [
        "1 × 40", "after RoPE", "cuDNN, contiguous", "10.000", "9.000", "5.000", "7.000", "6.000", "4 warps, 1 stage",
        "2.00", "1.80",
    ]  # fmt: skip
    assert len(row) == len(variants.COLUMNS.split(" | "))
    times = iter([9.0, 5.0, 6.0, 7.0] * 2)
    kv, query = variants.seen_rows()
    assert kv == ["1 × 20", "kv", "9.000", "5.000", "6.000", "7.000", "4 warps, 2 stages", "1.80"]
    assert query[1] == "query"
    assert len(query) == len(variants.SEEN_COLUMNS.split(" | "))


def test_maps_before_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to undo RoPE gives the same, and what is timed gives the wanted gradients."""
    pytest.importorskip("triton")
    rotary = script("attention_rotary")
    make_small(monkeypatch, rotary, heads=1, kv_heads=1)
    results: list[Any] = []
    monkeypatch.setattr(rotary, "replayed", lambda function: results.append(function()) or 2.0)
    with use_backend("triton"):
        tables = [list(rotary.rows()), list(rotary.alone_rows())]
    assert [len(row) for row in tables[0]] == [len(rotary.COLUMNS.split(" | "))] * 6
    assert [len(row) for row in tables[1]] == [len(rotary.ALONE_COLUMNS.split(" | "))]
    assert [row[2].split(":")[0] for row in tables[0][:3]] == ["forward", "stage 2", "stage 1"]
    for kernel, others in ((4, (1, 2, 3, 5)), (10, (7, 8, 9, 11)), (16, (13, 14, 15, 17)), (36, (38,)), (37, (39,))):
        for i in others:
            torch.testing.assert_close(results[i], results[kernel], atol=1e-4, rtol=1e-3)


def test_counts_are_those_of_the_page() -> None:
    page = (FOLDER.parent / "docs" / "theory" / "kernels.md").read_text(encoding="utf-8")
    assert script("attention_counts").report() in page


def test_every_part(training: ModuleType, tmp_path: Path) -> None:
    results = training.run(training.TINY, torch.device("cpu"), 100, tmp_path)
    training.draw(results, tmp_path)
    assert json.loads((tmp_path / "training.json").read_text()) == results
    assert not [name for name, part in results["parts"].items() if "missing" in part]
    assert len(results["parts"]) == (tmp_path / "training.md").read_text().count(" | 256 | ")


def test_some_parts_beside_those_measured_before(training: ModuleType, tmp_path: Path) -> None:
    first = training.run(training.TINY, torch.device("cpu"), 100, tmp_path, "teacher|softmax")
    assert list(first["parts"]) == ["teacher, forward alone", "stage 2, softmax attention"]
    second = training.run(training.TINY, torch.device("cpu"), 100, tmp_path, "teacher|in front")
    assert list(second["parts"]) == [
        "teacher, forward alone", "stage 1, maps in front of RoPE", "stage 2, maps in front of RoPE",
        "stage 2, softmax attention",
    ]  # fmt: skip
    kept, again = ([x["parts"][name]["seconds"] for x in (first, second)] for name in list(first["parts"])[::-1])
    assert kept[0] == kept[1]
    assert again[0] != again[1]
    assert json.loads((tmp_path / "training.json").read_text()) == second
    with pytest.raises(SystemExit, match="measure all parts"):
        training.run(replace(training.TINY, steps=1), torch.device("cpu"), 100, tmp_path, "teacher")


def test_nothing_starts_after_the_deadline(training: ModuleType, tmp_path: Path) -> None:
    results = training.run(training.TINY, torch.device("cpu"), 0, tmp_path)
    assert {part["missing"] for part in results["parts"].values()} == {"no time left"}
    assert "no time left" in (tmp_path / "training.md").read_text()


def test_needs_a_gpu_and_says_so(training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["training.py"])
    with pytest.raises(SystemExit, match="needs a CUDA"):
        training.main()
    monkeypatch.setattr(sys, "argv", ["training.py", "--tiny"])
    with pytest.raises(SystemExit, match="--out"):
        training.main()


def test_long_range(model_dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    module, books = script("long_range"), tmp_path / "books.jsonl"
    words = random.Random(0)
    books.write_text("".join(json.dumps({"text": sentence(words, 2500)}) + "\n" for _ in range(2)))
    command = [
        "long_range.py", str(model_dirs["llama"]), "--train", str(books), "--held-out", str(books), "--layers", "1",
        "--rows", "2", "--test-rows", "1", "--steps", "3", "--tiny", "--work", str(tmp_path / "work"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="--out"):
        module.main()
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out")])
    module.main()
    results = json.loads((tmp_path / "out" / "long_range.json").read_text())
    assert module.report(results) == (tmp_path / "out" / "long_range.md").read_text()
    found = results["errors"]["1"]
    assert len(found) == 7
    assert len({tuple(x) for x in found.values()}) == 7
    assert all(0 < error < 10 for row in found.values() for error in row)
    assert results["positions"] == ["128 to 255", "256 to 511"]
    capsys.readouterr()
    module.main()  # nothing is done again
    assert "layer 1" not in capsys.readouterr().out


@pytest.mark.slow
def test_several_gpus(tmp_path: Path) -> None:
    """All parts on one and two processes, from the same weights: the same losses, tokens and chosen heads."""
    subprocess.run(
        [sys.executable, FOLDER / "multi_gpu.py", "--tiny", "--out", tmp_path, "--deadline", "400",
         "--layers-per-unit", "1", "2", "--staging", "nccl", "--against", FOLDER.parent], check=True
    )  # fmt: skip
    results = json.loads((tmp_path / "multi_gpu.json").read_text())
    assert not results["failures"]
    both, sharded = {"stage 1", "stage 2", "stage 2 with KL", "large stage 2", "generation"}, "stage 2, sharded"
    staged = results["parts"].pop(f"{sharded}, nccl buffers")["2"]
    assert staged["loss_difference"] < 1e-4 if "losses" in staged else staged["missing"] == "not in this PyTorch"
    search = results["parts"].pop("selection")
    assert search["2"]["same"]
    assert search["2"]["speed_up"] > 0
    several = f"{sharded}, 2 layers a unit"
    assert set(results["parts"]) == both | {sharded, several, f"{sharded}, larger", "stage 2 with KL, sharded"}
    for name, counts in (("stage 2", ("1", "2")), (sharded, ("2",)), (several, ("2",))):
        for count in counts:
            assert results["parts"][name][count]["ratio"] > 0
    for name, part in results["parts"].items():
        assert set(part) == ({"1", "2"} if name in both else {"2"}), name
        if name != "generation":
            losses = part["2"]["losses"]
            assert losses[-1] < (0.9 * losses[0] if "KL" in name else losses[0] - 1e-4), name
            assert part["2"]["efficiency"] > 0
            if not name.endswith("larger"):  # which trains on more rows
                assert part["2"]["loss_difference"] < 1e-4
    profile = results["parts"][sharded]["2"]["profile"]
    hooks = {name: calls for name, calls, _ in profile["hooks"]}
    assert hooks["FSDP::pre_forward"] == 6  # norm, embedding, two layers, head and head recomputed
    assert hooks["FSDP::all_gather"] == 6  # all but the head once, and the first layer again
    assert all(calls > 0 and time > 0 for _, calls, time in (*profile["host"], *profile["hooks"]))
    for rows, batch in results["parts"]["generation"]["2"]["batches"].items():
        assert batch["first_row"] == results["parts"]["generation"]["1"]["batches"][rows]["first_row"]
    assert (tmp_path / "multi_gpu.md").read_text().count("| 2 |") >= 4


def test_what_communication_hides() -> None:
    """10 ms: computing from 0 to 4 (partly twice) and 6 to 8, communication from 3 to 6 and 9 to 10, 1 of 4 hidden."""
    profiles = script("profiles")
    kernels = [("gemm", (0.0, 3.0)), ("norm", (2.0, 4.0)), ("ncclDevKernel_AllGather", (3.0, 6.0)),
               ("gemm", (6.0, 8.0)), ("ncclDevKernel_AllReduce", (9.0, 10.0))]  # fmt: skip
    assert profiles.spans(kernels) == {
        "milliseconds": 10.0, "busy": 9.0, "computing": 6.0, "communication": 4.0, "communication_hidden": 0.25,
    }  # fmt: skip
    assert set(profiles.spans([]).values()) == {0.0}


@pytest.mark.parametrize("name", ["one_node.sh", "slurm.sbatch", "slurm_blocks.sbatch"])
def test_launch_files_are_bash(name: str) -> None:
    path = Path(__file__).parent.parent / "examples" / "launch" / name
    subprocess.run(["bash", "-n", path], check=True)
    done = subprocess.run(["bash", path], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0
    assert "MODEL: a " in done.stderr  # nothing starts without a model


def test_several_gpus_need_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["multi_gpu.py", "--tiny"])
    with pytest.raises(SystemExit, match="choose another --out"):
        script("multi_gpu").main()


def test_scale(scale: ModuleType, tmp_path: Path) -> None:
    results = scale.measure(scale.TINY, torch.device("cpu"), 100, tmp_path)
    assert json.loads((tmp_path / "scale.json").read_text()) == results
    found = results["geometries"]["tiny"]
    assert (found["layers_run"], found["complete"], found["tokens"]) == (3, True, 4 * 2 * 64)
    assert len(found["turn_seconds"]) == 3
    assert found["layer_bytes"] == 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64)
    assert "| tiny | 3 of 5 | 512 |" in (tmp_path / "scale.md").read_text()


def test_hours_of_a_whole_run(scale: ModuleType) -> None:
    """70B at 3 GB/s in 20 chunks; if reading takes longer than computing, it determines the time."""
    geometry = scale.GEOMETRIES["Llama 3.1 70B"]
    found = {"step_seconds": 0.03, "evaluation_seconds": 0.01, "layer_bytes": 1.8e9, "copy_bytes_per_second": 50e9}
    run = scale.Run(tokens=8192 * 2000, chunk_tokens=8192 * 100)
    whole = scale.whole_run(geometry, found, run)
    training, validation, reading, copying = 60.0, 40 * 4 * 0.01, 20 * 0.6, 20 * 0.036
    assert whole["chunks"] == 20
    assert whole["hours"] == pytest.approx(80 * (training + validation + copying) / 3600)
    slow = scale.whole_run(geometry, {**found, "step_seconds": 0.001}, run)
    assert slow["hours"] == pytest.approx(80 * (reading + copying) / 3600)


def test_scale_stops_at_its_deadline(scale: ModuleType, tmp_path: Path) -> None:
    results = scale.measure(scale.TINY, torch.device("cpu"), 0, tmp_path)
    assert results["geometries"]["tiny"]["missing"] == "no time left"
    bench = scale.Bench(scale.TINY["tiny"], torch.device("cpu"), 0, tmp_path)
    assert bench.run() == {"missing": "no time left"}
    assert "no time left" in (tmp_path / "scale.md").read_text()


def test_kept_heads(tmp_path: Path) -> None:
    module, out = script("kept_heads"), tmp_path / "kept.json"
    results = module.main(["--tiny", "--context", "200", "--batch", "2,3", "--steps", "3", "--out", str(out)])
    assert json.loads(out.read_text()) == results
    assert [row["part_after"] for row in results["check"]] == [[None, None]] * 2
    assert [row["running"] for row in results["speed"]] == [2, 3] * 3
    sizes = {row["kept"]: row["bytes_per_sequence"] for row in results["speed"]}
    assert sizes["all"] > sizes["eighth"] > sizes["none"]
    table = module.compared([*results["speed"], {"kept": "none", "batch": 0, "missing": "out of memory"}])
    assert table.count("\n") == 8
    assert "| all | 2 |" in table
    with pytest.raises(SystemExit):
        module.main(["--help"])


def test_selection(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    draw = random.Random(0)
    text.write_text(" ".join(sentence(draw, 8) for _ in range(400)))
    results = script("selection").main([
        str(model_dirs["llama"]), "--text", str(text), "--heads", "2", "--lengths", "512", "--search-lengths", "1536",
        "--answers", "5", "--tasks", "needle", "--random", "1", "--name", "tiny", "--out", str(tmp_path),
    ])  # fmt: skip
    rows = {(row["how"], row["count"]): row for row in results["rows"]}
    assert list(rows) == [
        ("all: the teacher", 4), ("one by one", 2), ("none", 0), ("whole layers", 2), ("steepest slopes", 2),
        ("single drop", 2), ("random 0", 2),
    ]  # fmt: skip
    assert rows["all: the teacher", 4]["loss"] == pytest.approx(0, abs=1e-6)
    assert all(sum(map(len, row["heads"].values())) == row["count"] for row in rows.values())
    assert rows["one by one", 2]["loss"] < rows["none", 0]["loss"]
    assert json.loads((tmp_path / "selection-tiny.json").read_text())["rows"] == results["rows"]
    assert (tmp_path / "selection-tiny.md").read_text().count("\n| ") == len(rows) + 1


def test_selection_takes_the_sets_of_a_file(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    text, file = tmp_path / "book.txt", tmp_path / "selection.yaml"
    draw = random.Random(0)
    text.write_text(" ".join(sentence(draw, 8) for _ in range(400)))
    model = model_dirs["llama"]
    point = Point({"1": [0]}, 1.0, {"codes": 0.0}, 64)
    Selection(with_content(find_base(str(model))).record, {}, point.heads, [point]).write(file)
    words = [
        str(model), "--text", str(text), "--lengths", "512", "--search-lengths", "1536", "--answers", "5", "--tasks",
        "needle", "--rows", "found", "--selection", str(file), "--name", "tiny", "--out", str(tmp_path), "--heads",
    ]  # fmt: skip
    results = script("selection").main([*words, "1"])
    assert [(row["how"], row["heads"], row["seconds"]) for row in results["rows"]] == [
        ("one by one", point.heads, None)
    ]
    results = script("selection").main([*words, "1", "--rows", "none,controls,random", "--random", "1"])
    assert [row["how"] for row in results["rows"]] == ["none", "steepest slopes", "single drop", "random 0"]
    script("selection").main([*words, "1", "--rows", "none", "--minutes", "0"])
    assert json.loads((tmp_path / "selection-tiny.json").read_text())["missing"] == ["none"]
    assert "Not measured for lack of time: none." in (tmp_path / "selection-tiny.md").read_text()
    with pytest.raises(SystemExit, match=r"no set of 3 heads\. Numbers it has: 1"):
        script("selection").main([*words, "3"])


def test_time_of_a_search() -> None:
    module = script("selection")
    results = module.main(["--shape", "tiny", "--heads", "2", "--search-lengths", "512"])
    assert results["heads"] == "2 of 4"
    assert results["tokens"] == 511 * len(module.prompt_plan([512]))
    assert results["passes"] > 4
    with pytest.raises(SystemExit):
        module.main(["--heads", "2"])


def test_kept_training(tmp_path: Path) -> None:
    out = tmp_path / "kept.json"
    results = script("kept_training").main(["--tiny", "--length", "64", "--turns", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == results
    assert set(results["ratios"]) == {"transfer", "finetune"}
    assert {len(times) for times in results["ms"].values()} == {1}
    assert len(results["ms"]) == 4


def test_vllm_batch(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    script("vllm_batch").main(["--tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "vllm_batch.json").read_text())
    (row,) = results["decoding"]
    checks = "graph's outputs equal", "graph's states equal", "padding touched nothing"
    assert all(row[name] is True for name in checks)
    assert results["mixed"]["relative error"] < 1e-5
    page = (tmp_path / "vllm_batch.md").read_text()
    assert "| 2 | " in page
    assert "vLLM was not run." in page
    assert "padding touches no state: yes." in page


def test_vllm_batch_without_time(tmp_path: Path) -> None:
    """Each part that is left out says so, and no check counts as passed."""
    script("vllm_batch").main(["--tiny", "--seconds", "0", "--out", str(tmp_path)])
    page = (tmp_path / "vllm_batch.md").read_text()
    assert "| 2 | no time left | " in page
    assert "padding touches no state: not checked." in page
    assert "Mixed batches: no time left." in page


def test_training_steps_of_two_builds(tmp_path: Path) -> None:
    """Medians of all steps and of each process, and the ratio of the builds; what is missing says why."""
    module = script("training_steps")

    def process(*milliseconds: float) -> dict[str, Any]:
        return {
            "seconds": [x / 1e3 for x in milliseconds], "tokens": 8192, "peak_gib": 10.0, "busy_ms": 7.0,
            "total_seconds": 30.0, "losses": [], "device": "a GPU", "versions": {"torch": "2.11"},
        }  # fmt: skip

    warned = {**process(20), "losses": [1.5, 1.25], "warnings": ["no graph"]}
    found = {"rows": {
        "a": {"commit": "def", "against": "abc", "this": [process(10, 12), process(11, 11)],
              "other": [process(33, 33), process(30, 36)]},
        "b": {"commit": "def", "against": "abc", "this": [{"missing": "out of memory"}], "other": []},
        "c": {"commit": "def", "against": "", "this": [warned], "other": []},
    }}  # fmt: skip
    table = module.report(found)
    assert (
        "| a | 11.0 (11.0 to 11.0) | def | 33.0 (33.0 to 33.0) | abc | 3.00 | 744,727 | 7 | 10.0 / 10.0 | 30 |" in table
    )
    assert "| b | out of memory | def |" in table
    assert "| c | this | 1.5000, 1.2500 |" in table
    assert "c warned: no graph" in table
    for name, row in {**module.rows(), **module.tiny_rows()}.items():
        assert row.size in module.SIZES, name
        load_config(
            "paper-sinks",
            [f"{row.stage}.batch_size={row.batch}" for _ in range(row.stage != "peft")] + list(row.settings),
        )
        assert (row.then is None) == (row.stage == "peft")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny, stage 1", "tiny, stage 2", "tiny, PEFT and Trainer"])
def test_a_process_of_training_steps(name: str) -> None:
    module = script("training_steps")
    found = module.measured(module.tiny_rows()[name], module.ROOT, steps=2, losses=True)
    assert len(found["seconds"]) == 2
    assert len(found["losses"]) == module.WARM + 3
    assert found["total_seconds"] > sum(found["seconds"]) > 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_operations_of_a_layer(family: str) -> None:
    """LoRA costs products and nothing else: four casts for each of four layers are gone, and so are their sums."""
    module = script("operations")
    found = module.per_layer(family)
    assert found["addmm_"] == 8
    assert found["_to_copy"] == 8, "those of the norms"
    assert sum(found.values()) <= 122
