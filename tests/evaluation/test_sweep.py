"""``lolcats sweep``: rows and seeds of a file, resuming, and one loaded model that no row changes."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from conftest import SETTINGS
from support.local_data import FILES
from typer.testing import CliRunner

from lolcats.cli import app
from lolcats.config import load_config, to_dict
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.files import append_line, locked, read_json_lines
from lolcats.lab.sweep import execute, measure, row
from lolcats.lab.sweep.execute import run_sweep
from lolcats.lab.sweep.measure import Measurement
from lolcats.lab.sweep.plan import Evaluate, Sweep, plan, read_sweep
from lolcats.run import Run

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
FEW = ["transfer.max_steps=2", "finetune.max_steps=2", "transfer.eval_steps=2"]
ROWS = {
    "linear, trained late": [
        "attention.kind=linear",
        "transfer.max_steps=0",
        "finetune.feature_map_learning_rate=1e-2",
    ],
    "hybrid": ["controls=[window_lora]"],
}


@pytest.fixture
def file(tmp_path: Path, chat_file: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    tree = {"title": "Tiny", "base": {"recipe": "paper-sinks", "set": [*SETTINGS, *FEW]}, "rows": ROWS, "seeds": [0],
            "evaluate": {"perplexity": {"chat": str(chat_file), "other": ""}, "tasks": ["positions"],
                         "lengths": [96], "limit": 1}}  # fmt: skip
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture
def place(model_dirs, chat_file: Path) -> list[str]:
    return [f"base.model={model_dirs['llama']}", f"base.data={chat_file}"]


def run(sweep: Sweep, out: Path, **more: float) -> tuple[list[dict], str]:
    said: list[str] = []
    results = run_sweep(sweep, out, "lolcats sweep", said.append, **more)
    return results, "\n".join(said)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments(path: Path) -> None:
    text = path.read_text()
    assert "/" not in text.replace("recipes/", ""), "no path in a sweep's file"
    rows = plan(read_sweep(path))
    assert len({(row.name, row.config.seed) for row in rows}) == len(rows) > 1
    for one in rows:
        rows_each = 8 * 1024 // one.config.data.sequence_length
        assert one.config.transfer.batch_size == one.config.finetune.batch_size == rows_each
        assert one.tokens("transfer") is not None
        assert one.tokens("finetune") >= 900_000
    everything = [*FEW, "seeds=[3]"]
    assert {(r.config.seed, r.tokens("finetune")) for r in plan(read_sweep(path, everything))} == {(3, 2 * 8 * 1024)}


def test_grid_seeds_and_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    grid = [["attention.sinks=0", "attention.sinks=4"], ["attention.window=sliding", "attention.window=terraced"]]
    path.write_text(yaml.safe_dump({"grid": grid, "seeds": [0, 1]}))
    rows = plan(read_sweep(path, ["data.test_rows=5"]))
    assert [row.name for row in rows[:4]] == [
        "sinks=0, window=sliding", "sinks=0, window=terraced", "sinks=4, window=sliding", "sinks=4, window=terraced",
    ]  # fmt: skip
    assert [row.config.seed for row in rows] == [0] * 4 + [1] * 4
    assert {row.config.data.test_rows for row in rows} == {5}
    output = CliRunner().invoke(app, ["sweep", str(path), "--dry-run"]).output
    assert "sinks=4, window=sliding" in output
    output = CliRunner().invoke(app, ["sweep", str(path), *map(str, EXPERIMENTS[:2]), "a-model", "--dry-run"]).output
    titles = [read_sweep(experiment).title.split()[0] for experiment in EXPERIMENTS[:2]]
    assert all(text in output for text in ("sinks=4, window=sliding", *titles))
    for tree, message in (
        ({}, "no rows"),
        ({"rows": {"a": ["attention.sinks=x"]}}, "Row 'a': attention.sinks: expected int"),
        ({"rows": {"a": ["base.data=b"]}}, "'b' is not in base.sources"),
        ({"row": {}}, "Did you mean rows"),
    ):
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        with pytest.raises(LolcatsError, match=message):
            read_sweep(path)
    path.write_text(yaml.safe_dump({"rows": {"a": []}}))
    for given, message in (([], "no base model"), (["base.model=x"], "give --data DATA")):
        with pytest.raises(LolcatsError, match=message):
            run(read_sweep(path, given), tmp_path / "out")


def test_sweep_resumes_and_skips(file: Path, place: list[str], tmp_path: Path, monkeypatch) -> None:
    """Killed while a row trains (with a half-written last line) and while it is measured: the same command resumes."""
    book = tmp_path / "book.txt"
    book.write_text(FILES["long_books"][0]["text"])
    sweep, out = read_sweep(file, [*place, f"evaluate.text={book}"]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(row, "run_finetune", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(sweep, out)
    assert len(read_json_lines(out / "results.jsonl")) == 2
    with (out / "results.jsonl").open("a") as torn:
        torn.write('{"row": "half')
    with monkeypatch.context() as patch:
        patch.setattr(Measurement, "_task", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(sweep, out)
    (stopped,) = (json.loads(path.read_text())["results"] for path in out.glob("*/run.json"))
    (found,) = (result for name, result in stopped.items() if name.endswith("student: perplexities"))
    results, said = run(sweep, out)
    kept = results[2]["systems"]["student"]
    assert found["found"] == {"chat": kept["chat"]}
    assert "positions nll 0-63" in kept
    for name in ("window, nothing trained", "window + sinks, nothing trained"):
        assert set(results[2]["systems"][name]) == {"held-out", "chat"}, "measured before it was stopped"
    assert "2 of 5 results are in" in said
    assert "No perplexity on other" in said
    names = ["teacher", "window + sinks, nothing trained", "linear, trained late", None, "hybrid"]
    assert [r.get("name") for r in results] == names
    assert [r["kind"] for r in results] == ["untrained", "untrained", "row", "control", "row"]
    lines = (out / "results.jsonl").read_text()
    assert execute.with_controls([json.loads(line) for line in lines.splitlines()], results) == results

    hybrid = results[4]
    assert set(hybrid["systems"]) == {
        "teacher", "window, nothing trained", "window + sinks, nothing trained", "student", "linear off", "window+lora",
    }  # fmt: skip
    measured = {"held-out", "chat", "positions nll 0-63"}
    for name in ("student", "window+lora"):
        assert measured <= set(hybrid["systems"][name])
    for name in ("linear off", "window, nothing trained", "window + sinks, nothing trained"):
        assert set(hybrid["systems"][name]) == {"held-out", "chat"}
    assert measured - {"held-out"} <= set(results[0]["systems"]["teacher"])
    assert (hybrid["tokens"], hybrid["seed"]) == ({"transfer": 256, "finetune": 256}, 0)
    assert (results[2]["tokens"], results[3]["tokens"]) == ({"transfer": 0, "finetune": 256},) * 2
    assert len(hybrid["layer_errors"]["after"]) == len(hybrid["gamma"]) == 2
    assert {"commit", "date", "hardware", "command", "versions"} <= set(hybrid)
    chat = hybrid["systems"]["student"]["chat"]
    assert chat["value"] == pytest.approx(math.exp(sum(chat["items"]) / len(chat["items"])), rel=1e-4)
    assert chat["stderr"] > 0

    again, said = run(sweep, out)
    assert (again, (out / "results.jsonl").read_text()) == (results, lines)
    assert "5 of 5 results" in said
    more = read_sweep(file, [*place, f"evaluate.text={book}", "seeds=[0, 1]", "evaluate.tasks=[]"])
    assert len(run(more, tmp_path / "seeds")[0]) == 8
    table = (tmp_path / "seeds" / "table.md").read_text()
    student = next(line for line in table.splitlines() if line.startswith("| hybrid | 2 |"))
    assert "±" in student
    assert "| window+lora |" in table


def test_deadline_lets_no_row_begin_that_would_not_end(file: Path, place: list[str], tmp_path: Path) -> None:
    """First nothing is known about a row's time, then an earlier row's seconds per token and for the rest."""
    sweep = read_sweep(file, [*place, "evaluate.tasks=[]", "evaluate.perplexity={}"])
    out = tmp_path / "out"
    results, said = run(sweep, out, deadline=-1.0)
    assert results == []
    assert said.count("Deadline: ") == said.count("s are left") == 5
    assert "Missing results: 5. Run the same command again to continue" in said

    first, second = plan(sweep)

    def known(tokens: int, seconds: float, rest: float) -> dict:
        return {"kind": "row", "hardware": execute.hardware(), "tokens": {"transfer": 0, "finetune": tokens},
                "seconds": {"finetune": seconds, "all": seconds + rest}, "transfer_of": ""}  # fmt: skip

    assert execute.expected_seconds(second, []) == 0
    assert execute.expected_seconds(first, [known(128, 50.0, 7.0)]) == pytest.approx(2 * 50 + 7)
    assert execute.expected_seconds(second, [known(128, 50.0, 7.0)]) == pytest.approx(4 * 50 + 7), "as fast as stage 2"
    other = {**known(128, 1e9, 0.0), "hardware": "another machine"}
    assert execute.expected_seconds(first, [other]) == 0
    slow = {**known(1, 1000.0, 1.0), "row": "x", "evaluation": "y", "systems": {"student": {}}}
    append_line(out / "results.jsonl", json.dumps(slow))
    results, said = run(sweep, out, deadline=500.0)
    assert [r["kind"] for r in results] == ["untrained", "untrained"]
    assert "needs about 256001 s, only" in said


def test_equal_runs_are_made_once(file: Path, place: list[str], tmp_path: Path, monkeypatch) -> None:
    """A run under another name, a control and a stage 1 of several rows: each is as if it had been run separately."""
    rows = {
        "a": ["controls=[window_lora, teacher_lora]"],
        "the same": ["controls=[window_lora]", "finetune.sharding=always"],  # which changes no result
        "another rank": ["finetune.rank=2"],
        "own maps": ["attention.feature_map=t2r", "controls=[window_lora]"],
        "late maps": ["finetune.feature_map_learning_rate=1e-2"],
    }
    changes = [*place, "evaluate.tasks=[]", "evaluate.perplexity={}"]
    sweep = replace(read_sweep(file, changes), rows=rows)
    trained: list[str] = []
    train = row.run_transfer
    monkeypatch.setattr(row, "run_transfer", lambda s: trained.append(s.run.stage_done("transfer")) or train(s))
    results, _ = run(sweep, tmp_path / "out")
    kinds = [r["kind"] for r in results]
    assert kinds == ["untrained"] * 2 + ["control"] * 2 + ["row"] * 5
    # controls have no stage 1; rows "a" and "own maps" train it
    assert trained == [False, False, False, True, False, True]
    by_name = {r["name"]: r for r in results if r["kind"] == "row"}
    assert by_name["the same"]["directory"] == by_name["a"]["directory"]
    for name in ("another rank", "late maps"):
        assert by_name[name]["transfer_of"] == by_name["a"]["directory"]
    control = by_name["a"]["systems"]["window+lora"]
    assert control == by_name["own maps"]["systems"]["window+lora"] == results[2]["systems"]["student"]
    assert by_name["a"]["systems"]["teacher+lora"] == results[3]["systems"]["student"]
    for name in ("another rank", "late maps"):
        single, _ = run(replace(sweep, rows={name: rows[name]}), tmp_path / name)
        assert single[-1]["systems"]["student"] == by_name[name]["systems"]["student"]
        assert single[-1]["layer_errors"] == by_name[name]["layer_errors"]
        for part in ("feature_maps.safetensors", "lora/adapter_model.safetensors"):
            ours, theirs = tmp_path / "out" / by_name[name]["directory"], tmp_path / name / single[-1]["directory"]
            assert (ours / part).read_bytes() == (theirs / part).read_bytes()


def test_a_stage_1_is_taken_also_where_stage_2_trains_its_maps_on(file: Path, place: list[str], tmp_path: Path) -> None:
    late = "finetune.feature_map_learning_rate=1e-2"
    rows = {"first": [late], "another rank": [late, "finetune.rank=2"], "frozen": []}
    sweep = replace(read_sweep(file, [*place, "evaluate.tasks=[]", "evaluate.perplexity={}"]), rows=rows)
    results, _ = run(sweep, tmp_path / "out")
    first, *others = (r for r in results if r["kind"] == "row")
    assert [r["transfer_of"] for r in others] == [first["directory"]] * 2
    for other in others:
        single, _ = run(replace(sweep, rows={other["name"]: rows[other["name"]]}), tmp_path / other["name"])
        assert single[-1]["transfer_of"] == ""
        assert single[-1]["systems"] == other["systems"]
        ours, theirs = tmp_path / "out" / other["directory"], tmp_path / other["name"] / single[-1]["directory"]
        assert (ours / "feature_maps.safetensors").read_bytes() == (theirs / "feature_maps.safetensors").read_bytes()


def test_rows_with_kept_heads(file: Path, place: list[str], tmp_path: Path) -> None:
    """A row's untrained windows and its control have its heads, its bytes count them; the untrained model has none."""
    sweep = read_sweep(file, [*place, "evaluate.tasks=[]"])
    kept = ["controls=[window_lora]", 'attention.softmax_heads={"0": [1], "1": [0, 1]}']
    rows = {"kept": kept, "plain": ["controls=[window_lora]"]}
    results, _ = run(replace(sweep, rows=rows), tmp_path / "out")
    own, plain = (next(r for r in results if r.get("name") == name) for name in rows)
    for name in ("window, nothing trained", "window + sinks, nothing trained"):
        assert name not in own["systems"]
        assert own["systems"][f"{name}, heads kept"]["chat"] != plain["systems"][name]["chat"]
    name = "window + sinks, nothing trained"
    assert results[1]["systems"][name]["chat"] == plain["systems"][name]["chat"], "whichever row is first"
    assert f"| – {name}, heads kept |" in (tmp_path / "out" / "table.md").read_text()
    assert own["bytes"]["8192"][1] > plain["bytes"]["8192"][1]
    assert own["bytes"]["8192"][0] == plain["bytes"]["8192"][0]
    single, _ = run(replace(sweep, rows={"plain": rows["plain"]}), tmp_path / "plain")
    assert single[-1]["systems"] == plain["systems"], "whatever rows stand before it"
    assert single[1]["row"] == results[1]["row"]
    config = plan(replace(sweep, rows=rows))[0].controls["window_lora"].config
    assert config.attention.softmax_heads == {"0": [1], "1": [0, 1]}
    assert own["systems"]["window+lora"] != plain["systems"]["window+lora"]


