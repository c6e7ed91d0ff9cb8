"""``lolcats evaluate --tasks``: lm-eval on local Parquet files, for teacher, baseline and student."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from conftest import SETTINGS
from support.local_data import FILES, SUBJECTS, write_files
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.config import AttentionConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation import harness, tasks
from lolcats.evaluation.kinds import KINDS
from lolcats.evaluation.suite import beyond_training
from lolcats.evaluation.systems import check_baselines, systems
from lolcats.modeling.checkpoint import load
from lolcats.modeling.layer import override
from lolcats.pipeline import linearize
from lolcats.run import Run
from lolcats.weights.base import find_base, load_model

CPU = (torch.device("cpu"), torch.float32)
# The first row of each local file, in the format of the hub's data sets.
HUB: dict[str, dict[str, Any]] = {
    "piqa": FILES["piqa_valid"][0],
    "arc_easy": FILES["arc_easy_test"][0],
    "arc_challenge": FILES["arc_challenge_test"][0],
    "winogrande": FILES["winogrande_xl_dev"][0],
    "hellaswag": {"activity_label": "Cats", "ctx_a": "A cat sat.", "ctx_b": "she", "label": "0",
                  "endings": FILES["hellaswag_val"][0]["endings"]},
    "lambada_openai": {"text": "the cat saw warm milk"},
    "wikitext": {"page": " = Cats = \n the cat saw warm milk . \n = = Milk = = \n"},
}  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("parquet"))


@pytest.fixture(scope="module")
def trained(model_dirs, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with feature maps, LoRA and a merged model."""
    out = tmp_path_factory.mktemp("trained") / "run"
    linearize(str(model_dirs["llama"]), str(chat_file), out, load_config("paper-sinks", SETTINGS), say=lambda _: None)
    return out


@pytest.fixture
def lm_eval() -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lolcats[eval]'")


def evaluate(*arguments: object, code: int = 0) -> str:
    words = ["evaluate", *(str(a) for a in arguments), "--device", "cpu", "--dtype", "float32"]
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, words)
    if result.exit_code != code:
        raise AssertionError(f"exit code {result.exit_code}: {result.output}") from result.exception
    return result.output


def rendered(task: Any) -> tuple[Any, ...]:
    """Everything that lm-eval builds from a task's first document before a model sees it."""
    document = task.eval_docs[0]
    task.build_all_requests(limit=1)
    requests = [instance.args for instance in task.instances]
    return task.doc_to_target(document), requests, list(task.aggregation())


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize("name", HUB)
def test_local_documents_give_lm_evals_own_prompts(name: str, data_dir: Path) -> None:
    from datasets import Dataset

    splits = {split: Dataset.from_list([HUB[name]]) for split in ("train", "validation", "test")}
    own = {"group": "hub", "task": [{"task": name, "custom_dataset": lambda **_: splits}]}
    (hub,), (local,) = (harness.load_tasks([spec]) for spec in (own, tasks.named_spec(name, data_dir)))
    (hub_task,), (local_task,) = hub.get_all_tasks(), local.get_all_tasks()
    for task in (hub_task, local_task):
        task.set_config("num_fewshot", 0)
    assert rendered(local_task) == rendered(hub_task)


@pytest.mark.usefixtures("lm_eval")
def test_mmlu_has_its_own_examples_in_order(data_dir: Path) -> None:
    (group,) = harness.load_tasks([tasks.mmlu_spec(data_dir)])
    children = group.get_all_tasks()
    assert [task.task_name for task in children] == [f"mmlu_{subject}" for subject in SUBJECTS]
    prompt = children[0].fewshot_context(children[0].eval_docs[0], 5)
    header = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    shot = "anatomy {i}?\nA. {w} 0\nB. {w} 1\nC. {w} 2\nD. {w} 3\nAnswer: {a}\n\n"
    shots = "".join(
        shot.format(i=i, w=FILES["mmlu_dev"][i]["choice0"].removesuffix(" 0"), a="ABCDA"[i]) for i in range(5)
    )
    assert prompt == f"{header}{shots}What is the?\nA. the\nB. cat\nC. sat\nD. on\nAnswer:"


