"""A base model that has moved: where it is now can be said, and its weights say whether it is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, tiny_model
from fixtures.make import invoke
from modeling.test_base import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

import lolcats
from lolcats.config import AttentionConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.modeling import checkpoint
from lolcats.modeling.checkpoint import FEATURE_MAPS, save_adapter_config, save_feature_maps
from lolcats.modeling.parts import find_parts
from lolcats.modeling.record import sealed
from lolcats.pipeline import linearize
from lolcats.run import _difference
from lolcats.weights import base as bases
from lolcats.weights.base import UNKNOWN, Base, find_again, find_base, load_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
COMMANDS = {
    "generate": ["--prompt", "the cat", "--max-new-tokens", "2"],
    "chat": ["--max-new-tokens", "2"],
    "evaluate": ["--data", "chat.jsonl", "--rows", "2"],
    "export": ["--merge", "--out", "merged"],
    "bench": ["--batches", "1", "--prompt", "4", "--new", "3", "--peers", ""],
    "finetune": ["--no-merge"],
    "report": [],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_dirs, chat_file: Path) -> Path:
    """A folder with a run and its base model, which is not where the run knows it."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(model_dirs["llama"], place / "base")
    shutil.copy(chat_file, place / "chat.jsonl")
    linearize(
        str(place / "base"), str(place / "chat.jsonl"), place / "run", load_config("paper-sinks", SETTINGS),
        merge=False, say=lambda _: None,
    )  # fmt: skip
    (place / "base").rename(place / "moved")
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_told_where_it_is(command: str, place: Path) -> None:
    if command == "report":  # it only loads a model to measure its attention
        record = json.loads((place / "run/run.json").read_text())
        del record["results"]["attention"]
        (place / "run/run.json").write_text(json.dumps(record))
    options = COMMANDS[command]
    said = " ".join(invoke(command, "run", *options, code=2).split())
    assert "The base model of run is missing" in said
    assert "--base PATH" in said
    assert "adapters only fit their own" in " ".join(
        invoke(command, "run", *options, "--base", "other", code=2).split()
    )
    invoke(command, "run", *options, "--base", "moved")
    if command in ("finetune", "report"):  # the run remembers it
        for file, keys in (("config.json", ("lolcats", "base")), ("run.json", ("base",))):
            record = json.loads((place / "run" / file).read_text())
            for key in keys:
                record = record[key]
            assert record["path"] == str(place / "moved")
        invoke("generate", "run", "--prompt", "the", "--max-new-tokens", "1")


def test_from_python(place: Path) -> None:
    with pytest.raises(LolcatsError, match=r"is missing: .* base=PATH"):
        lolcats.load("run")
    ours, theirs = lolcats.load("run", base="moved"), AutoModelForCausalLM.from_pretrained("run", base="moved")
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    with pytest.raises(LolcatsError, match="adapters only fit their own base model"):
        AutoModelForCausalLM.from_pretrained("run", base="other")
    ours.save_pretrained("merged")
    with pytest.raises(LolcatsError, match="needs no base model"):
        lolcats.load("merged", base="moved")
    assert "needs no base model" in invoke("generate", "merged", "--prompt", "a", "--base", "moved", code=2)
    assert "is not an adapter" in invoke("generate", "moved", "--prompt", "a", "--base", "moved", code=2)
    assert "is not an adapter" in invoke("evaluate", "moved", "--data", "chat.jsonl", "--base", "moved", code=2)


def test_another_adapter_of_the_same_base_is_compared(place: Path) -> None:
    shutil.copytree("run", "again")
    Path("text.txt").write_text("the cat sat on a mat and dogs like milk. " * 200)
    words = ["--tasks", "positions", "--data", "text.txt", "--lengths", "16", "--limit", "2", "--baseline", "again"]
    assert "again" in invoke("evaluate", "run", *words, "--base", "moved")


def adapter(base_path: str, out: Path) -> None:
    base = find_base(base_path)
    model = lolcats.convert(load_model(base, torch.float32), AttentionConfig(window_size=8, sinks=2, feature_dim=4))
    out.mkdir()
    save_feature_maps(model, out / FEATURE_MAPS)
    save_adapter_config(model, base, out, parts=find_parts(out))


