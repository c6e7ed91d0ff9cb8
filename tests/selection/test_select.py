"""``lolcats select``, its files, and runs that keep the heads it chose."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_model
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.config import AttentionConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.modeling.checkpoint import load
from lolcats.pipeline import linearize
from lolcats.run import Run
from lolcats.selection import Selection, Settings, problems, select, with_selection
from lolcats.selection.prompts import KINDS, prompts
from lolcats.selection.select import check_lengths, heads_in_budget, prompt_plan, where_to_record
from lolcats.weights import base as bases
from lolcats.weights.base import Base, find_base, load_model

MODULE = importlib.import_module("lolcats.selection.select")
WINDOW = ["attention.window_size=8", "attention.sinks=2"]
BASE = Base("model", "directory", "sha256-of-it")


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model_dir(model_dirs: dict[str, Path]) -> Path:
    return model_dirs["llama"]


@pytest.fixture(scope="module")
def selection_file(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command, with two of four heads."""
    path = tmp_path_factory.mktemp("selection") / "heads.yaml"
    done = command("select", model_dir, "--out", path, "--heads", 2, "--lengths", 2048, "--set", WINDOW[0], "--set",
                   WINDOW[1], "--picture", path.with_suffix(".png"))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "2 (chosen)" in done.output
    assert "4, the teacher" in done.output
    assert path.with_suffix(".png").stat().st_size > 1000
    return path


@pytest.mark.parametrize(("length", "solved"), [(2048, 1), (3000, 2), (8192, 3)])
def test_prompts_have_their_length_and_answers(tokenizer: Any, length: int, solved: int) -> None:
    made = prompts(tokenizer, [(kind, length) for kind in KINDS], "0")
    assert [(prompt.kind, len(prompt.ids)) for prompt in made] == [(kind, length) for kind in KINDS]
    for prompt in made:
        context = tokenizer.decode(prompt.ids[: prompt.answers[0][0]])
        answers = [tokenizer.decode(prompt.ids[a:b]).strip() for a, b in prompt.answers]
        if prompt.kind in ("codes", "facts", "ledger"):
            assert len(answers) > 3
            for start, _ in prompt.answers:  # what stands before an answer stood in the context, followed by it
                question = tokenizer.decode(prompt.ids[start - 8 : start])
                assert question in context or question in tokenizer.decode(prompt.ids[:start])
            assert all(answer in context for answer in answers)
        if prompt.kind == "passage":
            assert answers[0] in context
        if prompt.kind == "examples":  # new problems, solved in the form of those in the context
            assert len(answers) == solved
            assert not any(answer in context for answer in answers)
            assert all(f"\n{answer.splitlines()[-1].split()[0]} " in context for answer in answers)


@pytest.mark.parametrize(("problem", "solution"), [
    (problems.stall, lambda buyers, jars, price, hours, wage, rent: buyers * jars * price - hours * wage - rent),
    (problems.journey, lambda walk, times, bus, train, more, days: days * (walk + walk * times + bus + train + more)),
    (problems.shelves, lambda rows, each, boxes, in_box, broken, sold: rows * each + boxes * in_box - broken - sold),
])  # fmt: skip
def test_problems_are_solved_right_and_longer_than_a_window(problem: Any, solution: Any) -> None:
    """A word is at least a token."""
    assert problem in problems.PROBLEMS
    for seed in range(50):
        question, answer = problem(random.Random(seed))
        result = solution(*(int(number) for number in re.findall(r"\d+", question)))
        assert re.findall(r"\d+", answer)[-1] == str(result)
        assert result > 0
        assert len(f"{question} {answer}".split()) > 64 + 40


def test_prompts_are_the_same_for_the_same_seed_only(tokenizer: Any) -> None:
    plan = [(kind, 2048) for kind in KINDS]
    first, again, other = (prompts(tokenizer, plan, seed) for seed in ("0", "0", "1"))
    assert first == again
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))
    book = tokenizer("warm milk " * 400)["input_ids"]
    assert "warm milk warm milk" in tokenizer.decode(prompts(tokenizer, plan[:1], "0", book)[0].ids)


