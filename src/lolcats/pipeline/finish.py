"""What is written once a run is trained and measured: merged model, card, pictures, report."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from lolcats.errors import LolcatsError
from lolcats.modeling.merge import merge_adapter
from lolcats.modeling.parts import lost_controls
from lolcats.pipeline.job import Job, log, resume
from lolcats.pipeline.measure import measure
from lolcats.pipeline.models import Say
from lolcats.ranks import is_first
from lolcats.run import Run


def finish(job: Job, merge: bool = True, pictures: bool = True) -> None:
    """Write model card and pictures, and the merged model if ``merge`` is set."""
    from lolcats.report.card import write_card
    from lolcats.report.html import write_html
    from lolcats.report.picture import draw_report

    run, out = job.run, job.run.directory
    if not is_first():
        return
    if merge and not (out / "merged").is_dir():
        job.say(f"Writing {out / 'merged'}")
        inputs = job.inputs
        merge_adapter(out, out / "merged", inputs.tokenizer, base=inputs.base.path, trust=inputs.trust)
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
