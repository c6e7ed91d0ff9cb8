"""Commands that use models: ``evaluate``, ``generate``, ``chat``, ``serve``, ``bench``, ``export``, ``info``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from lolcats.cli.app import (
    PLAIN,
    Directory,
    Model,
    MovedBase,
    Quantized,
    Sets,
    Trust,
    command,
    err,
    load_any,
    numbers,
    out,
    print_rows,
    quantization,
    settings,
    tokenizer_of,
    words,
    writing,
)
from lolcats.errors import LolcatsError

NewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature (0 = greedy).")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Total probability of the tokens to sample from (1 = all).")]


@command
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="Data for perplexity, or text for --tasks recall and positions.")] = "",
    tasks: Annotated[str, typer.Option(help="Comma-separated benchmarks: paper, recall (or one kind, e.g. "
                                            "recall-passkey), generate, positions, mmlu-permuted, or lm-eval tasks. "
                                            "Default: perplexity on --data.")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Directory of local Parquet files to use instead of "
                                                        "the hub's data sets.")] = None,
    baseline: Annotated[str, typer.Option(help="With --tasks, comma-separated models to compare with: window, "
                                               "window+sinks (both untrained), window+lora, teacher+lora (controls), "
                                               "linear-off, window-off, or linearized models.")] = "",
    limit: Annotated[int, typer.Option(help="Maximum number of items per task (0 = all); for recall, number of answers "
                                            "per kind and length (0 = 200).")] = 0,
    lengths: Annotated[str, typer.Option(help="Context lengths for recall and positions, e.g. 1024,8192.")] = "",
    batch_size: Annotated[int, typer.Option(help="Rows per batch (0 = transfer.micro_batch_size).")] = 0,
    device: Annotated[str, typer.Option(help="Same as --set device=.")] = "",
    dtype: Annotated[str, typer.Option(help="Same as --set dtype=.")] = "",
    output: Annotated[Path | None, typer.Option(help="JSON file for the results of --tasks, including "
                                                      "those of single items.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for recall prompts and few-shot examples.")] = 1234,
    recipe: Annotated[str, typer.Option(help="Recipe or YAML file. Default: the run's own configuration.")] = "",
    rows: Annotated[int, typer.Option(help="Maximum number of rows of data.sequence_length tokens (0 = all).")] = 0,
    base: MovedBase = "", quantize: Quantized = "", trust: Trust = False,
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Measure perplexity on --data, or run the benchmarks in --tasks, for teacher and student.

    Perplexity also covers the untrained baselines, any trained controls, and the student with one branch off.

    If the run was trained on --data, only the documents that it held out for testing are used.
    """
    own = Path(model) / "config.yaml"
    changes = [f"{key}={value}" for key, value in (("device", device), ("dtype", dtype)) if value]
    config = settings(recipe or (str(own) if own.is_file() else PLAIN), [*changes, *set_], trust)

    from lolcats.evaluation.suite import Options
    from lolcats.files import check_file
    from lolcats.pipeline import device_and_dtype

    how, place = quantization(quantize), device_and_dtype(config)
    batch_size = batch_size or config.transfer.rows_at_once
    if tasks:
        options = Options(data_dir, data, numbers(lengths), limit or None, batch_size, seed)
        if output:
            check_file(output, "--output")
        _benchmarks(model, words(tasks), words(baseline), place, options, output, base, trust, how)
    elif data:
        _perplexity(model, data, config, rows, place, batch_size, base, how)
    else:
        raise LolcatsError("Nothing to evaluate: give --data (perplexity) or --tasks (benchmarks).")


