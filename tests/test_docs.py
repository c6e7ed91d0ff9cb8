"""The pages of docs/ and the README: they build, what they name exists, the tutorial runs, the English is plain."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
import sys
import tokenize
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
HEADINGS = ["Try it", "Install", "Use it", "In Python", "Will my model work?", "Links"]
TELL_TALE = (
    "window alone", "behind rope", "in front of rope", "(?<!there )are none", "is none of", "that is none",
    "is no number", "are no numbers", "no numbers", "at most so many", "behind so many", "behind the last",
    "behind them", "rank 0 alone", "by no means",
)  # fmt: skip
"""Phrases that stand for stiff English; each has a plain form (the window only, after RoPE, NaN, maximum number of)."""
QUOTED = re.compile(r"""^\w*(\"{3}|'{3}|"|')(.*)\1$""", re.S)
PARTS_OF_STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
BETWEEN = {tokenize.NL, getattr(tokenize, "FSTRING_START", tokenize.NL), getattr(tokenize, "FSTRING_END", tokenize.NL)}


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command in a page's bash blocks; continued lines are joined, comments dropped."""
    for language, _, block in FENCE.findall(page.read_text()):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield words


def subcommand(words: list[str]) -> tuple[click.Command, list[str]] | None:
    """The lolcats command that a line calls, and the words after its name; None for other programs."""
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


def test_the_readme_is_short_and_in_order() -> None:
    readme = ROOT / "README.md"
    assert readme.stat().st_size <= 12_288
    assert re.findall(r"^#+ (.*)$", FENCE.sub("", readme.read_text()), re.M) == ["lolcats", *HEADINGS]


def test_links_of_the_readme_lead_somewhere() -> None:
    """mkdocs checks the links of docs/; the README is outside of it."""
    targets = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) > 30
    for target in targets:
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), target
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.M) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in headings], (
                target
            )


def test_figures_on_the_first_page_are_the_readmes() -> None:
    readme = set((ROOT / "README.md").read_text().splitlines())
    rows = [line for line in (ROOT / "docs/index.md").read_text().splitlines() if re.match(r"\|.*\d.*\|$", line)]
    assert len(rows) > 15
    assert [row for row in rows if row not in readme] == []


def paths_in_the_tree() -> set[str]:
    """The Python files that docs/tree.md lists below src/lolcats/, each with its folders."""
    folders: list[tuple[int, str]] = []
    paths = set()
    block = (ROOT / "docs/tree.md").read_text().partition("src/lolcats/\n")[2].partition("\ntests/")[0]
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        folders = [entry for entry in folders if entry[0] < indent]
        prefix = "".join(name for _, name in folders)
        if folder := re.match(r" *(\w+/)(?: |$)", line):
            folders.append((indent, folder[1]))
            prefix += folder[1]
        names = re.match(r" *((?:[\w/]+(?:\.py)?,? )*)", line)
        listed = re.findall(r"\w+\.py", line if folder else names[1])  # type: ignore[index]
        paths |= {prefix + name for name in listed}
    return paths


def modules() -> set[str]:
    source = ROOT / "src/lolcats"
    return {str(path.relative_to(source)) for path in source.rglob("*.py")}


def test_the_tree_lists_every_module() -> None:
    assert paths_in_the_tree() == {name for name in modules() if not name.endswith("__init__.py")}


def test_terms_of_the_glossary_name_their_modules() -> None:
    entries = re.findall(r"^- \*\*(.+?)\*\*.*?\(`(.+?)`\): ", (ROOT / "docs/glossary.md").read_text(), re.M)
    terms = [term.lower() for names, _ in entries for term in names.split(", ")]
    assert len(terms) == len(set(terms)) > 40
    assert {module for _, module in entries} <= modules()


def prose_of_code(path: Path) -> Iterator[tuple[int, str]]:
    """First line and text of a file's strings and comments; adjacent strings, or lines of a comment, are one text."""
    line, kind = 0, tokenize.ENDMARKER
    parts: list[str] = []
    for token in tokenize.generate_tokens(path.open().readline):
        now = tokenize.STRING if token.type in PARTS_OF_STRINGS else token.type
        if now in BETWEEN:
            continue
        if parts and now != kind:
            yield line, "".join(parts)
            parts = []
        line, kind = (line if parts else token.start[0]), now
        if now == tokenize.COMMENT:
            parts.append(" " + token.string.lstrip("#: "))
        elif now == tokenize.STRING:
            parts.append(QUOTED.sub(r"\2", token.string))


def tell_tale_phrases(text: str) -> list[str]:
    plain = " ".join(text.lower().replace("*", "").split())
    return [phrase for phrase in TELL_TALE if re.search(rf"\b{phrase}\b", plain)]


def test_no_tell_tale_phrases() -> None:
    """Plain English in docs, README, and strings and comments of the code. Names of the code are free."""
    found = []
    for page in [*ROOT.glob("docs/**/*.md"), ROOT / "README.md"]:
        found += [f"{page.relative_to(ROOT)}: {phrase}" for phrase in tell_tale_phrases(page.read_text())]
    for path in sorted(ROOT.glob("src/**/*.py")):
        for line, text in prose_of_code(path):
            found += [f"{path.relative_to(ROOT)}:{line}: {phrase}" for phrase in tell_tale_phrases(text)]
    assert not found, "\n".join(found)


def test_tell_tale_phrases_are_found_in_strings_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(
        'behind_rope = 1\n# the window\n# alone\nx = ("at most "\n     f"so many {x}")\n\n\n'
        'def f():\n    """Maps behind\n    RoPE."""\n'
    )
    found = [(line, phrase) for line, text in prose_of_code(path) for phrase in tell_tale_phrases(text)]
    assert found == [(2, "window alone"), (4, "at most so many"), (9, "behind rope")]


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