def test_gguf(tokenizer, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"), tokenizer)
    write_gguf(tmp_path / "other.gguf", tiny_model("llama", seed=1), tokenizer)
    adapter(str(path), tmp_path / "adapter")
    path.rename(tmp_path / "moved.gguf")
    lolcats.load(tmp_path / "adapter", base=tmp_path / "moved.gguf")
    with pytest.raises(LolcatsError, match="adapters only fit"):
        lolcats.load(tmp_path / "adapter", base=tmp_path / "other.gguf")


def test_hub_model(model_dirs, chat_file: Path, tmp_path: Path) -> None:
    """Its commit says nothing about a copy, so the fingerprint of its content is recorded, too."""
    repository = tmp_path / "hub" / "models--somebody--tiny"
    snapshot, copy, other = repository / "snapshots" / COMMIT, tmp_path / "copy", tmp_path / "other"
    shutil.copytree(model_dirs["llama"], snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(snapshot, copy)
    (copy / "consolidated.safetensors").write_bytes(b"the same weights in another format")
    shutil.copytree(snapshot, other)
    tiny_model("llama", seed=1).save_pretrained(other)
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["linearize", "somebody/tiny", "--data", str(chat_file), "--out", str(tmp_path / "run"), "--no-merge",
               "--recipe", "paper-sinks"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "lolcats.cli", *command, *sets], env=environment, check=True)
    config = tmp_path / "run" / "config.json"
    known = json.loads(config.read_text())["lolcats"]["base"]
    assert known["fingerprint"] == f"commit {COMMIT}"
    assert known["content"].startswith("sha256 of samples")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["base"] == known

    with pytest.raises(LolcatsError, match=r"is missing: .*somebody/tiny.* --base PATH"):  # not in this cache
        lolcats.load(tmp_path / "run")
    model = lolcats.load(tmp_path / "run", base=copy)
    assert torch.equal(model(IDS).logits, lolcats.load(tmp_path / "run", base=snapshot)(IDS).logits)
    with pytest.raises(LolcatsError, match="adapters only fit"):
        lolcats.load(tmp_path / "run", base=other)
    shutil.copytree(tmp_path / "run", tmp_path / "remembers")
    invoke("finetune", str(tmp_path / "remembers"), "--no-merge", "--base", str(copy))
    lolcats.load(tmp_path / "remembers")

    record = json.loads(config.read_text())  # as an older version wrote it
    del record["lolcats"]["base"]["content"], record["lolcats"]["sha256"]
    config.write_text(json.dumps(record))
    lolcats.load(tmp_path / "run", base=snapshot)
    for place in (copy, other):
        with pytest.raises(
            LolcatsError,
            match=rf"does not record what the weights were.*models--somebody--tiny/snapshots/{COMMIT}, or the hub id",
        ):
            lolcats.load(tmp_path / "run", base=place)


def test_hub_model_whose_commit_was_not_recorded(model_dirs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older versions with newer transformers recorded none: the hub id is accepted, and its folder in the cache."""
    snapshot, run = tmp_path / "models--somebody--tiny" / "snapshots" / COMMIT, tmp_path / "adapter"
    shutil.copytree(model_dirs["llama"], snapshot)
    adapter(str(snapshot), run)
    record = json.loads((run / "config.json").read_text())
    record["lolcats"]["base"] = {"path": "somebody/tiny", "form": "hub", "fingerprint": UNKNOWN}
    record["lolcats"] = sealed(record["lolcats"])
    (run / "config.json").write_text(json.dumps(record))
    lolcats.load(run, base=snapshot)
    with pytest.raises(LolcatsError, match=r"models--somebody--tiny/snapshots/COMMIT, or the hub id"):
        lolcats.load(run, base=model_dirs["llama"])
    known = Base("somebody/tiny", "hub", UNKNOWN)
    monkeypatch.setattr(bases, "find_base", lambda *_: Base("somebody/tiny", "hub", f"commit {COMMIT}"))
    assert find_again(known, run) == known
    assert not _difference(
        *(
            {"base": base.record, "config": {}, "data": {"fingerprint": ""}}
            for base in (known, Base("somebody/tiny", "hub", f"commit {COMMIT}"))
        )
    )


def test_a_revision_of_an_adapter_is_loaded_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not config.json of that revision with the weights of the newest."""
    asked: list[tuple[str, str | None]] = []
    download = lambda name, revision=None: asked.append((name, revision)) or str(place / "run")  # noqa: E731
    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    config = AutoConfig.from_pretrained("run")
    model = AutoModelForCausalLM.from_pretrained("somebody/run", config=config, revision=COMMIT, base="moved")
    assert asked == [("somebody/run", COMMIT)]
    assert model.name_or_path == "somebody/run"