@pytest.mark.usefixtures("lm_eval")
def test_tasks_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without local files, the same specs load lm-eval's own documents from the hub."""
    import datasets

    question = {"question": "?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}
    rows = {"cais/mmlu": [question] * 5, "baber/piqa": [HUB["piqa"]], "allenai/ai2_arc": [HUB["arc_easy"]],
            "Rowan/hellaswag": [HUB["hellaswag"]], "allenai/winogrande": [HUB["winogrande"]]}  # fmt: skip
    asked: list[tuple[str, str | None]] = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> dict[str, Any]:
        asked.append((path, name))
        return dict.fromkeys(("train", "dev", "validation", "test"), datasets.Dataset.from_list(rows[path]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    *_, mmlu = harness.load_tasks(tasks.paper_specs(None))
    assert asked[:2] == [("baber/piqa", None), ("allenai/ai2_arc", "ARC-Easy")]
    children = mmlu.get_all_tasks()
    assert (mmlu.name, len(children), mmlu.has_aggregation) == ("mmlu", 57, True)
    assert {task.config.num_fewshot for task in children} == {5}
    (permuted,) = harness.load_tasks([tasks.permuted_mmlu_spec(None)])
    assert [d["answer"] for d in permuted.get_all_tasks()[0].eval_docs][:5] == [1, 0, 3, 2, 1]


@pytest.mark.usefixtures("lm_eval")
def test_rotated_options_keep_the_answer_and_the_examples(data_dir: Path) -> None:
    (plain,), (rotated,) = (
        harness.load_tasks([spec]) for spec in (tasks.mmlu_spec(data_dir), tasks.permuted_mmlu_spec(data_dir))
    )
    before, after = plain.get_all_tasks()[1], rotated.get_all_tasks()[1]
    for i, document in enumerate(after.eval_docs):
        original = before.eval_docs[i // 4]
        assert document["choices"][document["answer"]] == original["choices"][original["answer"]]
        assert document["choices"].index(original["choices"][0]) == -(i % 4) % 4
    assert after.fewshot_context(after.eval_docs[0], 5) == before.fewshot_context(before.eval_docs[0], 5)


@pytest.mark.usefixtures("lm_eval")
def test_gsm8k_never_asks_its_examples(data_dir: Path) -> None:
    (group,) = harness.load_tasks([tasks.gsm8k_spec(data_dir)])
    (task,) = group.get_all_tasks()
    assert group.name == "gsm8k_train"
    prompt = task.fewshot_context(task.eval_docs[0], 5)
    assert [i for i in range(9) if f"The cat saw {i} dogs" in prompt] == [0, 1, 2, 3, 4, 5]
    assert prompt.endswith("The cat saw 5 dogs and 5 birds. How many?\nAnswer:")


def test_models_compared(trained: Path, model_dirs) -> None:
    """The teacher is bit for bit the base model, without LoRA; the untrained baselines have no trained part either."""
    ids = torch.arange(3, 60)[None]
    found = {}
    with torch.no_grad():
        for baseline in ("window", "window+sinks", "linear-off", str(trained / "merged")):
            for name, model in systems(str(trained), [baseline], *CPU):
                found[name] = model(input_ids=ids, use_cache=False).logits
        base = load_model(Run.open(trained).base, torch.float32)
        torch.testing.assert_close(found["teacher"], base(input_ids=ids).logits, rtol=0, atol=0)
        student = load(trained)
        torch.testing.assert_close(found["student"], student(input_ids=ids).logits)
        torch.testing.assert_close(found[str(trained / "merged")], found["student"], rtol=1e-4, atol=1e-4)
        with override(student, kind="window"):
            torch.testing.assert_close(found["linear-off"], student(input_ids=ids).logits)
        with override(student, mode="teacher"):
            assert not torch.allclose(found["teacher"], student(input_ids=ids).logits, atol=1e-3), "that has LoRA"
    assert not torch.allclose(found["window"], found["window+sinks"], atol=1e-3)
    torch.testing.assert_close(found["window+sinks"][:, :8], found["teacher"][:, :8], rtol=1e-4, atol=1e-4)
    assert [name for name, _ in systems(str(trained / "merged"), [], *CPU)] == ["student"]
    assert [name for name, _ in systems(str(model_dirs["llama"]), [], *CPU)] == ["llama"]
    for model, baseline in ((trained, "nothing"), (model_dirs["llama"], "window"), (trained / "merged", "window")):
        with pytest.raises(LolcatsError):
            check_baselines(str(model), [baseline])


@pytest.mark.usefixtures("lm_eval")
def test_benchmarks_end_to_end(trained: Path, data_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    text = evaluate(trained, "--tasks", "paper,mmlu-permuted,lambada_openai,wikitext", "--data-dir", data_dir,
                    "--baseline", "window", "--limit", 3, "--output", output)  # fmt: skip
    record = json.loads(output.read_text())
    entries = {(e["task"], e["metric"]): e for e in record["scores"]}
    assert [key for key in entries if key[1].startswith("acc") and "mmlu" not in key[0]] == [
        ("piqa", "acc"), ("arc_easy", "acc"), ("arc_challenge", "acc_norm"), ("hellaswag", "acc_norm"),
        ("winogrande", "acc"), ("zero-shot average", "acc, acc_norm"), ("lambada_openai", "acc"),
    ]  # fmt: skip
    for (task, metric), entry in entries.items():
        assert list(entry["models"]) == ["teacher", "window", "student"]
        assert f"{task} {metric}" in text
    assert entries["mmlu_half", "acc"]["items"] == 3 * len(SUBJECTS)
    permuted = entries["mmlu_permuted_half", "acc in the given order"]
    assert permuted["results"] == entries["mmlu_half", "acc"]["results"]
    average = sum(entries[task, metric]["models"]["student"]["value"] for task, metric in tasks.PAPER.items()) / 5
    found = entries["zero-shot average", "acc, acc_norm"]["models"]["student"]["value"]
    assert found == pytest.approx(average)
    assert record["versions"]["lm_eval"]


@pytest.mark.usefixtures("lm_eval")
def test_batches_change_nothing(model_dirs, data_dir: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student's likelihoods and generated answers are the same for single prompts and (left-padded) batches."""
    from lm_eval.models.huggingface import HFLM

    answers: list[list[str]] = []
    generate = HFLM.generate_until
    monkeypatch.setattr(HFLM, "generate_until", lambda *a, **k: answers.append(generate(*a, **k)) or answers[-1])
    model = lolcats.convert(load_model(find_base(str(model_dirs["llama"])), torch.float32))
    loaded = harness.load_tasks([tasks.named_spec("piqa", data_dir), tasks.gsm8k_spec(data_dir)])
    single, batched = (harness.Harness(loaded, tokenizer, {}, size, 1234)(model) for size in (1, 4))
    assert [(s.key, s.items) for s in single] == [(s.key, s.items) for s in batched]
    assert [s.key for s in single][-1] == ("gsm8k_train", "exact_match (flexible-extract)")
    assert answers[0] == answers[1]
    assert all(answers[0])
    assert model.config.use_cache is True, "left as it was"


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize("kept", [{}, {0: [1]}])
@pytest.mark.parametrize("shared", ["", "Some worked examples. " * 20])
def test_the_engine_answers_as_lm_eval_does(
    kept: dict[int, list[int]], shared: str, model_dirs, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it goes on from what all prompts begin with."""
    from lolcats.evaluation import bridge, generation

    base = load_model(find_base(str(model_dirs["llama"])), torch.float32)
    with torch.no_grad():  # attention far from uniform, so that answers differ
        for name, parameter in base.named_parameters():
            parameter.mul_(6 if "q_proj" in name or "k_proj" in name else 1)
    model = lolcats.convert(base, AttentionConfig(window_size=16, softmax_heads=kept))
    judge = bridge.Bridge(model, tokenizer, 2, {})
    contexts = ["One", "Two and some more words to read before the answer comes.", "Three " * 40, "Four, five?"]
    contexts = [shared + context for context in contexts]
    begun: list[int] = []
    after = generation.after
    monkeypatch.setattr(generation, "after", lambda engine, tokens: begun.append(len(tokens)) or after(engine, tokens))

    def both(settings: dict[str, Any]) -> list[str]:
        requests = [SimpleNamespace(args=(context, settings)) for context in contexts]
        theirs = judge.generate_until(requests, disable_tqdm=True)
        with monkeypatch.context() as patch:
            patch.setattr(bridge, "uses_engine", lambda _: True)
            patch.setattr(bridge.HFLM, "generate_until", None)
            assert judge.generate_until(requests) == theirs
        return theirs

    whole = both({"until": [], "max_gen_toks": 24, "do_sample": False})
    assert len(set(whole)) == len(contexts)
    ends = [text[len(text) // 2 :][:2] for text in whole[:2]]
    cut = both({"until": ends, "max_gen_toks": 24})
    assert all(len(short) < len(text) for short, text in zip(cut[:2], whole, strict=False))
    assert all(count > 64 if shared else count == 0 for count in begun)
    assert len(begun) == 2


def test_what_prompts_begin_with() -> None:
    from lolcats.evaluation.generation import SHARED, beginning

    shots = list(range(SHARED))
    assert beginning([[*shots, 1], [*shots, 2, 3]]) == shots
    assert beginning([[*shots, 1], shots]) == [], "too short: each has a token of its own"
    assert beginning([[*shots, 7], [*shots, 7]]) == shots
    assert beginning([[*shots, 1]]) == beginning([]) == []


def test_recall_and_positions_on_the_command_line(trained: Path, data_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    arguments = ("--tasks", "recall, positions", "--lengths", "600,700", "--limit", 1, "--output", output)
    text = evaluate(trained, *arguments, "--data-dir", data_dir)
    assert "Recall by depth: argmax" in text
    trained_on = load_config(str(trained / "config.yaml")).data.sequence_length
    warning = f"trained on rows of {trained_on} tokens but is evaluated on up to 700: expect worse results there"
    assert warning in " ".join(text.split())
    assert not beyond_training(str(trained), [trained_on])
    assert not beyond_training("a/base-model", [600])
    entries = json.loads(output.read_text())["scores"]
    assert {e["task"] for e in entries} == {
        *(f"{kind}@{n}" for kind in KINDS for n in (600, 700)), "positions",
    }  # fmt: skip
    assert entries[0]["depths"] == ["0", "0.25", "0.5", "0.75", "1"]
    assert entries[0]["prompts"] == [0, 1, 2, 3, 4]
    assert [e["metric"] for e in entries if e["task"] == "multi-query@700"] == [
        "exact", "exact beyond the window", "generated", "argmax", "nll",
    ], "a window of 16 tokens ends before the question"  # fmt: skip
    book = tmp_path / "book.txt"
    book.write_text(FILES["long_books"][0]["text"])
    evaluate(trained, "--tasks", "recall-passkey, positions", *arguments[2:], "--data", book)
    again = json.loads(output.read_text())
    same = [entry for entry in entries if entry["task"].startswith(("passkey", "positions"))]
    assert again["scores"] == same, "the same text and seed: the same results"
    assert again["options"]["seen"] == {"window": 16, "sinks": 2}
    single = ("--tasks", "recall-passkey", "--lengths", 600, "--limit", 6, "--data", book, "--output", output)
    evaluate(trained / "merged", *single)
    entries = json.loads(output.read_text())["scores"]
    assert {(e["task"], e["items"]) for e in entries} == {("passkey@600", 10)}, "the same number at each depth"


def test_mistakes_end_in_a_sentence(trained: Path, data_dir: Path, tmp_path: Path) -> None:
    def fails(expected: str, *arguments: object) -> None:
        output = " ".join(evaluate(trained, *arguments, code=2).split())
        assert expected in output, output

    fails("Nothing to evaluate")
    fails("is not a directory", "--tasks", "recall", "--output", tmp_path / "none" / "results.json")
    fails("neither a linearized model nor one of window", "--tasks", "recall", "--baseline", "nonsense")
    fails("These tasks need long text: give --data FILE", "--tasks", "recall")
    fails("holds no long_books.parquet", "--tasks", "recall", "--data-dir", tmp_path)
    fails("expected positive numbers", "--tasks", "recall", "--lengths", "1k")
    fails("No document has 99999 tokens", "--tasks", "positions", "--lengths", 99999, "--data-dir", data_dir)


@pytest.mark.usefixtures("lm_eval")
def test_unknown_tasks_and_missing_data_end_in_a_sentence(trained: Path, data_dir: Path, tmp_path: Path) -> None:
    assert "Did you mean paper" in evaluate(trained, "--tasks", "papr", code=2)
    assert "Did you mean piqa" in evaluate(trained, "--tasks", "piqua", "--data-dir", data_dir, code=2)
    assert "holds no piqa_valid.parquet" in evaluate(trained, "--tasks", "paper", "--data-dir", tmp_path, code=2)
    assert "local Parquet files with --data-dir" in evaluate(trained, "--tasks", "boolq", code=2)


@pytest.mark.usefixtures("lm_eval")
def test_likelihoods_are_lm_evals_own(model_dirs, data_dir: Path, tokenizer) -> None:
    """Shared rows, logits only of continuations, padded batches and a second model change nothing."""
    from lm_eval.models.huggingface import HFLM

    from lolcats.evaluation.bridge import Bridge, make_batches

    specs = [tasks.named_spec(name, data_dir) for name in ("piqa", "arc_easy", "wikitext")]
    harness_ = harness.Harness(harness.load_tasks([*specs, tasks.mmlu_spec(data_dir)]), tokenizer, {"piqa": 3}, 4, 1234)
    models = [load_model(find_base(str(model_dirs[name])), torch.float32) for name in ("llama", "qwen2")]
    for model in (lolcats.convert(models[0]), models[1]):
        scores = harness_(model)
        known = len(harness_.known)
        built = [request for task in harness_.loaded["tasks"].values() for request in task.instances]
        requests = [request for request in built if request.request_type == "loglikelihood"]
        own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, softmax_dtype="float32")
        bridge = Bridge(model, tokenizer, 4, harness_.known)
        for found, expected in zip(bridge.loglikelihood(requests), own.loglikelihood(requests), strict=True):
            assert found == (pytest.approx(expected[0], rel=1e-4, abs=1e-5), expected[1])
        assert len(harness_.known) == known == 1, "tokenized once"
        rolling = harness_.loaded["tasks"]["wikitext"].instances
        assert bridge.loglikelihood_rolling(rolling) == pytest.approx(own.loglikelihood_rolling(rolling), rel=1e-4)
        counts = {score.task: score.count for score in scores}
        assert (counts["piqa"], counts["arc_easy"]) == (3, 6)
    start = Bridge(models[1], tokenizer, 1, {})._encoded("", "milk")[0]
    assert start == [tokenizer.bos_token_id or tokenizer.eos_token_id]
    (batch,) = make_batches([([1, 2, 3], [n]) for n in (7, 8)], 100, 64)
    assert batch.ids.shape == (1, 16), "requests that differ in their last token share a row"
    assert (batch.places.tolist(), batch.targets.tolist(), batch.requests.tolist()) == ([2, 2], [7, 8], [0, 1])
    assert [len(b.ids) for b in make_batches([([n], [0]) for n in range(9)], 100, 64)] == [4, 4, 1]


@pytest.mark.usefixtures("lm_eval")
def test_items_of_a_group_are_shared_by_its_tasks(data_dir: Path, tokenizer) -> None:
    loaded = harness.load_tasks([tasks.mmlu_spec(data_dir), tasks.named_spec("piqa", data_dir)])
    limits = {"mmlu_half": 3, "": 5}
    chosen = harness.Harness(loaded, tokenizer, limits, 1, 0).chosen
    assert chosen == {"mmlu_anatomy": [0, 1], "mmlu_virology": [0, 1], "piqa": [0, 1, 2, 3, 4]}
