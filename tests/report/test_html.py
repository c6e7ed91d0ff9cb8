"""report.html has every section and needs no other file; the attention that it shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, tiny_model
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.config import AttentionConfig, load_config
from lolcats.evaluation.attention_maps import FILE, measure_attention
from lolcats.evaluation.scores import mean_score
from lolcats.evaluation.suite import Options
from lolcats.modeling.layer import linearized_layers
from lolcats.pipeline import linearize
from lolcats.report import html
from lolcats.report.comparison import write_comparison
from lolcats.report.table import attention_of
from lolcats.tensors import read_tensors

SECTIONS = [
    "Perplexity", "State per sequence", "Samples", "Training", "Error by layer", "Attention maps",
    "Effective sequence lengths", "Learned gamma", "Provenance",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def reports(no_reports) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "write_html", no_reports)
        yield


@pytest.fixture(scope="module")
def run(model_dirs, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    config = load_config("paper-sinks", [*SETTINGS, "controls=[window_lora]"])
    linearize(str(model_dirs["gemma3"]), str(chat_file), out, config, merge=False, say=lambda _: None)
    return out


def sections(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


def test_report_has_everything_and_needs_nothing(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert sections(page) == SECTIONS
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"<(script|link|iframe|object)|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert all(source.startswith("data:image/") for source in sources)
    assert len(sources) == 2 + 2 + 5 + 2
    results = json.loads((run / "run.json").read_text())["results"]
    for name in ("ppl_teacher", "ppl_window_sinks", "ppl_linear_off", "ppl_window_lora"):
        assert f"<td>{results[name]:.2f}</td>" in page
    assert "What linear attention adds" in page
    assert "tokens of attention transfer" in page


def test_report_on_the_command_line(run: Path, tmp_path: Path) -> None:
    """A run with benchmarks in its directory that has not measured its attention."""
    before = (run / "report.html").read_text()
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = json.loads((copy / "run.json").read_text())
    del record["results"]["attention"]
    (copy / "run.json").write_text(json.dumps(record))
    (copy / FILE).unlink()
    (copy / "report.html").unlink()
    items = {"teacher": (1, 1, 1, 0), "window": (0, 0, 0, 0), "student": (1, 1, 0, 0)}
    scores = {name: [mean_score("task", "nll", (own,), higher_is_better=False)] for name, own in items.items()}
    options = Options(data_dir=Path("/home/me/eval"), limit=4)
    place = torch.device("cpu"), torch.float32
    write_comparison(copy / "evaluation.json", scores, str(copy), ["task"], ["window"], place, options)
    write_comparison(copy / "evaluation-4.json", scores, str(copy), ["task"], ["window"], place,
                     replace(options, seed=5), "nf4")  # fmt: skip
    result = CliRunner().invoke(app, ["report", str(copy)])
    assert result.exit_code == 0, result.output
    page = (copy / "report.html").read_text()
    assert sections(page) == [SECTIONS[0], "Benchmarks", *SECTIONS[1:]]
    command = "lolcats evaluate copy --tasks task --baseline window --data-dir eval --limit 4"
    assert f"<pre>{command}</pre>" in page
    assert f"<pre>{command} --seed 5 --quantize nf4</pre>" in page
    assert page.count("cpu, float32: score") == page.count("cpu, base model in 4 bits (nf4), float32: score") == 1
    assert "<tr><td>task nll ↓</td><td>4</td><td>0.750 ± 0.250</td>" in page
    assert "<tr><td>task nll ↓</td><td>-0.250 ± 0.250</td>" in page
    assert "/home/me" not in page
    assert page.count("<img") == before.count("<img")
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2


def test_runs_without_linear_term(model_dirs, chat_file: Path, tmp_path: Path) -> None:
    for kind, missing in (("softmax", {*SECTIONS[4:8]}), ("window", {"Error by layer", "Learned gamma"})):
        config = load_config("paper-sinks", [*SETTINGS, f"attention.kind={kind}", "finetune.max_steps=2"])
        linearize(str(model_dirs["llama"]), str(chat_file), tmp_path / kind, config, merge=False, say=lambda _: None)
        page = (tmp_path / kind / "report.html").read_text()
        assert set(SECTIONS) - set(sections(page)) == missing
        assert "stage 1" not in page.split("<table", 1)[1].split("</table>", 1)[0], "the model after it is untrained"


def test_attention_in_words() -> None:
    for changes, words in (
        ({"feature_inputs": "unrotated"},
         "hybrid attention, terraced window of 64 tokens, 4 sinks, hedgehog feature maps before RoPE"),
        ({"kind": "linear", "layers": {"0-3": "softmax"}},
         "linear attention, hedgehog feature maps after RoPE, in layers 0-3 softmax"),
        ({"kind": "window", "sinks": 0}, "window attention, terraced window of 64 tokens, 0 sinks"),
    ):  # fmt: skip
        assert attention_of(AttentionConfig(**changes)) == words


def test_attention_is_that_of_teacher_and_student(tmp_path: Path) -> None:
    model = lolcats.convert(tiny_model(), AttentionConfig(window_size=8, sinks=2, feature_dim=8))
    row = torch.randint(6, 300, (600,))
    found = measure_attention(model, row, tmp_path / FILE, "teacher")
    maps = read_tensors(tmp_path / FILE)
    assert found["tokens"] == 512
    assert maps["teacher"].shape == maps["student"].shape == (5, 512, 512)
    for weights in maps.values():
        assert not weights.triu(1).any()
        torch.testing.assert_close(weights.float().sum(-1), torch.ones(5, 512), rtol=0, atol=5e-3)
    assert [head["rank"] for head in found["heads"]][::2] == ["lowest", "median", "highest"]
    errors = [error for layer in found["errors"] for error in layer]
    chosen = [found["errors"][head["layer"]][head["head"]] for head in found["heads"]]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (min(errors), max(errors))
    original = tiny_model()
    original.set_attn_implementation("eager")
    head = found["heads"][-1]
    expected = original(row[None, :512], output_attentions=True).attentions[head["layer"]][0, head["head"]]
    torch.testing.assert_close(maps["teacher"][-1].float(), expected, rtol=1e-3, atol=1e-3)
    assert len(found["lengths"]) == len(linearized_layers(model)) == 2
    assert all(1 <= length <= 512 for layer in found["lengths"] for length in layer)
