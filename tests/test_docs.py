"""The pages of docs/: they build, what they name exists, and the tutorial runs."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

from lolcats.attention import AttentionSpec, AttentionState
from lolcats.cli import app
from lolcats.config import Config, recipe_names

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "benchmarks/quality/README.md"])
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
VALUE = r"(?:'[^']*'|\"[^\"]*\"|\S+)"


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's bash blocks, continued lines joined and comments dropped."""
    for language, _, block in FENCE.findall(page.read_text()):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def subcommand(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The command that a line calls and the words behind its name; None if it calls none of ours."""
    programs = ("lolcats", "lolcats.cli")
    start = next((i for i, word in enumerate(words) if word in programs), None)
    if start is None:
        return None
    command: Any = typer.main.get_command(app)
    rest = words[start + 1 :]
    while hasattr(command, "commands"):
        assert rest, f"no command in {shlex.join(words)}"
        assert rest[0] in command.commands, f"there is no lolcats {rest[0]}: {shlex.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def has_setting(dotted: str) -> bool:
    kind: Any = Config
    for name in dotted.split("."):
        if not dataclasses.is_dataclass(kind) or name not in get_type_hints(kind):
            return False
        kind = get_type_hints(kind)[name]
    return True


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_options_recipes_and_settings_exist(page: Path) -> None:
    for words in shell_lines(page):
        if (found := subcommand(words)) is None:
            continue
        command, rest = found
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        for i, word in enumerate(rest):
            if word.startswith("--"):
                assert word.partition("=")[0] in options, f"lolcats {command.name} has no {word}: {shlex.join(words)}"
            if word == "--recipe":
                assert rest[i + 1] in recipe_names() or rest[i + 1].endswith(".yaml"), rest[i + 1]
            if word == "--set" and command.name != "sweep":
                assert has_setting(rest[i + 1].partition("=")[0]), rest[i + 1]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_and_settings_in_the_text_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in re.findall(r"`lolcats ([a-z]+)\b", text):
        assert name in commands, f"lolcats {name}"
    sections = "|".join(field.name for field in dataclasses.fields(Config))
    for setting in re.findall(rf"`(?:--set )?((?:{sections})\.[a-z_]+)(?:[=:` ]|$)", text):
        assert has_setting(setting) or setting.endswith((".py", ".yaml", ".json", ".safetensors")), setting


def test_a_wrong_command_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for line in (
        "lolcats linearise MODEL",
        "lolcats info MODEL --colour red",
        "lolcats transfer M --set transfer.lr=1",
    ):
        page.write_text(f"```bash\n{line}\n```\n")
        with pytest.raises(AssertionError):
            test_commands_options_recipes_and_settings_exist(page)


def test_figures_on_the_first_page_are_the_readmes() -> None:
    readme = set((ROOT / "README.md").read_text().splitlines())
    rows = [line for line in (ROOT / "docs/index.md").read_text().splitlines() if re.match(r"\|.*\d.*\|$", line)]
    assert len(rows) > 15
    assert [row for row in rows if row not in readme] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a link that leads nowhere, or a name that the API pages do not find, fails the build."""
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed (extra: docs)")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return out


def test_pages_need_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", page.read_text())
        assert [tag for tag in loaded if 'rel="canonical"' not in tag] == [], page


def test_equations_are_mathml(site: Path) -> None:
    for name in ("method", "attention"):
        source = (ROOT / "docs/theory" / f"{name}.md").read_text()
        html = (site / "theory" / f"{name}.html").read_text()
        article = re.search(r"<article.*</article>", html, re.S)[0]  # type: ignore[index]
        assert len(re.findall(r'<math [^>]*display="block"', article)) == source.count("$$") / 2 >= 5
        visible = re.sub(r"<[^>]+>", "", article)
        assert "$" not in visible, "an equation was not converted"
        assert "\\" not in visible, "a LaTeX command was not converted"
        assert not re.search(r"equation\d+end", html)


def test_bytes_of_state() -> None:
    """The formula of theory/attention.md, and its example."""
    layers, H, G, D, F, w, s, b = 30, 9, 3, 64, 128, 64, 4, 4
    for M in (H, G):
        k = torch.empty(1, G, 0, D, device="meta")
        state = AttentionState.empty(k, k, M, F, AttentionSpec(window_size=w, sinks=s))
        assert state.nbytes == 4 * M * F * (D + 1) + 2 * b * G * (2 * w + s) * D + 8
        if M == H:
            assert f"{layers * state.nbytes / 2**20:.1f}" == "14.4"


def test_the_api_has_shapes_errors_and_sources(site: Path) -> None:
    def text(name: str) -> str:
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", (site / "api" / f"{name}.html").read_text()))

    attention = text("attention")
    for wanted in ("(B, H, T, D)", "(B, H or G, F, D)", "fp32", "Raises", "arXiv 2410.10254, Eq. 7", "LolcatsError"):
        assert wanted in attention, wanted
    settings = text("config")
    for section in dataclasses.fields(Config):
        kind = get_type_hints(Config)[section.name]
        for field in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else [section]:
            assert f" {field.name} " in settings or f"{field.name}:" in settings, field.name
    for page in (site / "api").glob("*.html"):
        assert not re.search(r":(func|class|mod):", page.read_text()), page


def run_block(language: str, title: str, block: str, namespace: dict[str, Any]) -> str:
    """What a reader would do with a block of the tutorial, and what it prints."""
    if title:
        Path(title).write_text(block)
        return ""
    if language == "python":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "tutorial", "exec"), namespace)
        return printed.getvalue()
    assert language == "bash", f"the tutorial has a block that is not run: {language}"
    outputs = []
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "lolcats", line
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}: {result.output}{result.exception!r}"
        outputs.append(result.output)
    return "".join(outputs)


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    blocks = FENCE.findall((ROOT / "docs/tutorial.md").read_text())
    output = [run_block(*block, namespace) for block in blocks]
    assert len(blocks) >= 10
    assert "can be linearized" in output[1]
    assert "after stage 2 (LoRA)" in output[3]
    assert "window + lora" in output[7].lower() or "same LoRA" in output[7], output[7]
    for file in ("feature_maps.safetensors", "lora", "merged", "run.json", "metrics.jsonl", "README.md"):
        assert (tmp_path / "run" / file).exists(), file
    assert (tmp_path / "small-model" / "model.safetensors").exists()
