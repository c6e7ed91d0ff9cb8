"""transformers' own tests of models, training and configurations, over converted models (converted.py).

The test files come from the source distribution of the installed version, and lie in a temporary folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import transformers

HERE = Path(__file__).parent
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'dtype': 'float16', "
    "'output_hidden_states': True, 'id2label': {0: 'label'}, 'label2id': {'label': 0}, 'problem_type': 'regression'}\n",
}
"""What the test files import and the source distribution lacks: tests that do not run here, and settings that every
configuration takes."""
MINIMUM = 95
"""How many tests must pass in each case; the rest need a GPU, other libraries, or another kind of model."""


def download(folder: Path) -> Path:
    """The source distribution of the installed transformers, from the package index that pip is set up for."""
    name = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, name]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=True)
    except subprocess.TimeoutExpired:
        pytest.skip(f"The source distribution of {name} was not downloaded within 300 seconds.")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"The source distribution of {name} cannot be downloaded: {error.stderr.strip()[-300:]}")
    (archive,) = folder.glob("*.tar.gz")
    return archive


def unpack(archive: Path, folder: Path) -> None:
    """Make the tests in ``archive`` a package ``transformers_tests`` in ``folder``."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, (m for m in tar if m.name.split("/")[1:2] == ["tests"]), filter="data")
    (tests,) = folder.glob("*/tests")
    package = tests.rename(folder / "transformers_tests")
    for name, text in {"__init__.py": "", **ABSENT}.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)


def read_report(report: Path) -> dict[str, dict[str, str]]:
    """What became of each test, by case, from pytest's report in JUnit's form. A test with subtests has several entries
    there if some of them fail or are skipped."""
    results: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in ElementTree.parse(report).iter("testcase"):
        case, test = results[entry.get("classname", "").rpartition(".")[2]], entry.get("name", "")
        for part in entry:
            if part.tag in ("failure", "error"):
                case[test] = "failed:\n" + "\n".join((part.text or "").splitlines()[-12:])
            elif part.tag == "skipped":
                case.setdefault(test, "left out" if part.get("type") == "pytest.xfail" else "skipped")
        case.setdefault(test, "passed")
    return results


@pytest.mark.slow
def test_transformers_own_tests(tmp_path: Path) -> None:
    unpack(download(tmp_path), tmp_path)
    report = tmp_path / "report.xml"
    paths = [str(HERE.parent), str(tmp_path), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", HERE / "converted.py", "-q", "-n", "2", f"--junitxml={report}",
         "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:warnings"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert report.exists(), run.stdout + run.stderr
    results = read_report(report)
    lines = [f"{case}.{test} {result}" for case, tests in results.items() for test, result in tests.items()]
    failures = [line for line in lines if " failed:" in line]
    assert not failures, "\n".join(failures)
    assert run.returncode == 0, run.stdout
    for case, tests in results.items():
        counts = Counter(tests.values())
        print(f"transformers {transformers.__version__}, {case}: {dict(counts)}")
        assert counts["passed"] >= MINIMUM, f"{case}: {counts}"
