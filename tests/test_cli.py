"""The command line as users see it: commands, and one sentence with exit code 2 for every mistake."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.cli.app import command
from lolcats.files import LOCK, locked, only_writer


def invoke(*arguments: object, code: int = 0, stdin: str | None = None) -> str:
    """Run a command. Where both stages are trained, the recipe is the paper's unless one is given."""
    words = [str(a) for a in arguments]
    if words[0] in ("linearize", "transfer") and not {"--recipe", "--no-train", "-h", "--help"} & set(words):
        words += ["--recipe", "paper-sinks"]
    result = CliRunner().invoke(app, words, input=stdin)
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}, expected {code}: {result.output}") from result.exception
    if code == 2:
        assert "Traceback" not in result.output
    return result.output


def test_version_and_short_help() -> None:
    assert invoke("--version") == f"lolcats {lolcats.__version__}\n"
    program: Any = typer.main.get_command(app)
    names = [[name] for name in program.commands if name != "data"] + [["data"], ["data", "stats"]]
    assert len(names) > 14
    for name in ([], *names):
        assert invoke(*name, "-h") == invoke(*name, "--help")
        assert "Usage" in invoke(*name, "-h")


def sets(settings: list[str]) -> list[str]:
    return [word for s in settings for word in ("--set", s)]


