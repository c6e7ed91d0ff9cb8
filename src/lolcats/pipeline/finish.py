"""What is written once a run is trained and measured: merged model, card, pictures, report."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.files import whole_directory
from lolcats.modeling.parts import lost_controls
from lolcats.pipeline.job import Job, log, resume
from lolcats.pipeline.measure import measure
from lolcats.pipeline.models import Say
from lolcats.ranks import is_first
from lolcats.run import Run
from lolcats.stages.distributed import is_sharded


def finish(job: Job, merge: bool = True, pictures: bool = True) -> None:
    """Write model card and pictures, and the merged model if ``merge`` is set."""
    from lolcats.report.card import write_card
    from lolcats.report.html import write_html
    from lolcats.report.picture import draw_report

    run, out = job.run, job.run.directory
    if merge and not (out / "merged").is_dir():
        model = job.models.student()
        if is_sharded(model):
            job.say(
                "No merged model, because the weights are sharded. To write one: "
                f"lolcats export {out} --merge --out MERGED"
            )
        elif is_first():
            job.say(f"Writing {out / 'merged'}")
            export_merged(model, job.inputs.tokenizer, out / "merged")
    if not is_first():
        return
    if pictures:
        draw_report(run)
        write_html(run)
    write_card(run)
    if (out / "merged").is_dir():
        shutil.copy(out / "README.md", out / "merged" / "README.md")


def report(directory: Path, say: Say = log, base: str = "", trust: bool = False) -> Path:
    """Write report.html of a run. If its attention has not been measured, load the model and measure it first.

    ``base``: where the base model is now, if it has moved. ``trust``: run Python code that comes with it.
    """
    from lolcats.report.html import write_html

    if find_spec("matplotlib") is None:
        raise LolcatsError("The report needs matplotlib: pip install 'lolcats[plots]'.")
    run = Run.open(directory)
    if lost := lost_controls(directory):
        say(lost)
    if run.stage_done("transfer") and "attention" not in run.results:
        job = resume(directory, say, base=base, trust=trust)
        measure(job)
        run = job.run
    write_html(run)
    return directory / "report.html"


def export_merged(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Write a self-contained model directory, completely or not at all."""
    with whole_directory(directory) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