@command
def generate(
    model: Model, prompt: Annotated[str, typer.Option(help="Prompt to answer or continue.")],
    max_new_tokens: NewTokens = 128, temperature: Temperature = 0.0, top_p: TopP = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed for sampling. Default: a random "
                                                                        "one.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as is, without the chat template.")] = False,
    base: MovedBase = "", quantize: Quantized = "", trust: Trust = False,
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Answer one prompt and stream the answer."""
    config, how = settings(PLAIN, set_, trust), quantization(quantize)

    from lolcats.inference.generate import generate as run_generate

    loaded, tokenizer = load_any(model, config, base, how)
    run_generate(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, stream=True, raw=raw, seed=seed)


@command
def chat(model: Model, max_new_tokens: NewTokens = 512, temperature: Temperature = 0.7, top_p: TopP = 0.9,
         max_context: Annotated[int, typer.Option(min=0, help="Maximum number of tokens of a conversation and its next "
                                                              "answer together (0 = no limit).")] = 0,
         system: Annotated[str, typer.Option(help="System prompt.")] = "", base: MovedBase = "",
         quantize: Quantized = "", trust: Trust = False, set_: Sets = []) -> None:  # noqa: B006  # fmt: skip
    """Chat with a model in the terminal. An empty line, /exit or Ctrl-D quits; /new starts a new conversation."""
    config, how = settings(PLAIN, set_, trust), quantization(quantize)

    from lolcats.inference.generate import encode
    from lolcats.inference.generate import generate as run_generate

    loaded, tokenizer = load_any(model, config, base, how)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if text in ("", "/exit"):
            return
        if text == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": text})
        if max_context and encode(tokenizer, messages)["input_ids"].shape[1] + max_new_tokens > max_context:
            err.print(f"This conversation and an answer exceed {max_context} tokens (--max-context): /new starts a "
                      "new one.", soft_wrap=True)  # fmt: skip
            messages.pop()
            continue
        answer = run_generate(loaded, tokenizer, messages, max_new_tokens, temperature, top_p, stream=True)
        messages.append({"role": "assistant", "content": answer})


@command
def serve(
    directory: Directory,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on (0 = a free one).")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Maximum number of requests that run at once.")] = 16,
    max_context: Annotated[int, typer.Option("--max-context", "--context", min=0,
                                             help="Maximum number of tokens of prompt and answer together (0 = the "
                                                  "model's own, or fewer if kept heads' keys do not fit).")] = 0,
    kept_mb: Annotated[int, typer.Option(min=0, help="MiB for the keys of kept heads (0 = for all slots, as far as "
                                                     "memory allows).")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 4096,
    max_waiting: Annotated[int, typer.Option(min=0, help="Maximum number of requests waiting for a slot; more "
                                                         "get a 429.")] = 128,
    max_connections: Annotated[int, typer.Option(min=1, help="Maximum number of open connections; more get "
                                                             "a 429.")] = 512,
    read_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the head of a request, and again "
                                                              "for its body, before a 408.")] = 30,
    prefix_mb: Annotated[int, typer.Option(min=0, help="MiB for the prefix cache (states of prompt beginnings).")]
        = 256,
    deadline: Annotated[int, typer.Option(min=0, help="Seconds that running requests get after SIGTERM or Ctrl-C.")]
        = 30,
    state_dtype: Annotated[str, typer.Option(help="Precision of the sums in the states: float32 or bfloat16.")]
        = "float32",
    api_key: Annotated[str | None, typer.Option(envvar="LOLCATS_API_KEY", help="Key that clients must send.")] = None,
    allow_origin: Annotated[list[str], typer.Option(help="Allow web pages of this origin to use the API, e.g. "
                                                         "https://chat.example.org ('*' needs a key). Repeatable.")]
        = [],  # noqa: B006
    allowed_host: Annotated[list[str], typer.Option(help="Accept this name in the Host header. Repeatable. Default: "
                                                         "any name; on a loopback address without a key, only "
                                                         "loopback names.")] = [],  # noqa: B006
    base: MovedBase = "", quantize: Quantized = "", trust: Trust = False,
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Serve a linearized model with an OpenAI-compatible API, and a chat page at /."""
    try:
        from lolcats.inference import server
    except ImportError as error:
        raise LolcatsError(f"The server needs more packages ({error}): pip install 'lolcats[serve]'.") from None
    from lolcats.inference.engine import Engine

    key = api_key if api_key is not None else os.environ.get("LOLCATS_API_KEY")  # typer takes an empty one as unset
    access = server.access_for(host, key, allow_origin, allowed_host)
    how, listening = quantization(quantize), server.listen(host, port)
    if not access.api_key and not server.is_loopback(host):
        err.print(f"No API key: anyone who reaches {host} can use this server. Set LOLCATS_API_KEY.", soft_wrap=True)
    model, tokenizer = load_any(str(directory), settings(PLAIN, set_, trust), base, how)
    engine = Engine(
        model, tokenizer, slots, prefix_bytes=prefix_mb << 20, state_dtype=_state_dtype(state_dtype),
        context=max_context, kept_bytes=kept_mb << 20 or None,
    )  # fmt: skip
    own = getattr(model.config.get_text_config(), "max_position_embeddings", 8192)
    limits = server.Limits(
        max_context or own, min(max_tokens, max_context or own), waiting=max_waiting, connections=max_connections,
        read_seconds=read_timeout,
    )  # fmt: skip
    app_ = server.create_app(engine, directory.resolve().name, limits, access=access)
    app_.state.service.prepare()
    place = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    out.print(f"Serving {directory} on {place} ({slots} slots). Press Ctrl-C to stop.", soft_wrap=True)
    server.serve(app_, listening, deadline)