def test_divergence_from_the_teacher(file: Path, place: list[str], tmp_path: Path) -> None:
    """Measured where it is asked for; without it, results of earlier versions keep the key that they had."""
    book = tmp_path / "book.txt"
    book.write_text(FILES["long_books"][0]["text"])
    changes = [*place, f"evaluate.text={book}", "rows={hybrid: []}"]
    with_kl, without = (read_sweep(file, [*changes, f"evaluate.kl={kl}"]) for kl in ("true", "false"))
    results, _ = run(with_kl, tmp_path / "out")
    found = {r["name"]: next(iter(r["systems"].values())) for r in results[:2]} | {
        "hybrid": results[2]["systems"]["student"]
    }
    assert found["teacher"]["positions kl 0-63"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["hybrid"]["positions kl 64-95"]["value"] > 1e-6
    config = plan(without)[0].config
    said: list[str] = []
    inputs = Inputs(place[0].partition("=")[2])
    measurements = [Measurement(s.evaluate, inputs, config, said.append) for s in (with_kl, without)]
    keys, former = [each.key for each in measurements], measurements[1].former_key
    assert keys[0] != keys[1]
    assert keys[0] == results[2]["evaluation"]
    known = {
        **asdict(without.evaluate),
        "perplexity": {"chat": measure.source_identity(without.evaluate.perplexity["chat"])},
    }
    for name in ("kl", "data_dir", "text", "batch_size"):
        del known[name]
    assert former == measure.short_hash(known)


def test_processes_share_the_rows(file: Path, place: list[str], tmp_path: Path) -> None:
    """Another process runs one row: it is left to that process, or to the next command if that is killed."""
    sweep = read_sweep(file, [*place, "evaluate.tasks=[]", "evaluate.perplexity={}"])
    results, _ = run(sweep, tmp_path / "done")
    held = next(r for r in results if r.get("name") == "hybrid")
    with locked(tmp_path / "out" / "locks" / f"{held['row']}-{held['evaluation']}") as ours:
        assert ours
        results, said = run(sweep, tmp_path / "out")
        assert [r["kind"] for r in results] == ["untrained", "untrained", "row", "control"]
        assert "Missing results: 1" in said
    assert len(run(sweep, tmp_path / "out")[0]) == 5


def test_a_row_that_fails_does_not_stop_the_others(file: Path, place: list[str], tmp_path: Path) -> None:
    rows = "rows={wrong: [data.format=alpaca], fine: [transfer.max_steps=0]}"
    sweep = read_sweep(file, [*place, "evaluate.tasks=[]", "evaluate.perplexity={}", rows])
    with pytest.raises(LolcatsError, match=r"1 rows failed \(wrong, seed 0\). The results of the others are in "):
        run(sweep, tmp_path / "out")
    assert [result["name"] for result in read_json_lines(tmp_path / "out" / "results.jsonl")] == [
        "teacher", "window + sinks, nothing trained", "fine",
    ]  # fmt: skip


def test_no_state_leaks_between_rows(file: Path, place: list[str], tmp_path: Path) -> None:
    """After a row that trained everything, the second row ends with the weights and figures of a separate run."""
    changes = [*place, "evaluate.tasks=[]"]
    both, _ = run(read_sweep(file, changes), tmp_path / "both")
    alone, _ = run(read_sweep(file, [*changes, "rows={hybrid: ['controls=[window_lora]']}"]), tmp_path / "alone")
    assert both[-1]["systems"] == alone[-1]["systems"]
    for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors"):
        first, second = ((tmp_path / d / r["directory"] / name) for d, r in (("both", both[-1]), ("alone", alone[-1])))
        assert first.read_bytes() == second.read_bytes()


def test_inputs_are_read_once(model_dirs, chat_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lolcats.data.inputs as inputs
    from lolcats.config import DataConfig
    from lolcats.data.rows import load_data

    kept = Inputs(str(model_dirs["llama"]), keep=True)
    config = DataConfig(sequence_length=32, validation_rows=4, test_rows=4)
    first = kept.data(str(chat_file), config, 0)
    kept.model(execute.torch.float32, execute.torch.device("cpu")).lm_head.weight.data.zero_()
    monkeypatch.setattr(inputs, "tokenize_source", None)
    monkeypatch.setattr(inputs, "load_model", None)
    other = kept.data(str(chat_file), config, 1)
    assert first.fingerprint == load_data(str(chat_file), kept.tokenizer, config, 0).fingerprint
    assert other.fingerprint == load_data(str(chat_file), kept.tokenizer, config, 1).fingerprint != first.fingerprint
    assert kept.model(execute.torch.float32, execute.torch.device("cpu")).lm_head.weight.any()


def test_kept_results_keep_their_keys() -> None:
    """Results under benchmarks/quality are continued: a new setting must not change the key of a row without it."""
    path = next(path for path in EXPERIMENTS if path.stem == "sinks_and_maps")
    config = plan(read_sweep(path, ["base.model=m", "base.data=d"]))[0].config
    told = row._without(config, "controls", "device", "report_to")
    assert row.short_hash(told) == "9b5e32824069"
    attention = replace(config.attention, feature_inputs="unrotated")
    assert row._without(replace(config, attention=attention), "controls", "device", "report_to") != told


def test_first_stages_with_a_removed_setting_are_not_taken() -> None:
    config = to_dict(plan(read_sweep(EXPERIMENTS[0], ["base.model=m", "base.data=d"]))[0].config)
    old = {**config, "transfer": {**config["transfer"], "window_dropout": 0.0}}
    other = {**config, "transfer": {**config["transfer"], "window_dropout": 0.5}}
    base = {"path": "m", "fingerprint": "f", "form": "directory"}
    runs = [Run(Path(), {"base": base, "data": {"fingerprint": "d"}, "config": c}) for c in (config, old, other)]
    assert [row._same_transfer(run, runs[0]) for run in runs] == [True, True, False]


def test_lines_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append_line(path, "a")
    with path.open("a") as file:
        file.write("half")
    append_line(path, "b")
    assert path.read_text() == "a\nb\n"


def test_the_end_of_a_long_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lolcats.files.TAIL", 4)
    path = tmp_path / "lines"
    for begun, kept in (("", ""), ('{"row": "half', ""), ('{"row": "b"}', '{"row": "b"}\n')):
        for before in ("", '{"row": "a"}\n'):
            path.write_text(before + begun)
            append_line(path, '{"row": "c"}')
            assert path.read_text() == f'{before}{kept}{{"row": "c"}}\n'


def test_only_whole_results_are_read_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    whole, other = {"row": "a"}, {"row": "b"}
    for torn in ('{"row": "half', '{"row": "b"}', '{"row": "\xff'):
        path.write_bytes(f'{{"row": "a"}}\n{torn}'.encode("latin1"))
        kept = [whole, other] if torn.endswith("}") else [whole]
        assert execute._results(tmp_path) == kept
        append_line(path, '{"row": "c"}')
        assert execute._results(tmp_path) == [*kept, {"row": "c"}]
        path.write_bytes(b"\0\0\n" + path.read_bytes())
        assert execute._results(tmp_path) == [*kept, {"row": "c"}]
    assert "left out 1 unfinished or damaged line(s) (1); the other 2 are used" in caplog.text


def test_recall_is_measured_again_if_it_counts_something_else(
    model_dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """By the old definition only first answers counted; other windows leave other answers beyond them."""
    text = tmp_path / "book.txt"
    text.write_text("the cat sat on a warm mat " * 100)
    inputs = Inputs(str(model_dirs["llama"]))

    def keys(*changes: str) -> list[str]:
        wanted = [Evaluate(tasks=[task], text=str(text), lengths=[600]) for task in ("recall-passkey", "positions")]
        config = load_config("paper-sinks", list(changes))
        return [Measurement(each, inputs, config, lambda _: None).key for each in wanted]

    now, wider = keys(), keys("attention.window_size=128")
    monkeypatch.setattr(measure, "RECALL_COUNTS", "first answers")
    before = keys()
    assert len({now[0], wider[0], before[0]}) == 3
    assert now[1] == wider[1] == before[1]
