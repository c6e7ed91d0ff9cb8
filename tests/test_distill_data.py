"""``lolcats distill-data``: the teacher's own answers to prompts, as training data."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, sentence
from support.serving import serving
from support.tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import lolcats
from lolcats.cli import app
from lolcats.config import AttentionConfig
from lolcats.data.conversations import Misfit
from lolcats.files import locked
from lolcats.inference.engine import Engine
from lolcats.inference.server import Limits
from lolcats.lab.distill import run, server
from lolcats.lab.distill.prompts import AnyTemplate, prompt_reader
from lolcats.modeling.chat import ChatTemplate

TOKENS = 24


def questions(count: int) -> list[dict[str, Any]]:
    rng = random.Random(2)
    kinds: list[Callable[[str], dict[str, Any]]] = [
        lambda text: {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a mat"}]},
        lambda text: {"instruction": text, "input": "warm milk", "output": "far"},
        lambda text: {"prompt": text},
    ]
    return [kinds[i % 3](sentence(rng, 3 + i % 5)) for i in range(count)]


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return written(tmp_path / "prompts.jsonl", questions(24))


@pytest.fixture(scope="session")
def plain_dir(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without a chat template."""
    path = tmp_path_factory.mktemp("plain") / "llama"
    AutoModelForCausalLM.from_pretrained(model_dirs["llama"]).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["llama"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


def distill(model: Path | str, prompts: Path, out: Path, *options: str) -> Result:
    command = ["distill-data", str(model), "--prompts", str(prompts), "--out", str(out), "--max-tokens", str(TOKENS)]
    return CliRunner().invoke(app, [*command, "--slots", "4", *options])


def made(model: Path | str, prompts: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    result = distill(model, prompts, out, *options)
    assert result.exit_code == 0, result.output
    return read(out)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def meta(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.with_name(path.name + ".meta.yaml").read_text())
    return found


def said_by_generate(directory: Path, text: str, special: bool) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_are_those_of_the_base_model(family: str, model_dirs: dict[str, Path], prompts: Path) -> None:
    out = prompts.with_name("own.jsonl")
    records = made(model_dirs[family], prompts, out, "--keep-cut", "--license", "CC0, for the test")
    counts = meta(out)["counts"]
    assert len(records) == counts["written"] == counts["finished"] + counts["cut"] == 24
    assert counts["cut"] == sum(record.get("cut", False) for record in records)
    asked = [record["messages"][0]["content"] for record in records[:3]]
    given = questions(3)
    assert asked == [given[0]["messages"][0]["content"], f"{given[1]['instruction']}\n\nwarm milk", given[2]["prompt"]]
    for record in records[::5]:
        text = f"<|user|>{record['messages'][0]['content']}<eos><|assistant|>"
        assert record["messages"][1] == {
            "role": "assistant", "content": said_by_generate(model_dirs[family], text, False)
        }  # fmt: skip
    assert meta(out)["prompts"]["license"] == "CC0, for the test"
    assert not list(prompts.parent.glob("own.jsonl.[!m]*"))


def test_completions_that_are_cut_are_left_out(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    prompts, longer = written(tmp_path / "p.jsonl", questions(12)), ("--max-tokens", "100", "--temperature", "2")
    both = made(model_dirs["llama"], prompts, prompts.with_name("both.jsonl"), "--keep-cut", *longer)
    out = prompts.with_name("whole.jsonl")
    result = distill(model_dirs["llama"], prompts, out, *longer)
    counts = meta(out)["counts"]
    assert read(out) == [record for record in both if "cut" not in record]
    assert 0 < counts["finished"] == counts["written"] == len(read(out))
    assert counts["cut"] == 12 - len(read(out)) > 0
    assert f"{counts['cut']} cut at --max-tokens (left out)" in result.output


@pytest.mark.parametrize("options", [(), ("--temperature", "1", "--seed", "3")], ids=["greedy", "sampled"])
def test_answers_do_not_depend_on_what_is_generated_beside_them(
    options: tuple[str, ...], model_dirs: dict[str, Path], prompts: Path
) -> None:
    def made_with(slots: int) -> list[dict[str, Any]]:
        out = prompts.with_name(f"{slots}.jsonl")
        return made(model_dirs["llama"], prompts, out, "--keep-cut", "--slots", str(slots), *options)

    assert made_with(1) == made_with(5)


def test_seeds(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """Equal prompts are answered differently, and so they are with another seed."""
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "the cat"}] * 4)

    def said(seed: str) -> list[str]:
        options = ("--keep-cut", "--temperature", "1", "--seed", seed)
        records = made(model_dirs["llama"], prompts, tmp_path / f"{seed}.jsonl", *options)
        return [record["messages"][1]["content"] for record in records]

    assert len({*said("0"), *said("1")}) == 8


def test_a_stopped_run_goes_on(model_dirs: dict[str, Path], prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--temperature", "1", "--keep-cut")
    whole = made(model_dirs["llama"], prompts, prompts.with_name("whole.jsonl"), *options)
    out, real, lines = prompts.with_name("out.jsonl"), run.append_line, [0]

    def append(path: Path, line: str) -> None:
        lines[0] += 1
        if lines[0] == 9:
            path.open("a").write(line[: len(line) // 2])  # as a killed process leaves it
            raise KeyboardInterrupt
        real(path, line)

    monkeypatch.setattr(run, "append_line", append)
    assert distill(model_dirs["llama"], prompts, out, *options).exit_code == 130
    assert not out.exists()
    other = distill(model_dirs["llama"], prompts, out, *options, "--seed", "1")
    assert "belongs to a run with another teacher, other prompts or other options" in other.output
    result = distill(model_dirs["llama"], prompts, out, *options)
    assert "7 prompts are already answered: continuing." in result.output
    assert lines[0] == 9 + 24 - 7
    assert read(out) == whole
    assert meta(out)["counts"] == meta(prompts.with_name("whole.jsonl"))["counts"]
    again = distill(model_dirs["llama"], prompts, out, *options)  # has nothing left to do
    assert again.exit_code == 0
    assert lines[0] == 9 + 24 - 7
    assert "exists and holds something else" in distill(model_dirs["llama"], prompts, out).output


@pytest.mark.parametrize("template", [True, False], ids=["chat template", "none"])
def test_the_file_is_training_data(
    template: bool, model_dirs: dict[str, Path], plain_dir: Path, tmp_path: Path, settings: list[str]
) -> None:
    model = model_dirs["llama"] if template else plain_dir
    given = [record for record in questions(60) if template or "instruction" in record]
    out = tmp_path / "own.jsonl"
    records = made(model, written(tmp_path / "p.jsonl", given), out, "--keep-cut")
    assert set(records[0]) - {"cut"} == ({"messages"} if template else {"instruction", "input", "output"})
    sets = [word for change in settings for word in ("--set", change)]
    data = ["--data", str(out)]
    picture = ["--picture", str(tmp_path / "stats.png"), "--rows", "4"]
    stats = CliRunner().invoke(app, ["data", "stats", str(model), *data, *picture, *sets,
                                      "--recipe", "paper-sinks"])  # fmt: skip
    assert stats.exit_code == 0, stats.output
    if not template:
        return
    trained = CliRunner().invoke(app, ["linearize", str(model), *data, "--out", str(tmp_path / "run"),
                                        "--recipe", "paper-sinks", *sets])  # fmt: skip
    assert trained.exit_code == 0, trained.output


def test_texts_of_a_model_without_a_chat_template(plain_dir: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "the cat sat on"}, {"instruction": "sing", "input": ""}])
    text, instruction = made(plain_dir, prompts, tmp_path / "out.jsonl", "--keep-cut")
    completion = said_by_generate(plain_dir, "the cat sat on", True)
    assert text["completion"] == completion
    assert (text["prompt"], text["text"]) == ("the cat sat on", "the cat sat on" + completion)
    assert instruction["instruction"] == "sing"
    assert "input" not in instruction
    assert instruction["output"]


def test_a_linearized_model_answers_in_its_own_words(model_dirs: dict[str, Path], prompts: Path) -> None:
    model = lolcats.convert(AutoModelForCausalLM.from_pretrained(model_dirs["llama"]), AttentionConfig(kind="softmax"))
    kept = prompts.with_name("kept")
    model.save_pretrained(kept)
    AutoTokenizer.from_pretrained(model_dirs["llama"]).save_pretrained(kept)
    ours = made(kept, prompts, prompts.with_name("kept.jsonl"), "--keep-cut")
    assert ours == made(model_dirs["llama"], prompts, prompts.with_name("base.jsonl"), "--keep-cut")


def test_a_model_that_the_engine_cannot_run(prompts: Path, tokenizer: Any) -> None:
    mamba = prompts.with_name("mamba")
    tiny("mamba").save_pretrained(mamba)
    tokenizer.save_pretrained(mamba)
    result = distill(mamba, prompts, prompts.with_name("out.jsonl"))
    assert result.exit_code == 2
    assert "serve it with another engine and pass --server" in " ".join(result.output.split())


@pytest.fixture
def engine(model_dirs: dict[str, Path]) -> Engine:
    model = AutoModelForCausalLM.from_pretrained(model_dirs["llama"])
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["llama"])
    return Engine(lolcats.convert(model, AttentionConfig(kind="softmax")), tokenizer, slots=2)


@pytest.mark.parametrize("raw", [False, True], ids=["chat", "raw"])
def test_a_server_answers_as_the_model_does(
    raw: bool, engine: Engine, model_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a server that has no room is asked again."""
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(server, "_asked_to_wait", lambda error: 0.05)
    monkeypatch.setattr(server, "TRIES", 1000)
    given = [record for record in questions(12) if not (raw and "messages" in record)]
    prompts, options = written(tmp_path / "p.jsonl", given), ("--keep-cut", *(["--raw"] if raw else []))
    with serving(engine, Limits(waiting=1), api_key="secret") as (address, _):
        url = ("--server", f"{address}/v1", "--api-key", "secret")
        theirs = made("tiny", prompts, tmp_path / "theirs.jsonl", *url, "--slots", "8", *options)
    ours = made(model_dirs["llama"], prompts, tmp_path / "ours.jsonl", *options)
    assert theirs == ours
    counts = [meta(tmp_path / name)["counts"] for name in ("theirs.jsonl", "ours.jsonl")]
    assert counts[0] == counts[1]


def test_what_a_server_refuses(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "cat " * 60}, {"prompt": "cat"}])
    with serving(engine, Limits(context=60)) as (address, _):
        url = ("--server", f"{address}/v1")
        assert len(made("tiny", prompts, tmp_path / "a.jsonl", *url, "--keep-cut")) == 1
        (reason,) = meta(tmp_path / "a.jsonl")["skipped"]
        assert reason.startswith("refused by the server: 400: ")
        assert "exceed the limit of 60" in reason
        assert "has the model 'tiny', not 'other'" in distill("other", prompts, tmp_path / "b.jsonl", *url).output
    unreachable = distill("tiny", prompts, tmp_path / "c.jsonl", *url)
    assert unreachable.exit_code == 2
    assert "did not answer in 8 tries" in unreachable.output
    assert "expected an address" in distill("tiny", prompts, tmp_path / "c.jsonl", "--server", "localhost").output


def test_what_cannot_be_used(model_dirs: dict[str, Path], plain_dir: Path, tmp_path: Path) -> None:
    bad = [
        {"prompt": ""}, {"messages": [{"role": "assistant", "content": "a"}]}, {"instruction": None},
        {"prompt": "\ud83d"}, {"messages": [{"role": "critic", "content": "a"}]}, {"prompt": "cat " * 3000},
    ]  # fmt: skip
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "cat"}, *bad])
    assert len(made(model_dirs["llama"], prompts, tmp_path / "a.jsonl", "--keep-cut")) == 1
    found = meta(tmp_path / "a.jsonl")
    assert found["counts"]["skipped"] == len(bad)
    assert set(found["skipped"]) == {
        "its prompt is empty", "its conversation asks nothing", "its instruction is null",
        "it holds half a surrogate pair, which is not Unicode text",
        "message 1, role 'critic': the chat template does not know this role",
        "prompt and --max-tokens exceed the model's context of 2048 tokens",
    }  # fmt: skip

    def said(records: list[dict[str, Any]], model: Path = model_dirs["llama"], out: str = "b.jsonl") -> str:
        result = distill(model, written(tmp_path / "q.jsonl", records), tmp_path / out)
        assert result.exit_code == 2
        return " ".join(result.output.split())

    assert "Record 1 of" in said([{"text": "cat"}])
    assert "has no prompt: its columns are text; expected messages" in said([{"text": "cat"}])
    assert "was answered: its prompt is empty (2)" in said([{"prompt": ""}, {"prompt": " "}])
    assert "which need a chat template" in said([{"messages": [{"role": "user", "content": "a"}]}], plain_dir)
    assert "expected a .jsonl file" in said([{"prompt": "cat"}], out="b.txt")
    assert "is not a directory" in said([{"prompt": "cat"}], out="no/b.jsonl")
    with locked(tmp_path / "c.jsonl.lock", remove=True):
        assert "is being written by another lolcats process" in said([{"prompt": "cat"}], out="c.jsonl")


def test_many_prompts_that_are_too_long(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """They do not stop the run if any other can be answered."""
    long = [{"prompt": "cat " * 3000}] * (run.ALL_SKIPPED + 1)
    prompts = written(tmp_path / "p.jsonl", [*long, {"prompt": "cat"}])
    assert len(made(model_dirs["llama"], prompts, tmp_path / "a.jsonl", "--keep-cut")) == 1
    assert meta(tmp_path / "a.jsonl")["counts"]["skipped"] == len(long)
    alone = distill(model_dirs["llama"], written(prompts, long), tmp_path / "b.jsonl")
    assert f"The first {run.ALL_SKIPPED} prompts could not be answered: prompt and --max-tokens" in alone.output


def test_parquet(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    given = [{"prompt": "the cat"}, {"prompt": "dogs like"}]
    parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "p.parquet")
    records = made(model_dirs["llama"], tmp_path / "p.parquet", tmp_path / "out.jsonl", "--keep-cut")
    assert [record["messages"][0]["content"] for record in records] == ["the cat", "dogs like"]


def test_conversations_up_to_their_last_answer(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    last = {"role": "assistant", "content": "d"}
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    for template in (ChatTemplate(tokenizer), AnyTemplate()):
        read = prompt_reader(template)
        for record in ({"messages": [*turns, last]}, {"messages": turns}, {"conversations": shared}, {"prompt": turns}):
            assert read(record).record("e") == {"messages": [*turns, {"role": "assistant", "content": "e"}]}
        with pytest.raises(Misfit, match="asks nothing"):
            read({"messages": [{"role": "system", "content": "a"}, last]})
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_tools_go_to_servers(engine: Engine) -> None:
    """Calls with their arguments as JSON, which OpenAI's API wants."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    prompt = prompt_reader(AnyTemplate())(
        {"messages": [*asked, {"role": "tool", "content": "b", "tool_call_id": "call00001"}], "tools": [tool]}
    )
    assert prompt.record("e")["tools"] == [tool]
    assert prompt.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    sent: list[dict[str, Any]] = []
    teacher = server.ServedTeacher("http://localhost", "tiny", run.Sampling(), 1)
    reply = {"choices": [{"message": {"content": "e"}, "finish_reason": "stop"}]}
    teacher._post = lambda path, body: sent.append(body) or reply  # type: ignore[method-assign,func-returns-value]
    assert [answer.text for _, answer in teacher.answers([run.Numbered(0, prompt)])] == ["e"]
    assert sent[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert (sent[0]["tools"], sent[0]["tool_choice"]) == ([tool], "none")
