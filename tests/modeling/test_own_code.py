"""Linearized models of base models with Python code of their own: trained, merged, loaded and used, with consent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from conftest import SETTINGS
from support.own_code import RAN, forget_code, with_code
from test_cli import invoke, sets
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.cli import app
from lolcats.config import load_config
from lolcats.errors import LolcatsError
from lolcats.inference import server
from lolcats.modeling import skeleton
from lolcats.modeling.code import needs_code
from lolcats.modeling.record import MODEL_TYPE, REMOTE_TYPE, sealed
from lolcats.stages.finetune.stage import load_over_ranks
from lolcats.weights.base import find_base, load_model
from lolcats.weights.shards import OtherNames

IDS = torch.arange(10, 50)[None]
TRUST = "--trust-remote-code"
CODE = {"configuration_own.py", "modeling_own.py", "modeling_lolcats.py"}


@pytest.fixture(scope="module")
def trained(model_dirs, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model of a type of its own (``base``), and a run on it with its merged model (``out``)."""
    root = tmp_path_factory.mktemp("own")
    base = with_code(model_dirs["llama"], root / "base")
    invoke("linearize", base, "--data", chat_file, "--out", root / "out", *sets(SETTINGS), TRUST)
    return root


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    forget_code()
    yield
    forget_code()


def uses(model: Path, chat_file: Path, out: Path) -> list[tuple[object, ...]]:
    return [
        ("generate", model, "--prompt", "the cat", "--max-new-tokens", 2),
        ("chat", model),
        ("evaluate", model, "--data", chat_file, "--rows", 4),
        ("evaluate", model, "--data", out / "long.jsonl", "--tasks", "positions", "--limit", 1),
        ("serve", model, "--port", 0, "--slots", 1, "--prefix-mb", 0),
        ("bench", model, "--batches", 1, "--prompt", 8, "--new", 4, "--peer-new", 4, "--out", out / "bench.json"),
        ("export", model, "--merge", "--out", out / "exported"),
    ]


@pytest.mark.parametrize("form", ["out", "out/merged"])
def test_every_command_uses_it_with_consent(
    form: str, trained: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(server, "serve", lambda *_: None)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "the cat sat on a mat " * 700}) + "\n")
    for command in uses(trained / form, chat_file, tmp_path):
        forget_code()
        assert TRUST in invoke(*command, code=2), command
        assert RAN not in capfd.readouterr().out, command
        assert RAN in invoke(*command, TRUST) + capfd.readouterr().out, command
    assert {path.name for path in (tmp_path / "exported").glob("*.py")} == CODE
    assert "own-llama" in invoke("info", trained / form)


