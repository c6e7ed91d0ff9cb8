"""The tests of OpenAI's package once more, with the version of the project's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import HERE, PYTHON, ROWS
from plain import Server


def test_the_version_that_the_project_installs(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if os.environ.get("LOLCATS_TEST_ADDRESS"):
        pytest.skip("runs in the project's environment already")
    found = tmp_path / "works.json"
    command = [PYTHON, "-m", "pytest", str(HERE / "test_openai.py"), "-o", "console_output_style=classic",
               "--write-works", str(found)]  # fmt: skip
    environment = {**os.environ, "LOLCATS_TEST_ADDRESS": server.address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]
    rows = [tuple(row) for row in json.loads(found.read_text())]
    assert {row[1] for row in rows}.isdisjoint({version("openai")}), (
        "both environments have one version: drop this test"
    )
    request.config.stash[ROWS] += rows