@pytest.fixture(scope="module")
def finished(model_dirs, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import SETTINGS

    out = tmp_path_factory.mktemp("run") / "out"
    output = invoke("linearize", model_dirs["llama"], "--data", chat_file, "--out", out, *sets(SETTINGS))
    assert "after stage 2 (LoRA)" in output
    assert "its linear term off" in output
    assert "State per sequence" in output
    assert f"Adapter: {out}   merged model: {out / 'merged'}   card: {out / 'README.md'}" in output
    return out


def test_commands_on_a_finished_run(finished: Path, chat_file: Path, tmp_path: Path, model_dirs, settings) -> None:
    assert "hybrid" in invoke("info", finished)
    assert "can be linearized" in invoke("info", model_dirs["gemma3"])
    output = invoke("evaluate", finished, "--data", chat_file)
    recorded = json.loads((finished / "run.json").read_text())["results"]
    for name in ("ppl_teacher", "ppl_student", "ppl_linear_off", "ppl_window_off"):
        assert f"{recorded[name]:.3f}" in output, output
    whole = invoke(
        "evaluate", model_dirs["llama"], "--data", chat_file, "--recipe", finished / "config.yaml", "--rows", 9
    )
    assert "288 tokens" in whole
    invoke("generate", finished / "merged", "--prompt", "the cat", "--max-new-tokens", 8)
    invoke("chat", finished, "--max-new-tokens", 8, "--temperature", 0.0, stdin="hello\n/new\nhi\n\n")
    limited = invoke("chat", finished, "--max-new-tokens", 8, "--max-context", 40, stdin=f"hello\n{'hello ' * 40}\n\n")
    assert limited.count("exceed 40 tokens (--max-context): /new") == 1
    invoke("export", finished, "--merge", "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    invoke("generate", tmp_path / "half", "--prompt", "the cat", "--max-new-tokens", 4)
    (tmp_path / "half" / "chat_template.jinja").unlink()
    assert "no tokens" in invoke("generate", tmp_path / "half", "--prompt", "", code=2)


def test_transfer_then_finetune(model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "out"
    assert "Next: lolcats finetune" in invoke(
        "transfer", model_dirs["llama"], "--data", chat_file, "--out", out, *sets(settings)
    )
    window = ["--out", tmp_path / "window", *sets([*settings, "attention.kind=window"])]
    assert "Stage 1 has nothing to train" in invoke("transfer", model_dirs["llama"], "--data", chat_file, *window)
    assert "expected one of auto, always, never" in invoke("finetune", out, "--sharding", "perhaps", code=2)
    assert "after stage 2" in invoke("finetune", out, "--sharding", "always")  # by one process: nothing to shard
    for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors", "merged/model.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_mistakes_end_in_a_sentence(model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path) -> None:
    llama, out = model_dirs["llama"], tmp_path / "out"

    def fails(expected: str, *changes: str, model: object = llama, data: Path = chat_file, to: Path = out) -> None:
        output = invoke("linearize", model, "--data", data, "--out", to, *sets(settings), *changes, code=2)
        assert expected in " ".join(output.replace("│", " ").split()), output

    fails("does not exist", model="./nothing")
    fails("No model 'nobody/nothing'", model="nobody/nothing")
    fails("is not a Hugging Face model", model=tmp_path)
    fails("Unknown recipe", "--recipe", "nonsense")
    fails("Unknown configuration key attention.windw", "--set", "attention.windw=3")
    fails("below two windows", "--set", "data.sequence_length=15")
    fails("leave nothing to train on", "--set", "data.validation_rows=100000")
    fails("does not exist", data=tmp_path / "none.jsonl")
    fails("seed was 0 and is now 3. Choose another --out", "--set", "seed=3", to=finished)
    (tmp_path / "file").touch()
    fails("Cannot write", to=tmp_path / "file" / "out")
    fails("is a file", to=tmp_path / "file")
    fails("not available", "--set", "device=mps")
    fails("is linearized already", model=finished)
    fails("it has no 'q_prj'", "--set", "finetune.targets=[q_prj]")
    for name, content, expected in (
        ("empty.jsonl", "", "is empty"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "1 broken line(s): line 2"),
        ("other.jsonl", '{"body": "a"}\n', "no text column"),
    ):
        (tmp_path / name).write_text(content)
        fails(expected, data=tmp_path / name)
    fails("no chat column", "--set", "data.format=chat", data=tmp_path / "other.jsonl")
    assert not out.exists(), "a refused run leaves nothing behind"
    invoke("finetune", tmp_path, code=2)
    invoke("export", finished, "--out", out, code=2)
    invoke("export", llama, "--merge", "--out", out, code=2)
    invoke("info", "./nothing", code=2)
    invoke("generate", finished, "--prompt", "x", "--max-new-tokens", 0, code=2)
    infinite = invoke("generate", finished, "--prompt", "x", "--temperature", "inf", code=2)
    assert "--temperature: expected a finite number, got inf" in infinite
    assert "--gpu-memory 1e400 is too large" in invoke("plan", llama, "--gpu-memory", "1e400", code=2)


@pytest.mark.parametrize(("arguments", "option"), [
    (["select", "MODEL", "--heads", 2], "--out"),
    (["select", "MODEL", "--heads", 2, "--out", "heads.yaml"], "--picture"),
    (["evaluate", "MODEL", "--tasks", "recall"], "--output"),
    (["data", "stats", "MODEL", "--data", "DATA"], "--picture"),
    (["distill-data", "MODEL", "--prompts", "DATA"], "--out"),
    (["bench", "MODEL"], "--out"),
])  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_read(
    arguments: list[Any], option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MODEL does not exist, which would be the next mistake."""
    monkeypatch.chdir(tmp_path)
    ending = {"--picture": ".png", "--output": ".json"}.get(option, ".jsonl")
    (tmp_path / "file").touch()
    (tmp_path / f"folder{ending}").mkdir()
    for place, why in (
        (f"folder{ending}", "is a directory"),
        (f"file/x{ending}", "not a.*directory"),
        *([] if arguments[0] == "bench" else [(f"none/x{ending}", "none is not a directory")]),
    ):
        output = " ".join(invoke(*arguments, option, place, code=2).replace("│", " ").split())
        assert re.search(why, output), output
        assert option in output or arguments[0] == "bench"
        assert "No model" not in output


def test_a_picture_or_table_of_another_kind_is_refused_first() -> None:
    for arguments in (["select", "MODEL", "--out", "heads.yaml"], ["data", "stats", "MODEL", "--data", "DATA"]):
        output = " ".join(invoke(*arguments, "--picture", "curve.doc", code=2).split())
        assert re.search(r"curve.doc: expected a file that ends in .*\.jpg, .*\.png", output), output
        assert "curve" not in invoke(*arguments, "--picture", "curve.JPG", code=2)
    assert "expected a .json file" in invoke("bench", "MODEL", "--out", "generation.md", code=2)


def test_a_directory_that_cannot_be_made_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = ["--out", tmp_path / "file" / "out"]
    for arguments in (["linearize", "MODEL", "--no-train"], ["linearize", "MODEL", "--data", "DATA"],
                      ["transfer", "MODEL", "--data", "DATA"], ["export", "DIR", "--merge"],
                      ["import", "--base", "MODEL", "--transfer", "x.pt"]):  # fmt: skip
        output = " ".join(invoke(*arguments, *out, code=2).split())
        assert f"Cannot write to {out[1]}" in output


def test_a_directory_has_one_writer_and_any_readers(
    model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path
) -> None:
    """The second command that writes to a directory is refused at once, before it reads anything."""
    out, llama, before = tmp_path / "deep" / "out", model_dirs["llama"], sorted(finished.rglob("*"))
    start = (llama, "--data", chat_file, "--out", out, *sets(settings))
    commands: tuple[tuple[object, ...], ...] = (
        ("linearize", *start), ("transfer", *start), ("transfer", *start, "--schedule", "blocks", "--block", 0),
        ("finetune", finished), ("report", finished), ("export", finished, "--merge", "--out", out),
        ("import", "--base", llama, "--transfer", "a.pt", "--out", out),
    )  # fmt: skip
    with only_writer(finished) as first, only_writer(out) as second:
        assert first
        assert second
        for command in commands:
            place = finished if command[-1] == finished else out
            assert f"{place} is in use by another lolcats process" in invoke(*command, code=2)
        invoke("info", finished)
        invoke("generate", finished, "--prompt", "the cat", "--max-new-tokens", 2)
        invoke("evaluate", finished, "--data", chat_file, "--rows", 4)
        invoke("export", finished, "--merge", "--out", tmp_path / "export")
    assert not out.parent.exists(), "a refused command leaves nothing behind"
    assert sorted(finished.rglob("*")) == before
    (out / LOCK).parent.mkdir(parents=True)
    (out / LOCK).touch()  # left by a killed process
    invoke("export", finished, "--merge", "--out", out)
    assert not (out / LOCK).exists()
    for file in (out / "config.json", finished / "run.json" / "out"):  # what is wrong is still said
        assert "is in use" not in invoke("linearize", llama, "--data", chat_file, "--out", file, code=2)


def test_one_process_at_a_time_holds_a_directory(tmp_path: Path) -> None:
    holders, most, held = [0], [0], [0]

    def hold() -> None:
        for _ in range(200):
            with only_writer(tmp_path / "a" / "b") as ours:
                if ours:
                    holders[0] += 1
                    held[0] += 1
                    time.sleep(0)
                    most[0] = max(most[0], holders[0])
                    holders[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert held[0] > 0
    assert not (tmp_path / "a" / "b" / LOCK).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_its_parents_locks(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with locked(tmp_path / "lock", wait=False) as ours:
        assert ours
        running = context.Event()
        child = context.Process(target=lambda: (running.set(), time.sleep(60)))
        child.start()
        assert running.wait(60)
    try:
        with locked(tmp_path / "lock", wait=False) as again:
            assert again
    finally:
        child.kill()


def test_damaged_models_end_in_a_sentence(model_dirs, chat_file, settings, tmp_path: Path, finished: Path) -> None:
    import shutil

    broken = tmp_path / "base"
    shutil.copytree(model_dirs["llama"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    arguments = ("--data", chat_file, "--out", tmp_path / "out", *sets(settings))
    assert "Cannot load" in invoke("linearize", broken, *arguments, code=2)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00")
    assert "Cannot load" in invoke("linearize", gguf, *arguments, code=2)
    adapter = tmp_path / "adapter"
    shutil.copytree(finished, adapter)
    maps = adapter / "feature_maps.safetensors"
    maps.write_bytes(maps.read_bytes()[:-10])
    assert "damaged or truncated" in invoke("generate", adapter, "--prompt", "x", code=2)


def test_disk_full_keeps_everything_and_says_so(
    model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lolcats.stages.finetune.trainer as trainer

    arguments = ("linearize", model_dirs["llama"], "--data", chat_file, "--out", tmp_path / "out", *sets(settings))
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(trainer, "write_tensors", full)
        assert "The disk is full" in invoke(*arguments, code=2)
    invoke(*arguments)
    for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [60, 120, 200, 300])
def test_a_disk_that_is_really_full(
    kilobytes: int, model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path
) -> None:
    """A small file system fills up at different moments; with more space the command ends with the same weights."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    out = disk / "out"
    try:
        arguments = ("linearize", model_dirs["llama"], "--data", chat_file, "--out", out, *sets(settings))
        assert "The disk is full" in invoke(*arguments, code=2)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        invoke(*arguments)
        for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors", "merged/model.safetensors"):
            assert (out / name).read_bytes() == (finished / name).read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Job:
    """``lolcats linearize`` in its own process, slowed down so that signals arrive at the intended step."""

    SLOW = (
        "import time; from lolcats.stages.finetune.trainer import BestKeeper as b; "
        "from lolcats.stages.transfer.loop import LayerTrainer as t; o, p = b.on_step_end, t._end_step; "
        "b.on_step_end = lambda *a, **k: (o(*a, **k), time.sleep(0.15))[0]; "
        "t._end_step = lambda *a, **k: (p(*a, **k), time.sleep(0.15))[0]; from lolcats.cli import main; main()"
    )

    def __init__(self, model: Path, data: Path, out: Path, settings: list[str]) -> None:
        words = ["linearize", str(model), "--data", str(data), "--out", str(out), "--recipe", "paper-sinks"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.metrics, self.stderr = out / "metrics.jsonl", ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.SLOW, *words, *sets(settings)], stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def signal_after(self, stage: str, step: int, number: int) -> int:
        """Send the signal once metrics.jsonl shows that training step; returns the exit code."""
        deadline = time.time() + 120
        while not self._reached(stage, step):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.time() < deadline
            time.sleep(0.01)
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        self.stderr = self.process.communicate(timeout=120)[1]
        return self.process.returncode

    def _reached(self, stage: str, step: int) -> bool:
        try:
            lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        except (OSError, json.JSONDecodeError):
            return False
        return any(e["stage"] == stage and e["step"] >= step and "loss" in e for e in lines)


@pytest.mark.parametrize("name", ["linearize", "distill_data", "info", "chat"])
def test_only_commands_that_continue_speak_of_finished_work(name: str) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    stop.__name__ = name
    group = typer.Typer()
    command(stop, group)
    stopped = CliRunner().invoke(group, [])
    assert stopped.exit_code == 130
    assert "Stopped." in stopped.output
    saved = "Finished work is saved; run the same command again to continue." in stopped.output
    assert saved == (name in ("linearize", "distill_data"))


@pytest.mark.slow
def test_killed_at_any_moment_gives_the_same_weights(
    model_dirs, chat_file: Path, settings, tmp_path: Path, finished: Path
) -> None:
    """SIGKILL three times in each stage, always in the same directory; then the run finishes."""
    for stage, step in [("transfer", 1), ("transfer", 3), ("transfer", 5), ("finetune", 1), ("finetune", 2),
                        ("finetune", 3)]:  # fmt: skip
        job = Job(model_dirs["llama"], chat_file, tmp_path / "out", settings)
        assert job.signal_after(stage, step, signal.SIGKILL) == -signal.SIGKILL
        assert not (tmp_path / "out" / "merged").exists()
    assert Job(model_dirs["llama"], chat_file, tmp_path / "out", settings).wait() == 0
    for name in ("feature_maps.safetensors", "lora/adapter_model.safetensors", "merged/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / name).read_bytes(), name
    results = [json.loads((d / "run.json").read_text())["results"] for d in (tmp_path / "out", finished)]
    assert results[0] == results[1]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_continue(model_dirs, chat_file: Path, settings, tmp_path, finished: Path) -> None:
    job = Job(model_dirs["llama"], chat_file, tmp_path / "out", settings)
    assert job.signal_after("transfer", 3, signal.SIGINT) == 130
    assert "Run the same command again to continue" in job.stderr
    assert Job(model_dirs["llama"], chat_file, tmp_path / "out", settings).wait() == 0
    merged = "merged/model.safetensors"
    assert (tmp_path / "out" / merged).read_bytes() == (finished / merged).read_bytes()
