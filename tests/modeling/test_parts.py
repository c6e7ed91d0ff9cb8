"""A copy of an adapter that lost a part is refused, never used as if there had been no such part."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SETTINGS
from fixtures.make import WRITTEN, invoke
from safetensors.torch import load_file, save_file

import lolcats
from lolcats.config import load_config
from lolcats.data.inputs import Inputs
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Snapshot
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA
from lolcats.modeling.parts import OF_LORA, find_parts, listed_parts, lost_controls
from lolcats.pipeline import linearize, resume, start, train_lora, train_maps
from lolcats.report import html
from lolcats.run import Run

CONTROL = Path("controls/window_lora")
COMMANDS = {
    "generate": ["--prompt", "the cat", "--max-new-tokens", "2"],
    "info": [],
    "evaluate": ["--data", "chat.jsonl", "--rows", "2"],
    "export": ["--merge", "--out", "merged"],
    "finetune": ["--no-merge"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_dirs, chat_file: Path) -> Path:
    """A finished run with a control."""
    out = tmp_path_factory.mktemp("trained") / "run"
    config = load_config("paper-sinks", [*SETTINGS, "controls=[window_lora]"])
    linearize(str(model_dirs["llama"]), str(chat_file), out, config, merge=False, say=lambda _: None)
    return out


@pytest.fixture
def copy(trained: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    shutil.copy(chat_file, tmp_path / "chat.jsonl")
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_config_lists_the_parts(trained: Path) -> None:
    everything = {FEATURE_MAPS, *OF_LORA}
    for directory, names in ((trained, everything), (trained / CONTROL, set(OF_LORA))):
        assert listed_parts(directory) == find_parts(directory)
        assert set(find_parts(directory)) == names
        lolcats.load(directory)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_goes_on_without_lora(command: str, copy: Path) -> None:
    shutil.rmtree(copy / LORA)
    said = invoke(command, str(copy), *COMMANDS[command], code=2)
    assert "run is incomplete: lora/adapter_config.json is missing" in " ".join(said.split())
    assert not Path("merged").exists()


@pytest.mark.parametrize("with_run", [True, False])
@pytest.mark.parametrize("name", [FEATURE_MAPS, *OF_LORA])
def test_every_part_is_missed(name: str, with_run: bool, copy: Path) -> None:
    (copy / name).unlink()
    if not with_run:  # as it is published
        (copy / "run.json").unlink()
    with pytest.raises(LolcatsError, match=f"is incomplete: {name} is missing"):
        lolcats.load(copy)


def test_the_lora_of_a_control_is_missed(copy: Path) -> None:
    shutil.rmtree(copy / CONTROL / LORA)
    with pytest.raises(LolcatsError, match="is incomplete"):
        lolcats.load(copy / CONTROL)


def test_a_part_of_another_model_is_refused(copy: Path) -> None:
    """It has a checksum of its own that is right."""
    tensors = load_file(copy / FEATURE_MAPS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / FEATURE_MAPS)
    with pytest.raises(LolcatsError, match="or of another model: its checksum"):
        lolcats.load(copy)
    assert "or of another model: its checksum" in invoke("info", str(copy), code=2)


def test_a_part_that_is_not_listed_is_refused(trained: Path, copy: Path) -> None:
    config = load_config("paper-sinks", [*SETTINGS, "finetune.max_steps=0"])
    base, data = json.loads((trained / "run.json").read_text())["base"]["path"], "chat.jsonl"
    linearize(base, data, Path("without"), config, merge=False, say=lambda _: None)
    lolcats.load("without")
    shutil.copytree(copy / LORA, Path("without") / LORA)
    with pytest.raises(LolcatsError, match="does not list it"):
        lolcats.load("without")


def test_the_list_grows_with_the_run(model_dirs, chat_file: Path, tmp_path: Path) -> None:
    """Each time it is begun again, config.json is written anew."""
    config, out = load_config("paper-sinks", SETTINGS), tmp_path / "run"
    job = start(Inputs(str(model_dirs["llama"])), str(chat_file), out, config, lambda _: None)
    assert listed_parts(out) == {}
    train_maps(job)
    assert set(listed_parts(out) or ()) == {FEATURE_MAPS}
    job = resume(out, lambda _: None)
    assert set(listed_parts(out) or ()) == {FEATURE_MAPS}
    train_lora(job, merge=False)
    assert listed_parts(out) == find_parts(out)
    before = (out / "config.json").read_bytes()
    resume(out, lambda _: None)
    assert (out / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["run", "adapter"])
def test_adapters_without_a_list(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """run.json decides; without it, there is only a warning."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    lolcats.load(name)
    assert not [w for w in recwarn if "older version" in str(w.message)]
    shutil.rmtree(Path(name) / LORA)
    if name == "run":
        with pytest.raises(LolcatsError, match=r"run\.json says that LoRA was trained"):
            lolcats.load(name)
        assert "LoRA was trained" in invoke("info", name, code=2)
        return
    with pytest.warns(UserWarning, match="without a list of its files"):
        lolcats.load(name)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_umask_decides_who_may_read(
    umask: int, mode: int, trained: Path, model_dirs, chat_file: Path, tmp_path: Path
) -> None:
    """safetensors itself writes files that only their owner can read."""
    before = os.umask(umask)
    try:
        config = load_config("paper-sinks", [*SETTINGS, "controls=[window_lora]", "transfer.coupling=per_layer"])
        linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / "run", config, say=lambda _: None)
        Snapshot((1, 2), ()).save(tmp_path / "state.safetensors")
        lolcats.load(trained).save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 6
    assert {str(path): oct(path.stat().st_mode & 0o777) for path in files} == {str(path): oct(mode) for path in files}


@pytest.mark.parametrize("what", ["controls", str(CONTROL), f"{CONTROL}/config.json"])
def test_a_control_that_was_lost_is_named(what: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is complete without it, so commands go on, unless they are to compare with it."""
    monkeypatch.setenv("COLUMNS", "1000")
    shutil.rmtree(copy / what) if (copy / what).is_dir() else (copy / what).unlink()
    missing = "run/controls/window_lora is missing or incomplete, but run.json says that it was trained"
    for command in ("info", "evaluate", "finetune", "report"):
        assert missing in " ".join(invoke(command, str(copy), *COMMANDS.get(command, [])).split()), command
    assert missing.removeprefix("run/") in "".join(dict(html.SECTIONS)["Training"](Run.open(copy)))
    tasks = ("--data", "chat.jsonl", "--tasks", "positions", "--lengths", "32")
    said = " ".join(invoke("evaluate", str(copy), *tasks, "--baseline", "window+lora", code=2).split())
    assert missing in said
    assert "Train it" not in said


def test_nothing_is_said_of_controls_that_are_there_or_were_never_trained(copy: Path) -> None:
    assert lost_controls(copy) == ""
    record = json.loads((copy / "run.json").read_text())
    del record["stages"]["window_lora"]
    (copy / "run.json").write_text(json.dumps(record))
    shutil.rmtree(copy / "controls")
    assert lost_controls(copy) == ""
    (copy / "run.json").unlink()  # as it is published
    assert lost_controls(copy) == ""


@pytest.mark.parametrize("name", OF_LORA)
def test_a_control_that_lost_its_lora_is_refused(name: str, copy: Path) -> None:
    (copy / CONTROL / name).unlink()
    said = invoke("evaluate", str(copy), *COMMANDS["evaluate"], code=2)
    assert f"run/controls/window_lora is incomplete: {name} is missing" in " ".join(said.split())