def test_merged_models_are_self_contained(trained: Path, tmp_path: Path) -> None:
    """Without the base model, they are what the adapter was; so is a copy that was saved again."""
    adapter = lolcats.load(trained / "out", trust=True)
    assert type(adapter).__name__ == "LolcatsOwnForCausalLM"
    with torch.no_grad():
        expected = adapter(IDS).logits
        assert torch.equal(2 * expected, adapter.lm_head(adapter.model(IDS)[0])), "its own forward pass"
    shutil.copytree(trained / "out" / "merged", tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").glob("*.py")} == CODE
    moved = (trained / "base").rename(trained / "moved")
    try:
        model = lolcats.load(tmp_path / "merged", trust=True)
        model.save_pretrained(tmp_path / "again")
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
            assert torch.equal(lolcats.load(tmp_path / "again", trust=True)(IDS).logits, expected)
            assert torch.equal(lolcats.load(trained / "out", trust=True, base=moved)(IDS).logits, expected)
    finally:
        moved.rename(trained / "base")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == (REMOTE_TYPE, "own-llama")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE


FROM_PRETRAINED = """
import sys, torch
{more}
from transformers import AutoModelForCausalLM, AutoTokenizer
for place in sys.argv[1:]:
    for trust in (False, True):
        try:
            model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=trust)
            print(type(model).__name__, model(torch.arange(10, 50)[None]).logits.sum().item())
        except Exception as error:
            print(type(error).__name__, "trust_remote_code" in str(error))
    print(AutoTokenizer.from_pretrained(place, trust_remote_code=False).decode([20]))
"""


@pytest.mark.parametrize("more", ["import lolcats", ""])
def test_from_pretrained_with_trust_remote_code(more: str, trained: Path, tokenizer) -> None:
    places = [str(trained / "out"), str(trained / "out" / "merged")]
    command = [sys.executable, "-c", FROM_PRETRAINED.format(more=more), *places]
    done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    with torch.no_grad():
        value = lolcats.load(places[1], trust=True)(IDS).logits.sum().item()
    printed = [line for line in done.stdout.splitlines() if line != RAN]
    assert printed == ["ValueError True", f"LolcatsOwnForCausalLM {value}", tokenizer.decode([20])] * 2


@pytest.mark.parametrize("form", ["out", "out/merged"])
def test_models_of_older_versions(form: str, trained: Path, tmp_path: Path) -> None:
    """These have the type of all linearized models, and merged ones no copy of the code."""
    shutil.copytree(trained / form, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    config["model_type"] = MODEL_TYPE
    config["lolcats"] = sealed({name: value for name, value in config["lolcats"].items() if name != "code"})
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    with pytest.raises(LolcatsError, match=f"'own-llama', which this model was.*{TRUST}"):
        lolcats.load(tmp_path / "old")
    if form == "out":
        assert type(lolcats.load(tmp_path / "old", trust=True)).__name__ == "LolcatsOwnForCausalLM"
    else:
        with pytest.raises(LolcatsError, match=r"Merge the adapter again: lolcats export DIR --merge"):
            lolcats.load(tmp_path / "old", trust=True)


@pytest.mark.parametrize("trust", [True, False])
def test_own_code_for_a_type_that_transformers_knows(trust: bool, model_dirs, chat_file: Path, tmp_path: Path) -> None:
    """What it was trained with is what it is loaded with: its code's classes or transformers', never the other ones."""
    base, out = with_code(model_dirs["llama"], tmp_path / "base", kind="llama"), tmp_path / "out"
    changes, consent = sets([*SETTINGS, "transfer.max_steps=1", "finetune.max_steps=1"]), [TRUST] * trust
    invoke("transfer", base, "--data", chat_file, "--out", out, *changes, *consent)
    begun = f"was started {'with' if trust else 'without'} the code of its base model"
    assert begun in invoke("finetune", out, *([] if trust else [TRUST]), code=2)
    invoke("finetune", out, *consent)
    name = "LolcatsOwnForCausalLM" if trust else "LolcatsLlamaForCausalLM"
    for place in (out, out / "merged"):
        assert needs_code(json.loads((place / "config.json").read_text())) == trust
        model = lolcats.load(place, trust=True)
        assert type(model).__name__ == name
        assert type(AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)).__name__ == name
        if trust:
            with pytest.raises(LolcatsError, match=TRUST):
                lolcats.load(place)
        else:
            assert type(lolcats.load(place)).__name__ == name
    with torch.no_grad():
        assert torch.equal(lolcats.load(out, trust=True)(IDS).logits, model(IDS).logits)
    card = (out / "README.md").read_text()
    assert ('from_pretrained("DIR", trust_remote_code=True)' in card) == trust
    assert invoke("evaluate", out, "--data", chat_file, "--rows", 4, TRUST).count("student") == 1


def test_models_that_nothing_was_trained_for(trained: Path, tmp_path: Path) -> None:
    out, heads = tmp_path / "out", ("--set", 'attention.softmax_heads={"0": [0]}')
    command = ("linearize", trained / "base", "--out", out, "--no-train", *sets(SETTINGS[:3]), *heads)
    assert TRUST in invoke(*command, code=2)
    invoke(*command, TRUST)
    assert 'from_pretrained("DIR", trust_remote_code=True)' in (out / "README.md").read_text()
    with torch.no_grad():
        adapter, merged = (lolcats.load(place, trust=True)(IDS).logits for place in (out, out / "merged"))
    assert torch.equal(adapter, merged)


def test_skeletons_of_loaded_and_sharded_models(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 of models whose files have other tensor names, and stage 2 over several GPUs."""
    base, config = find_base(str(trained / "base")), load_config("paper-sinks", SETTINGS)
    config = replace(config, trust_remote_code=True)
    place = (base, config.attention, torch.float32, torch.device("cpu"), 0, True)
    whole = skeleton.build_skeleton(*place)
    real, calls = skeleton.Skeleton, list[Any]()

    def refuse_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise OtherNames("other names.")
        return real(*arguments)

    monkeypatch.setattr(skeleton, "Skeleton", refuse_once)
    assert type(skeleton.build_skeleton(*place).model) is type(whole.model)
    monkeypatch.setattr("lolcats.stages.finetune.stage.shard", lambda *_: None)
    wrapped = load_over_ranks(base, config, torch.float32, torch.device("cpu"))
    assert type(wrapped.get_base_model()) is type(whole.model)


def test_code_on_the_hub_needs_consent(model_dirs, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--somebody--own" / "snapshots" / ("c" * 40)
    snapshot.parent.mkdir(parents=True)
    with_code(model_dirs["llama"], snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    program = (
        "import sys\nfrom lolcats.weights.base import find_base\nfrom lolcats.errors import LolcatsError\n"
        "print(find_base('somebody/own', True).fingerprint)\n"
        "try:\n    find_base('somebody/own')\nexcept LolcatsError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    fingerprint, sentence = [line for line in done.stdout.splitlines() if line != RAN]
    assert fingerprint == f"commit {snapshot.name}"
    assert sentence == f"somebody/own comes with its own Python code, which runs only if you allow it: {TRUST}."


@pytest.mark.parametrize("place", ["base", "base/config.json"])
def test_plans_need_consent(place: str, trained: Path, capfd) -> None:
    command = ("plan", trained / place, *sets(SETTINGS))
    assert f"comes with its own Python code, which runs only if you allow it: {TRUST}." in invoke(*command, code=2)
    assert RAN not in capfd.readouterr().out
    said = invoke(*command, TRUST)
    commands = [line for line in said.splitlines() if line.startswith("lolcats ")]
    assert len(commands) == 2
    assert all(line.endswith(TRUST) for line in commands)
    assert TRUST not in invoke("plan", "llama-3-8b")


def test_data_statistics_and_sweeps_of_such_models(trained: Path, chat_file: Path, tmp_path: Path) -> None:
    picture = ("--picture", tmp_path / "stats.png")
    command = ("data", "stats", trained / "base", "--data", chat_file, *sets(SETTINGS), "--rows", 2, *picture)
    assert TRUST in invoke(*command, code=2)
    invoke(*command, TRUST)
    (tmp_path / "one.yaml").write_text("title: one\nrows: {hybrid: []}\n")
    one = ("--set", "transfer.max_steps=1", "--set", "finetune.max_steps=1")
    place = ("--out", tmp_path / "sweep")
    command = ("sweep", tmp_path / "one.yaml", trained / "base", "--data", chat_file, *place, *sets(SETTINGS))
    assert TRUST in invoke(*command, *one, code=2)
    assert "hybrid" in invoke(*command, *one, TRUST)


def test_every_command_that_loads_a_base_model_takes_consent() -> None:
    program: Any = typer.main.get_command(app)
    names = [(name,) for name in program.commands if name != "data"]
    names += [("data", name) for name in program.commands["data"].commands]
    assert len(names) > 14
    assert [name for name in names if TRUST not in invoke(*name, "--help")] == []


def test_a_class_of_transformers_is_not_own_code(model_dirs) -> None:
    model = lolcats.convert(load_model(find_base(str(model_dirs["llama"])), torch.float32))
    assert model.config.own_model is None
    assert model.config.to_dict()["model_type"] == MODEL_TYPE
