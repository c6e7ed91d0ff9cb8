"""A real ``lolcats serve`` for third-party clients, which are tests; and docs/compatibility.md, made from them.

The server runs with LOLCATS_PYTHON, by default the .venv of this checkout. LOLCATS_TEST_ADDRESS names a server that
runs already, for the tests of the openai package.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1",
        "LANGSMITH_TRACING": "false", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OPENAI_API_KEY": "none",
        "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    }
)  # fmt: skip

import pytest
from compatibility import DISTRIBUTIONS, Row, page, row
from plain import Server
from recording import Recorder
from support.programs import PYTHON, address_of, lolcats_serve

HERE = Path(__file__).parent
ROWS = pytest.StashKey[list[Row]]()
UNKNOWN = pytest.StashKey[list[str]]()
RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clients")
    group.addoption("--write-compatibility", metavar="PAGE", help="renew the table of docs/compatibility.md")
    group.addoption("--check-compatibility", metavar="PAGE", help="fail if its table is not what the tests show")
    group.addoption("--write-works", metavar="FILE", help="as JSON, what works in this environment")
    group.addoption("--write-sent-fields", metavar="FILE", help="renew sent_fields.json")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[UNKNOWN] = [], []


def pytest_deselected(items: list[pytest.Item]) -> None:
    items[0].config.stash[UNKNOWN] += [item.nodeid for item in items]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if not report.passed:
        item.config.stash[UNKNOWN].append(item.nodeid)
    elif call.when == "call":
        item.config.stash[ROWS] += [row(*mark.args) for mark in reversed(list(item.iter_markers("works")))]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    config, problem = session.config, ""
    rows, unknown = config.stash[ROWS], config.stash[UNKNOWN]
    write, check = config.getoption("--write-compatibility"), config.getoption("--check-compatibility")
    unknown += sorted(f"a test of {client}" for client in DISTRIBUTIONS.keys() - {name for name, *_ in rows})
    if (write or check) and (unknown or session.testsfailed):
        missing = unknown[0] if unknown else "one"
        problem = f"The page of compatible clients needs every test: {missing} did not pass or did not run."
    elif write:
        Path(write).write_text(page(Path(write).read_text("utf-8"), rows), "utf-8")
    elif check and (text := Path(check).read_text("utf-8")) != page(text, rows):
        problem = f"{Path(check).name} differs from what the tests of the clients show; make compatibility renews it."
    if path := config.getoption("--write-works"):
        Path(path).write_text(json.dumps(rows))
    if (path := config.getoption("--write-sent-fields")) and RECORDER in config.stash:
        Path(path).write_text(config.stash[RECORDER].text(datetime.date.today().isoformat()))
    if problem:
        config.get_terminal_writer().line(f"\n{problem}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    made = subprocess.run([PYTHON, str(HERE / "make_model.py"), str(path)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-4000:]
    return path


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    if address := os.environ.get("LOLCATS_TEST_ADDRESS"):
        yield Server(address)
        return
    directory: Path = request.getfixturevalue("directory")
    with lolcats_serve(directory) as process:
        address = address_of(process)
        if request.config.getoption("--write-sent-fields"):
            recorder = request.config.stash[RECORDER] = Recorder(address)
            address = recorder.address
        yield Server(address, directory)


@pytest.fixture(autouse=True)
def recorded(request: pytest.FixtureRequest) -> None:
    """Requests of this test are its client's."""
    if request.config.getoption("--write-sent-fields"):
        request.getfixturevalue("server")
        mark = request.node.get_closest_marker("works")
        request.config.stash[RECORDER].test_begins(row(*mark.args) if mark else None)


@pytest.fixture(scope="session")
def reference(directory: Path) -> dict[str, Any]:
    """What lm-eval's own Hugging Face model says about the tiny model."""
    command = [PYTHON, str(HERE / "reference.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@cache
def has_grammars() -> bool:
    return subprocess.run([PYTHON, "-c", "import llguidance"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def grammars() -> None:
    if not has_grammars():
        pytest.skip("the server's environment has no llguidance")
