"""What starts fast: help, usage errors and ``info`` without torch; and the model type, registered in any order."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lolcats

FIXTURES = Path(__file__).parent / "fixtures" / "b5a2d0a"
SLOW = ("torch", "transformers", "numpy", "pandas", "huggingface_hub", "accelerate")


def run(code: str, *arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


COMMANDS = """
import contextlib, io, json, sys
from lolcats.cli import app
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            app(arguments)
        except SystemExit as end:
            code = end.code
    print(json.dumps([arguments, code, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


def after(*commands: list[str]) -> list[list[object]]:
    """Each command with its exit code and those of SLOW that it or an earlier one has imported."""
    return [json.loads(line) for line in run(COMMANDS, json.dumps(commands), json.dumps(SLOW)).splitlines()]


def test_help_and_version_import_nothing_slow() -> None:
    commands = [["--help"], ["--version"], ["linearize", "--help"], ["serve", "-h"], ["data", "stats", "--help"]]
    assert after(*commands) == [[command, 0, []] for command in commands]


def test_usage_errors_import_nothing_slow(tmp_path: Path) -> None:
    nonsense = ["--set", "nonsense=1"]
    commands = [
        ["nonsense"], ["linearize"], ["info"], ["info", "x", "--nonsense"], ["serve", "x", "--port", "70000"],
        ["evaluate", "x", *nonsense], ["generate", "x", "--prompt", "x", *nonsense], ["chat", "x", *nonsense],
        ["data", "stats", "x", "--data", "x", *nonsense], ["export", "x", "--out", "x"],
        *(
            [*command, "--out", str(tmp_path / "out"), *nonsense]
            for command in (
                ["linearize", "x", "--data", "x"], ["transfer", "x", "--data", "x"], ["select", "x"],
                ["import", "--base", "x", "--transfer", "x"],
            )
        ),
        ["linearize", "x", "--out", str(tmp_path / "out")],
    ]  # fmt: skip
    assert after(*commands) == [[command, 2, []] for command in commands]


def test_info_of_a_linearized_model_imports_nothing_slow() -> None:
    commands = [["info", str(FIXTURES / name)] for name in ("run", "adapter", "merged")]
    assert after(*commands) == [[command, 0, []] for command in commands]


def test_importing_the_package_imports_nothing_slow() -> None:
    assert run(f"import sys, lolcats; print([name for name in {SLOW} if name in sys.modules])") == "[]\n"


def test_every_public_name_is_known_to_type_checkers_and_found() -> None:
    assert set(lolcats.__all__) <= set(dir(lolcats))
    for name in lolcats.__all__:
        assert getattr(lolcats, name) is not None
    block = next(x for x in ast.parse(Path(lolcats.__file__).read_text()).body if isinstance(x, ast.If))
    typed = {n.name: x.module for x in block.body if isinstance(x, ast.ImportFrom) for n in x.names}
    assert typed == lolcats._LAZY
    assert {*typed, "LolcatsError", "__version__"} == set(lolcats.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        lolcats.nonsense  # type: ignore[attr-defined]  # noqa: B018


ORDERS = {
    "lolcats first": "import lolcats; from transformers import AutoConfig",
    "lolcats last": "from transformers import AutoModelForCausalLM; import lolcats",
    "lolcats after transformers, before AutoConfig": "import transformers, lolcats; transformers.AutoConfig",
    "the configuration first": "from lolcats.modeling.auto import LolcatsConfig",
    "only parts": "import lolcats.errors, transformers.models.auto.modeling_auto",
    "two threads": """
import threading, lolcats
def first(): from transformers import AutoConfig
def second(): from lolcats.modeling.auto import LolcatsConfig
threads = [threading.Thread(target=work) for work in (first, second)]
for thread in threads: thread.start()
for thread in threads: thread.join()
""",
}
REGISTERED = """
import sys
auto = sys.modules["transformers.models.auto.configuration_auto"]  # imported by now
assert "lolcats" in auto.CONFIG_MAPPING
assert auto.CONFIG_MAPPING["lolcats"] is sys.modules["lolcats.modeling.auto"].LolcatsConfig
"""


@pytest.mark.parametrize("order", ORDERS)
def test_the_model_type_is_registered_in_any_order_of_imports(order: str) -> None:
    run(f"{ORDERS[order]}\n{REGISTERED}")


SPAWNED = """
import multiprocessing, pickle, sys
def load(directory):
    import lolcats
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(directory)
def child(saved, queue):
    config = pickle.loads(saved)  # imports what it needs
    queue.put((type(config).__name__, type(type(config).from_dict(config.to_dict())) is type(config)))
    queue.put(type(load(config.name)) is type(config))
if __name__ == "__main__":
    config = load(sys.argv[1])
    config.name = sys.argv[1]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.SimpleQueue()
    process = spawn.Process(target=child, args=(pickle.dumps(config), queue))
    process.start()
    assert queue.get() == ("LolcatsLlamaConfig", True)
    assert queue.get() is True
    process.join()
"""


def test_a_spawned_process_reads_what_its_parent_pickled(tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"  # a spawned process imports the main module by its file
    script.write_text(SPAWNED)
    subprocess.run([sys.executable, str(script), str(FIXTURES / "merged")], check=True, timeout=120)


def test_commands_silence_transformers_in_either_order() -> None:
    check = """
from transformers.utils import logging
assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
"""
    quiet = "from lolcats.cli.app import _quiet; _quiet()"
    run(f"{quiet}{check}")
    run(f"import transformers.utils.logging\n{quiet}{check}")