def test_prompts_that_are_too_short_are_refused(tokenizer: Any) -> None:
    """By words that a run may end in, too, which has no --lengths of its own."""
    with pytest.raises(
        LolcatsError, match=r"too few for a recall prompt: use longer ones \(lolcats select --lengths\)"
    ):
        prompts(tokenizer, [("examples", 600)], "0")
    with pytest.raises(LolcatsError, match="at least 512 tokens, and this model has only 400 positions"):
        check_lengths(Settings().lengths, tiny_model(max_position_embeddings=400))
    with pytest.raises(LolcatsError, match="at least 512 tokens: use longer --lengths"):
        check_lengths((400, 2048), tiny_model())


def test_plan_has_every_kind_at_the_longest_length() -> None:
    plan = prompt_plan([8192, 2048, 4096])
    assert {kind for kind, length in plan if length == 8192} == set(KINDS)
    assert [length for _, length in plan if length < 8192] == [2048, 2048, 4096, 4096]


@pytest.mark.parametrize(
    ("free", "need", "place"), [(16, 8, "cuda"), (15, 8, "cpu"), (18, 10, "cuda"), (17, 10, "cpu")]
)
def test_states_are_recorded_where_there_is_room(free: int, need: int, place: str, monkeypatch: Any) -> None:
    """On the GPU as much again and what is computed with have to fit beside them."""
    layers, tokens, width, itemsize = 2, 1, 2, 2  # 8 bytes
    embedding = SimpleNamespace(weight=torch.empty(3, width))
    model = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, get_input_embeddings=lambda: embedding)
    assert torch.bfloat16.itemsize == itemsize
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    scorer: Any = SimpleNamespace(model=model, blocks=[None] * layers, tokens=tokens)
    assert where_to_record(scorer, need).type == place


def test_budget_is_rounded_down() -> None:
    assert [heads_in_budget(0.125, n) for n in (3, 8, 56, 63)] == [1, 1, 7, 7]


@pytest.mark.parametrize("unit", ["head", "layer"])
def test_search_is_the_same_again_and_nested(tokenizer: Any, unit: Any) -> None:
    settings = Settings(unit, lengths=(2048,), beyond=2.0)
    attention = AttentionConfig(window_size=8, sinks=2)
    found, again = (select(tiny_model(), tokenizer, BASE, attention, 2, settings) for _ in range(2))
    assert found.heads == again.heads
    assert [point.loss for point in found.curve] == pytest.approx([point.loss for point in again.curve], rel=1e-4)
    assert [point.count for point in found.curve] == ([0, 1, 2, 3, 4, 4] if unit == "head" else [0, 2, 4, 4])
    *points, teacher = [{(layer, h) for layer, hs in p.heads.items() for h in hs} for p in found.curve]
    assert all(a <= b for a, b in itertools.pairwise(points))
    assert points[-1] == teacher
    assert found.curve[-2].loss == pytest.approx(0, abs=1e-5)
    assert teacher
    assert found.curve[-1].bytes_per_token == 4 * 2 * 8 * 4
    assert found.base["fingerprint"] == BASE.fingerprint


def test_file_is_checked_by_the_model(selection_file: Path, model_dir: Path, model_dirs: dict[str, Path]) -> None:
    selection = Selection.read(selection_file)
    assert sum(map(len, selection.heads.values())) == 2
    config = load_config("paper-sinks", WINDOW)
    chosen = with_selection(config, selection_file, find_base(str(model_dir)))
    assert chosen.attention.softmax_heads == selection.heads
    with pytest.raises(LolcatsError, match=r"was made for .* is another model"):
        with_selection(config, selection_file, find_base(str(model_dirs["qwen2"])))
    own = load_config("paper-sinks", [*WINDOW, "attention.softmax_heads={0: [1]}"])
    with pytest.raises(LolcatsError, match="leave out"):
        with_selection(own, selection_file, find_base(str(model_dir)))


@pytest.mark.parametrize("text", ["", "heads: [", "heads: {}", "- 1", "curve: 3"])
def test_other_files_are_not_taken_for_selections(tmp_path: Path, text: str) -> None:
    path = tmp_path / "heads.yaml"
    path.write_text(text)
    with pytest.raises(LolcatsError, match="not a selection of heads"):
        Selection.read(path)