@command
def bench(
    model: Annotated[str, typer.Argument(help="Linearized model or any base model.", metavar="[DIR|MODEL]")] = "",
    random: Annotated[str, typer.Option(help="Use random weights of this shape instead of MODEL: llama3-8b, "
                                             "smollm2-135m or tiny.")] = "",
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes; max = largest that fits.")] = "1,16,64",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 128,
    new: Annotated[int, typer.Option(min=3, help="Tokens to generate per prompt.")] = 4096,
    peers: Annotated[str, typer.Option(help="Comma-separated variants of Hugging Face's generate to compare with: "
                                            "sdpa, static (static cache, compiled); may be empty.")] = "sdpa",
    peer_new: Annotated[int, typer.Option(min=3, help="Tokens to generate per prompt for the variants in "
                                                         "--peers.")] = 64,
    state_dtype: Annotated[str, typer.Option(help="Precision of the sums in the states: float32 or bfloat16.")]
        = "float32",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each system, in turns; the median is reported.")] = 1,
    deadline: Annotated[float, typer.Option(help="Time limit in seconds (0 = no limit).")] = 0,
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth of the device in TB/s, for the bound.")] = 3.0,
    flops: Annotated[float, typer.Option(help="Speed of the device in TFLOP/s, for the bound.")] = 782,
    prefill_rows: Annotated[int, typer.Option(min=1, help="Number of prompts to prefill together.")] = 16,
    out_: Annotated[Path, typer.Option("--out", dir_okay=False, help="JSON file to add the results to; a .md table and "
                                                              "a .png plot are written beside it.")]
        = Path("generation.json"),
    base: MovedBase = "", trust: Trust = False,
    set_: Sets = [],  # noqa: B006
) -> None:  # fmt: skip
    """Measure speed and memory of generation by batch size, next to Hugging Face's generate (the paper's Figure 8)."""
    from lolcats.files import check_directory
    from lolcats.lab import bench as benchmarks
    from lolcats.lab.generation import write
    from lolcats.pipeline import device_and_dtype

    config, unknown = settings(PLAIN, set_, trust), set(words(peers)) - set(benchmarks.PEERS)
    if unknown:
        raise LolcatsError(f"--peers: expected {' or '.join(benchmarks.PEERS)}, got {unknown.pop()!r}.")
    if bool(model) == bool(random):
        raise LolcatsError("Give either MODEL or --random.")
    if out_.suffix in (".md", ".png"):
        raise LolcatsError(f"--out {out_}: expected a .json file; a .md table and a .png plot are written beside it.")
    check_directory(out_.parent)
    sizes = tuple(0 if word == "max" else numbers(word, "--batches")[0] for word in words(batches))
    options = benchmarks.Options(
        sizes, prompt, new, tuple(words(peers)), peer_new, _state_dtype(state_dtype), runs, deadline or float("inf"),
        bandwidth * 1e12, flops * 1e12, prefill_rows,
    )  # fmt: skip
    if random:
        student = benchmarks.random_model(random, config.attention, *device_and_dtype(config))
    else:
        student = benchmarks.linearized(load_any(model, config, base)[0], config.attention)
    table = write(out_, benchmarks.benchmark(student, options), shlex.join(["lolcats", *sys.argv[1:]]))
    out.print(table, soft_wrap=True, markup=False, highlight=False)


