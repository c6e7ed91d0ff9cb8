"""``lolcats distill-data``: training data in the teacher's own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lolcats.cli.app import PLAIN, MovedBase, Sets, Trust, command, load_any, out, settings, tokenizer_of
from lolcats.errors import LolcatsError

Teacher = Annotated[str, typer.Argument(help="Hub id, local model directory or .gguf file; with --server, the model's "
                                             "name there.", metavar="MODEL")]  # fmt: skip


@command
def distill_data(
    model: Teacher,
    prompts: Annotated[str, typer.Option(help="Prompts: a .jsonl, .json or .parquet file or a hub data set with "
                                              "messages (the last answer is left out), instruction and input, or "
                                              "prompt.")],
    out_: Annotated[Path, typer.Option("--out", dir_okay=False, help="The .jsonl file to write; counts go to "
                                                                     "FILE.meta.yaml. A stopped run is continued.")],
    server: Annotated[str, typer.Option(help="Ask a server with OpenAI's API at this address, e.g. "
                                             "http://localhost:8000/v1, in place of loading MODEL.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of a completion.")] = 1024,
    keep_cut: Annotated[bool, typer.Option("--keep-cut", help="Also write completions that end at --max-tokens, with "
                                                              "cut: true. They are left out otherwise.")] = False,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Sampling temperature (0 = greedy).")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Total probability of the tokens to sample from "
                                                                "(1 = all).")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling. Each prompt draws its own from it.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Number of prompts that are answered at once.")] = 16,
    raw: Annotated[bool, typer.Option("--raw", help="Continue prompts as text, without the chat template.")] = False,
    license_: Annotated[str, typer.Option("--license", help="Note on the licence of the prompts, for the metadata.")]
        = "",
    api_key: Annotated[str, typer.Option(envvar="LOLCATS_API_KEY", help="Key that the server asks for.")] = "",
    base: MovedBase = "", trust: Trust = False,
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Let a teacher answer prompts, and write the answers as training data (--data)."""
    config = settings(PLAIN, set_, trust)

    from lolcats.lab.distill.run import Task, check_out, distill_data
    from lolcats.lab.distill.teacher import Sampling

    check_out(out_)
    if server and base:
        raise LolcatsError(
            "--base is where an adapter's base model is, and --server loads no model: leave out one of them."
        )
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    if server:
        teacher, template, load = _served(server, model, sampling, slots, api_key)
    else:
        teacher, template, load = _local(model, config, sampling, slots, base)
    task = Task(prompts, out_, teacher, sampling, None if raw else template, license_, keep_cut, config.data)
    _show(distill_data(task, load, out.print), task)


Found = tuple[dict[str, str], Any, Callable[[], Any]]
"""A teacher's record, its chat template if it has one, and the function that loads it."""


def _served(server: str, model: str, sampling: Any, parallel: int, api_key: str) -> Found:
    from lolcats.lab.distill.prompts import AnyTemplate
    from lolcats.lab.distill.server import ServedTeacher

    teacher = ServedTeacher(server, model, sampling, parallel, api_key)
    return {"server": server, "model": model}, AnyTemplate(), lambda: teacher


def _local(model: str, config: Any, sampling: Any, slots: int, moved: str) -> Found:
    from lolcats.modeling.chat import ChatTemplate
    from lolcats.pipeline import device_and_dtype
    from lolcats.weights.base import find_base

    record = find_base(model, config.trust_remote_code).record | {"dtype": str(device_and_dtype(config)[1])[6:]}
    tokenizer = tokenizer_of(model, config.trust_remote_code)

    def load() -> Any:
        from lolcats.lab.distill.local import LocalTeacher

        return LocalTeacher(*load_any(model, config, moved), sampling, slots)

    return record, ChatTemplate(tokenizer) if tokenizer.chat_template else None, load


def _show(meta: dict[str, Any], task: Any) -> None:
    counts = meta["counts"]
    cut = "kept, marked with cut: true" if task.keep_cut else "left out"
    out.print(
        f"{counts['prompts']:,} prompts: {counts['finished']:,} completions finished, {counts['cut']:,} cut at "
        f"--max-tokens ({cut}), {counts['skipped']:,} prompts skipped.", soft_wrap=True, highlight=False,
    )  # fmt: skip
    for reason, count in meta["skipped"].items():
        out.print(f"  {count:,} skipped: {reason}", soft_wrap=True, markup=False, highlight=False)
    if meta["prompts"]["license"] == "unknown":
        out.print(
            "The metadata says that the licence of the prompts is unknown: set it with --license.", soft_wrap=True
        )
    out.print(
        f"{counts['written']:,} records, {counts['completion_tokens']:,} tokens of completions: {task.out}   metadata: "
        f"{task.meta}", soft_wrap=True, highlight=False,
    )  # fmt: skip