def test_model_without_training(selection_file: Path, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command("linearize", model_dir, "--out", out, "--no-train", "--selection", selection_file,
                   "--set", WINDOW[0], "--set", WINDOW[1], "--set", "dtype=float32")  # fmt: skip
    assert done.exit_code == 0, done.output
    heads = Selection.read(selection_file).heads
    config = AttentionConfig("window", window_size=8, sinks=2, softmax_heads=heads)
    expected = lolcats.convert(find_model(model_dir), config).eval()
    ids = torch.randint(6, 300, (1, 90))
    with torch.no_grad():
        wanted = expected(ids).logits
        for form in (out, out / "merged"):
            torch.testing.assert_close(load(form)(ids).logits, wanted, atol=1e-5, rtol=1e-4)
    card = (out / "README.md").read_text()
    assert "2 of 4 key/value heads kept" in card
    assert "2 (chosen)" in card
    assert "Nothing was\ntrained" in card
    assert "chosen while" not in done.output
    again = command("linearize", model_dir, "--out", out, "--no-train", "--selection", selection_file)
    note = "others had terraced windows of 8 and 2 sinks. Here the others have terraced windows of 256 and 4 sinks"
    assert note in " ".join(again.output.split())
    assert again.exit_code == 2
    assert "not empty" in again.output


def test_budget_without_training_is_searched_once(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["linearize", model_dir, "--out", out, "--no-train", "--no-merge", "--set", "attention.softmax_budget=0.5"]
    done = command(*asked, "--set", WINDOW[0], "--set", WINDOW[1])
    assert done.exit_code == 0, done.output
    record = json.loads((out / "config.json").read_text())["lolcats"]
    found = Selection.read(out / "selection.yaml")
    kept = {str(e["layer"]): e["softmax_heads"] for e in record["layers"] if e.get("softmax_heads")}
    kept |= {str(e["layer"]): [0, 1] for e in record["layers"] if e["kind"] == "softmax"}
    assert kept == found.heads
    assert sum(map(len, kept.values())) == 2
    assert not (out / "merged").exists()


@pytest.mark.parametrize("place", ["write_untrained_card", "save_whole", "save_adapter_config"])
def test_without_training_the_same_command_goes_on(
    place: str, selection_file: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **_: Any) -> None:
        if place == "save_whole":
            (unfinished := arguments[2].with_name("merged.partial")).mkdir()
            (unfinished / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    asked = ["linearize", model_dir, "--out", tmp_path / "out", "--no-train", "--selection", selection_file]
    with monkeypatch.context() as patch:
        patch.setattr(f"lolcats.pipeline.untrained.{place}", stop)
        stopped = command(*asked)
    assert stopped.exit_code == 130
    assert "run the same command again to continue" in stopped.output
    other = command(*asked, "--set", "attention.sinks=2")
    assert other.exit_code == 2
    assert "holds an unfinished model from another base model or other settings" in other.output
    again = command(*asked)
    assert again.exit_code == 0, again.output
    assert command(*asked[:3], tmp_path / "whole", *asked[4:]).exit_code == 0
    first, second = (
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "out", tmp_path / "whole")
    )
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert "not empty" in command(*asked).output, "what is complete is not written again"


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "config.json", "tokenizer.json"])
def test_without_training_no_file_of_others_is_overwritten(name: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    done = command("linearize", model_dir, "--out", tmp_path, "--no-train")
    assert done.exit_code == 2
    assert "is not empty" in done.output
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_without_training_the_window_is_longer_by_default(model_dir: Path, tmp_path: Path) -> None:
    heads = "attention.softmax_heads={0: [1]}"
    for recipe, window in (("", 256), ("paper-sinks", 64), ("untrained", 256)):
        out, chosen = tmp_path / (recipe or "none"), ["--recipe", recipe] if recipe else []
        done = command("linearize", model_dir, "--out", out, "--no-train", "--no-merge", "--set", heads, *chosen)
        assert done.exit_code == 0, done.output
        attention = json.loads((out / "config.json").read_text())["lolcats"]["attention"]
        assert (attention["window_size"], attention["sinks"], attention["kind"]) == (window, 4, "window")


def test_run_keeps_its_choice(model_dir: Path, chat_file: Path, settings: list[str], tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    config = load_config("paper-sinks", [*settings, "attention.softmax_budget=0.5"])
    run = linearize(str(model_dir), str(chat_file), tmp_path / "run", config, merge=False)
    found = Selection.read(tmp_path / "run" / "selection.yaml")
    record = json.loads((tmp_path / "run" / "config.json").read_text())["lolcats"]
    assert record["attention"]["softmax_heads"] == found.heads
    assert run.config.attention.softmax_budget == 0.5
    assert "selection.yaml" not in record.get("parts", {})
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2 (chosen)" in card
    assert "grow with the text only in the heads that keep softmax attention" in card
    monkeypatch.setattr("lolcats.pipeline.heads.found_heads", lambda *_: pytest.fail("searched again"))
    again = linearize(str(model_dir), str(chat_file), tmp_path / "run", config, merge=False)
    assert again.results == Run.open(tmp_path / "run").results
    model = load(tmp_path / "run")
    assert model.config.lolcats["attention"]["softmax_heads"] == found.heads


@pytest.mark.parametrize(("arguments", "message"), [
    (["--heads", 9, "--lengths", 2048], "Cannot keep 9 heads: only 4 of this model could be linearized."),
    (["--budget", 0.5, "--heads", 2], "give one of them"),
    (["--unit", "block"], "expected head or layer"),
    (["--heads", 1, "--unit", "layer", "--lengths", 2048], "which has 2: use --unit head, or a larger budget."),
    (["--heads", 2, "--lengths", 100], "at least 512 tokens"),
    (["--set", "attention.softmax_heads={0: [1]}"], "lists heads already"),
])  # fmt: skip
def test_mistakes_are_a_sentence(model_dir: Path, tmp_path: Path, arguments: list[Any], message: str) -> None:
    done = command("select", model_dir, "--out", tmp_path / "heads.yaml", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


def test_settings_exclude_each_other(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match="set one of the two"):
        load_config("paper-sinks", ["attention.softmax_budget=0.1", "attention.softmax_heads={0: [1]}"])
    with pytest.raises(LolcatsError, match="between 0 and 1"):
        load_config("paper-sinks", ["attention.softmax_budget=2"])
    with pytest.raises(LolcatsError, match="does not search for heads"):
        lolcats.convert(tiny_model(), AttentionConfig(softmax_budget=0.5))
    for arguments, message in (([], "needs --data"), (["--no-train", "--data", "x.jsonl"], "does not use --data")):
        done = command("linearize", model_dir, "--out", tmp_path / "out", *arguments)
        assert done.exit_code == 2
        assert message in done.output


def test_curve_in_a_file_says_what_it_is(selection_file: Path) -> None:
    tree = yaml.safe_load(selection_file.read_text())
    assert tree["window"] == {"window": "terraced", "window_size": 8, "sinks": 2}
    assert tree["search"]["lengths"] == [2048]
    assert set(tree["search"]["seconds"]) == {"prompts", "search", "curve"}
    assert [set(point["exact"]) for point in tree["curve"]] == [set(KINDS)] * len(tree["curve"])


def find_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture
def quantized_search(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model large enough for bitsandbytes, on a CPU that gives its weights gradients."""
    modules = pytest.importorskip("bitsandbytes").nn.modules
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # else weights are packed in a form without gradients
    monkeypatch.setattr(MODULE, "prompt_plan", lambda lengths: [("codes", length) for length in lengths])
    real = bases.check_quantized
    for place in ("lolcats.weights.base", "lolcats.pipeline.job"):
        monkeypatch.setattr(f"{place}.check_quantized", lambda *args, **how: real(*args, **{**how, "gradients": False}))
    tiny_model(hidden_size=64, intermediate_size=128, num_hidden_layers=3).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_search_in_4_bits_finds_the_heads_of_the_same_weights(
    quantized_search: Path, tokenizer: Any, tmp_path: Path
) -> None:
    options = ["--heads", 2, "--lengths", 2048, "--beyond", 1, "--set", WINDOW[0], "--set", WINDOW[1]]
    path = tmp_path / "heads.yaml"
    done = command("select", quantized_search, "--out", path, "--quantize", "nf4", "--set", "device=cpu", *options)
    assert done.exit_code == 0, done.output
    found = Selection.read(path)
    assert found.search["weights"] == "nf4"
    assert [point.count for point in found.curve] == [0, 1, 2, 6]
    base = find_base(str(quantized_search))
    whole = load_model(base, torch.float32, quantize="nf4").dequantize()
    assert type(whole.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    attention = AttentionConfig(window_size=8, sinks=2)
    expected = select(whole, tokenizer, base, attention, 2, Settings(lengths=(2048,), beyond=1.0))
    assert found.heads == expected.heads
    for point, other in zip(found.curve, expected.curve, strict=True):
        assert point.heads == other.heads
        assert point.loss == pytest.approx(other.loss, abs=1e-3)


def test_a_run_in_4_bits_chooses_its_heads_in_4_bits(
    quantized_search: Path, chat_file: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budget, stage 1 layer by layer, stage 2: the commands of a model that fits."""
    monkeypatch.setattr("lolcats.pipeline.heads.weights_room", lambda _: 1000)
    changes = [*settings, "transfer.order=stream", "transfer.coupling=per_layer", "attention.softmax_budget=0.4"]
    said = list[str]()
    monkeypatch.setattr(
        "lolcats.pipeline.heads.Settings", lambda seed: Settings(lengths=(2048,), seed=seed, beyond=1.0)
    )
    config = load_config("paper-sinks", [*changes, "finetune.quantize_base=nf4", "device=cpu"])
    run = linearize(str(quantized_search), str(chat_file), tmp_path / "out", config, merge=False, say=said.append)
    assert any("in 4 bits to choose heads" in line for line in said)
    selection = Selection.read(tmp_path / "out" / "selection.yaml")
    assert (selection.search["weights"], sum(map(len, selection.heads.values()))) == ("nf4", 2)
    assert run.stage_done("finetune")


def test_the_default_recipe_takes_heads_of_a_file(
    model_dir: Path, chat_file: Path, selection_file: Path, settings: list[str], tmp_path: Path
) -> None:
    """Instead of a search. There is no linear attention, and queries and keys of kept heads are the base model's."""
    steps = [f"finetune.{name}=2" for name in ("max_steps", "eval_steps", "save_steps")]
    changes = [*settings, *WINDOW, *steps, "transfer.max_steps=2", "dtype=float32"]
    done = command("linearize", model_dir, "--data", chat_file, "--out", tmp_path / "out", "--selection",
                   selection_file, *(word for x in changes for word in ("--set", x)))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "so attention.softmax_budget is not used." in done.output
    run = Run.open(tmp_path / "out")
    assert run.config.attention.kind == "window"
    assert sum(map(len, run.config.attention.softmax_heads.values())) == 2
    assert (run.config.attention.softmax_budget, run.config.finetune.loss) == (0, "kl")


def test_a_model_that_does_not_fit_is_a_sentence(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lolcats.memory.weights_room", lambda _: 1000)
    done = command("select", model_dir, "--out", tmp_path / "heads.yaml", "--heads", 2)
    assert done.exit_code == 2
    assert "In 4 bits it takes about" in done.output.replace("\n", " ")
    done = command("select", model_dir, "--out", tmp_path / "heads.yaml", "--quantize", "nf4", "--set", "device=cpu")
    assert "4-bit weights need a CUDA GPU" in done.output


def test_hidden_states_that_do_not_fit_are_a_sentence(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "free_host_memory", lambda: 1000)
    done = command(
        "select", model_dir, "--out", tmp_path / "heads.yaml", "--heads", 2, "--lengths", 2048, "--set", "device=cpu"
    )
    assert done.exit_code == 2
    assert "use shorter prompts (lolcats select --lengths)" in done.output.replace("\n", " ")


def test_a_long_search_on_a_cpu_is_announced(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = ["select", model_dir, "--out", tmp_path / "heads.yaml", "--heads", 1, "--lengths", 1536,
              "--set", "device=cpu"]  # fmt: skip
    done = command(*search)
    assert done.exit_code == 0, done.output
    assert "This search takes about" not in done.output
    monkeypatch.setattr(MODULE, "LONG", 0.0)
    done = command(*search)
    assert done.exit_code == 0, done.output
    assert "This search takes about 0.0 hours on this CPU" in done.output
    assert "--selection FILE" in done.output