@command
def export(directory: Directory,
           out_: Annotated[Path, typer.Option("--out", file_okay=False, help="Output directory; must be empty.")],
           merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA into the weights. Required.")] = False,
           dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as trained.")] = "auto",
           base: MovedBase = "", trust: Trust = False,
           ) -> None:  # fmt: skip
    """Export an adapter as a self-contained model directory.

    Weights are read and written file by file. If it is interrupted, the same command continues.
    """
    if not merge:
        raise LolcatsError("The run directory is already the adapter: copy it, or pass --merge for a full model.")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise LolcatsError(f"--dtype: expected float32, bfloat16 or float16, got {dtype!r}.")

    from lolcats.files import is_empty
    from lolcats.modeling.merge import merge_adapter

    with writing(out_):
        if out_.is_dir() and not is_empty(out_):
            raise LolcatsError(f"{out_} is not empty; choose another --out.")
        merge_adapter(directory, out_, tokenizer_of(str(directory), trust), dtype, base, trust)
    out.print(f"Merged model: {out_}", soft_wrap=True)


@command
def info(model: Model, trust: Trust = False) -> None:
    """Describe a linearized model, or how a base model would be linearized."""
    from lolcats.modeling.record import is_linearized
    from lolcats.modeling.saved import describe_saved

    facts = describe_saved(Path(model)) if is_linearized(model) else _describe_base(model, trust)
    table = Table("", Column(overflow="fold"), show_header=False)
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    out.print(table)


def _describe_base(model: str, trust: bool) -> dict[str, Any]:
    from lolcats.modeling.info import describe

    return describe(model, trust)


def _perplexity(
    model: str,
    data: str,
    config: Any,
    rows: int,
    place: tuple[Any, Any],
    batch_size: int,
    base: str,
    quantize: Any,
) -> None:
    """Print the table of ``evaluate --data``."""
    from lolcats.evaluation.compare import compare, evaluation_rows
    from lolcats.modeling.parts import lost_controls
    from lolcats.report.advice import verdict_on
    from lolcats.report.table import controls_hint

    ids, positions = (
        x if x is None else x[: rows or None]
        for x in evaluation_rows(model, data, tokenizer_of(model, config.trust_remote_code), config)
    )
    assert ids is not None
    table = Table("model", title=f"{ids.numel():,} tokens of {Path(data).name}")
    table.add_column("perplexity", justify="right", no_wrap=True)
    found = compare(model, ids, *place, batch_size, positions, base, config.trust_remote_code, quantize)
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}")
    out.print(table)
    remarks = lost_controls(Path(model)), controls_hint(model), verdict_on(found, model, ids.shape[1])
    for text in filter(None, remarks):
        out.print(text)


def _benchmarks(
    model: str, tasks: list[str], baselines: list[str], place: tuple[Any, Any], options: Any, output: Path | None,
    base: str, trust: bool, quantize: Any,
) -> None:  # fmt: skip
    """Print the tables of ``evaluate --tasks`` and write its JSON file."""
    from lolcats.evaluation.suite import evaluate as run_suite
    from lolcats.evaluation.suite import fill_in
    from lolcats.pipeline import log
    from lolcats.report.comparison import comparison_rows, depth_rows, write_comparison
    from lolcats.report.table import controls_hint

    scores = run_suite(model, tasks, baselines, *place, options, log, base, trust, quantize)
    print_rows(*comparison_rows(scores), title=f"{Path(model).name}: score ± standard error")
    for metric in ("exact", "generated", "argmax"):
        print_rows(*depth_rows(scores, metric), title=f"Recall by depth: {metric}")
    out.print(controls_hint(model))
    if output:
        write_comparison(
            output, scores, model, tasks, baselines, place, fill_in(options, model, tasks, base, trust), quantize
        )
        out.print(f"Results: {output}", soft_wrap=True)


def _state_dtype(name: str) -> Any:
    import torch

    if name not in ("float32", "bfloat16"):
        raise LolcatsError(f"--state-dtype: expected float32 or bfloat16, got {name!r}.")
    return getattr(torch, name)
