"""benchmarks/jobs.py: which job runs when, and that the jobs of the file are commands that the scripts understand."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.scripts import FOLDER, script

from lolcats.errors import LolcatsError


def run(tmp_path: Path, jobs: dict[str, Any], gpus: int = 1, minutes: float = 5, only: str = "") -> dict[str, str]:
    """What became of each job."""
    file, out = tmp_path / "some.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"jobs": jobs}, sort_keys=False))
    options = ["--file", file, "--out", out, "--minutes", minutes, "--gpus", gpus, "--only", only]
    script("jobs").main(list(map(str, options)))
    return dict(line.split(": ", 1) for line in (out / "jobs.txt").read_text().splitlines())


def times(tmp_path: Path) -> dict[str, tuple[float, float]]:
    """When each job that wrote a log began and ended."""
    logs = (tmp_path / "out").glob("*.log")
    return {log.stem: tuple(map(float, re.findall(r"at ([\d.]+)", log.read_text()))) for log in logs}  # type: ignore[misc]


TIMED = "echo at $(date +%s.%N); sleep 0.6; echo at $(date +%s.%N)"


def test_jobs_begin_in_order_as_gpus_become_free(tmp_path: Path) -> None:
    jobs = {
        "a": {"run": f"{TIMED}; echo gpu $CUDA_VISIBLE_DEVICES", "seconds": 60},
        "both": {"run": f"{TIMED}; echo gpu $CUDA_VISIBLE_DEVICES", "seconds": 60, "gpus": 2},
        "b": {"run": TIMED, "seconds": 60},
        "none": {"run": TIMED, "seconds": 60, "gpus": 0},
        "three": {"run": TIMED, "seconds": 60, "gpus": 3},
        "last": {"run": TIMED, "seconds": 60, "gpus": 0, "after": ["b"]},
    }
    became = run(tmp_path, jobs, gpus=2)
    assert became.pop("three") == "not begun: it takes more than 2 GPUs"
    assert all(re.fullmatch(r"done after \d+ s", how) for how in became.values()), became
    found = times(tmp_path)
    assert found["both"][0] > found["a"][1], "it waits for both GPUs"
    assert found["b"][0] > found["both"][1], "nobody takes a GPU that an earlier job waits for"
    assert found["none"][0] < found["a"][1], "what needs no GPU does not wait"
    assert found["last"][0] > found["b"][1]
    assert "gpu 0\n" in (tmp_path / "out" / "a.log").read_text()
    assert "gpu 0,1\n" in (tmp_path / "out" / "both.log").read_text()


def test_what_is_not_begun_says_why(tmp_path: Path) -> None:
    jobs = {
        "fails": {"run": "echo $NOWHERE", "seconds": 20},
        "follows": {"run": "true", "seconds": 20, "after": ["fails"]},
        "and so on": {"run": "true", "seconds": 20, "after": ["follows"]},
        "long": {"run": "true", "seconds": 200},
        "slow": {"run": "sleep 100", "seconds": 1},
        "rest": {"run": "echo $LEFT; pwd > $OUT/there", "seconds": 20, "to_the_end": True},
        "later": {"run": "true", "seconds": 20, "not_beside": ["fails"]},
    }
    became = run(tmp_path, jobs, minutes=1.5)
    assert became["fails"].startswith("failed with "), "a variable that is not set"
    assert "NOWHERE" in (tmp_path / "out" / "fails.log").read_text()
    assert became["follows"] == "not begun: it comes after fails"
    assert became["and so on"] == "not begun: it comes after follows"
    assert became["long"] == "not begun: no time left"
    assert became["slow"].startswith("ended by its limit after ")
    assert became["rest"].startswith("done after ")
    assert became["later"].startswith("done after "), "it only waits for the end of the other"
    assert int((tmp_path / "out" / "rest.log").read_text()) in range(60, 90)
    assert (tmp_path / "out" / "there").is_file()


def test_only_some_jobs(tmp_path: Path) -> None:
    jobs = {"first": {"run": "false"}, "second": {"run": "true", "after": ["first"]}}
    assert run(tmp_path, jobs, minutes=20, only="second") == {"second": "done after 0 s"}
    for key in ("after", "not_beside"):
        with pytest.raises(LolcatsError, match="second waits for nothing, which is not there"):
            run(tmp_path, {"second": {"run": "true", key: ["nothing"]}})


def test_a_job_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a process of it does not end when it is asked to. Nobody has the GPU before."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    stubborn = "(trap '' TERM; for i in {1..100}; do date +%s.%N > $OUT/alive; sleep 0.1; done) & sleep 0.3"
    jobs = {"first": {"run": stubborn, "seconds": 40}, "next": {"run": "date +%s.%N; echo $CUDA_VISIBLE_DEVICES"}}
    module = script("jobs")
    monkeypatch.setattr(module, "GRACE", 1.0)
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"jobs": jobs}, sort_keys=False))
    module.main(["--file", str(file), "--out", str(tmp_path / "out"), "--minutes", "20", "--gpus", "1"])
    began, gpu = (tmp_path / "out" / "next.log").read_text().split()
    assert float((tmp_path / "out" / "alive").read_text()) < float(began)
    assert gpu == "5"


def test_jobs_end_with_the_script(tmp_path: Path) -> None:
    file, out = tmp_path / "some.yaml", tmp_path / "out"
    loop = "touch $OUT/here; for i in {1..200}; do date +%s.%N > $OUT/alive; sleep 0.1; done"
    file.write_text(yaml.safe_dump({"jobs": {"long": {"run": loop, "seconds": 60}, "next": {"run": "true"}}}))
    command = [sys.executable, FOLDER / "jobs.py", "--file", file, "--out", out, "--minutes", "20", "--gpus", "1"]
    process = subprocess.Popen(list(map(str, command)))
    while not (out / "here").exists():
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 1
    ended = time.time()
    time.sleep(0.5)
    assert float((out / "alive").read_text()) < ended
    assert re.search(
        "long: failed with .*\nnext: not begun|next: not begun\nlong: failed with", (out / "jobs.txt").read_text()
    )


JOBS = script("jobs").read_jobs(FOLDER / "jobs.yaml")


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs_of_the_file(name: str) -> None:
    """Scripts and tests are there and know their options; bash can read the lines."""
    text = re.sub(r"\\\n", " ", JOBS[name].run)
    assert subprocess.run(["bash", "-n", "-c", JOBS[name].run], check=False).returncode == 0
    for command in re.split(r"\n|;", text):
        scripts = re.findall(r"benchmarks/(\w+\.py)", command)
        for file in scripts:
            options = set(re.findall(r" (--[\w-]+)", command)) - {"--nproc-per-node"}
            known = set(re.findall(r'"(--[\w-]+)"', (FOLDER / file).read_text()))
            assert options <= known, file
        for file in re.findall(r"tests/[\w/.]+", command):
            assert (FOLDER.parent / file).exists()
