"""How far feature maps work beyond the rows that they were trained on: errors of single layers by position.

Stage 1 of a few layers, each by itself and offline, with 4 sinks and a terraced window of 64: feature maps of rotated
queries and keys, of those rotated from a random position on, and of unrotated ones, trained on rows of 1,024, 4,096 and
8,192 tokens. The error of a layer's outputs, over their size, by position on rows of 8,192 tokens of other documents.

    python benchmarks/long_range.py MODEL --train BOOKS --held-out OTHER_BOOKS --work DIR

BOOKS: data with long documents, of which --rows give 8,192 tokens as one row and the next 8,192 as rows of 1,024. DIR
keeps queries, keys, values and outputs of the layers (38 MB a row and layer of SmolLM2-135M), and what was found, so
that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, installed, listed, processor, read, write
from torch import Tensor, nn

from lolcats.attention import attention
from lolcats.config import AttentionConfig
from lolcats.evaluation.positions import buckets
from lolcats.evaluation.text import encode, read_documents
from lolcats.modeling.convert import convert
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import (
    AttentionCall,
    Geometry,
    LinearizedAttention,
    layer_spec,
    linearized_layers,
)
from lolcats.modeling.observe import watch_layers
from lolcats.report.table import markdown
from lolcats.tensors import read_tensors, write_tensors
from lolcats.weights.base import find_base, load_model, load_tokenizer

ATTENTION = AttentionConfig(feature_inputs="unrotated")  # so that a call has both; what maps see is put together here
NOTHING_TRAINED = "window + sinks, nothing trained"


@dataclass(frozen=True)
class Variant:
    """What maps see: ``rotated`` or ``unrotated`` q and k, ``offset`` (rotated from a random position on)."""

    inputs: str
    length: int

    def __str__(self) -> str:
        name = {"offset": "rotated, random first position"}.get(self.inputs, self.inputs)
        return f"{name}, rows of {self.length:,}"


@dataclass(frozen=True)
class Size:
    """length: of evaluated rows, and tokens a step; short, middle: of shorter training rows."""

    length: int
    short: int
    middle: int

    @property
    def variants(self) -> list[Variant]:
        return [
            Variant("rotated", self.short), Variant("offset", self.short), Variant("unrotated", self.short),
            Variant("unrotated", self.middle), Variant("rotated", self.length), Variant("unrotated", self.length),
        ]  # fmt: skip


FULL, TINY = Size(8192, 1024, 4096), Size(512, 128, 256)


class Layer:
    """One layer's calls, read from the work directory, and the rotation of its family."""

    def __init__(self, model: Any, number: int) -> None:
        self.linearized = next(x for x in linearized_layers(model) if x.geometry.layer == number)
        modules = (m for m in model.modules() if getattr(m, "lolcats", None) is self.linearized)
        self.turn = sys.modules[type(next(modules)).__module__].apply_rotary_pos_emb
        self.embedding = decoder(model).rotary_emb

    def seen(self, call: dict[str, Tensor], inputs: str, first: int) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, heads, T, 2D) whose second half is what feature maps are to see."""
        if inputs == "unrotated":
            return call["q"], call["k"]
        size = call["q"].shape[-1] // 2
        places = torch.arange(first, first + call["q"].shape[2])[None]
        plain_q, plain_k = call["q"][..., size:], call["k"][..., size:]
        turned = self.turn(plain_q, plain_k, *self.embedding(plain_q, places))
        return tuple(torch.cat([x[..., :size], y], -1) for x, y in zip((call["q"], call["k"]), turned, strict=True))


def new_maps(geometry: Geometry, kind: str = "hybrid") -> LinearizedAttention:
    torch.manual_seed(0)
    return LinearizedAttention(geometry, ATTENTION, layer_spec(ATTENTION, kind), "sdpa")


def attend(maps: LinearizedAttention, layer: Layer, call: dict[str, Tensor], inputs: str, first: int = 0) -> Tensor:
    q, k = layer.seen(call, inputs, first)
    scale = (q.shape[-1] // 2) ** -0.5
    return attention(q, k, call["v"], maps.mixer(scale))[0]


def train(
    layer: Layer, variant: Variant, rows: list[dict[str, Tensor]], steps: int, length: int
) -> LinearizedAttention:
    """Maps of one layer: 1000 · MSE, AdamW, lr 1e-2 by a cosine, gradient norm 1. ``length``: last position + 1."""
    maps, draw = new_maps(layer.linearized.geometry), random.Random(0)
    optimizer = torch.optim.AdamW(maps.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    for _ in range(steps):
        chosen = draw.sample(rows, min(len(rows), max(1, length // (variant.length * len(rows[0]["q"])))))
        first = draw.randint(0, length - variant.length) if variant.inputs == "offset" else 0
        optimizer.zero_grad()
        for row in chosen:
            call = {name: x[:, :, : variant.length].float() for name, x in row.items()}
            error = (attend(maps, layer, call, variant.inputs, first) - call["target"]).square().mean()
            (1000 * error / len(chosen)).backward()
        nn.utils.clip_grad_norm_(maps.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return maps


@torch.no_grad()
def errors(maps: LinearizedAttention, layer: Layer, inputs: str, rows: list[dict[str, Tensor]]) -> list[float]:
    """Squared error over squared size of the outputs, all rows and heads together, by bucket of positions."""
    totals: Tensor | float = 0.0
    for row in rows:
        call = {name: x.float() for name, x in row.items()}
        pair = torch.stack([attend(maps, layer, call, inputs) - call["target"], call["target"]])
        totals = totals + pair.square().sum((1, 2, 4))  # (2, T)
    return [(totals[0, start:end].sum() / totals[1, start:end].sum()).item() for start, end in shown(row["q"].shape[2])]


def shown(length: int) -> list[tuple[int, int]]:
    """Buckets in which the linear term has keys."""
    return [(start, end) for start, end in buckets(length) if start >= 2 * ATTENTION.window_size]


def capture(model: Any, ids: Tensor, layers: list[int], name: str, work: Path) -> None:
    """Calls of some layers on rows (B, T), in work/NAME-LAYER.safetensors: (B, heads, T, channels), half precision."""
    if all(captured(work, name, layer).exists() for layer in layers):
        return

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        if layer.geometry.layer in layers:
            q, k = call.queries_and_keys()
            tensors = {"q": q, "k": k, "v": call.v, "target": call.target.transpose(1, 2)}
            halves = {key: x.half().contiguous() for key, x in tensors.items()}
            write_tensors(halves, captured(work, name, layer.geometry.layer))

    watch_layers(model, ids, observe)


def captured(work: Path, name: str, layer: int) -> Path:
    return work / f"{name}-{layer}.safetensors"


def cut(source: str, tokenizer: Any, count: int, length: int, first: int) -> list[Tensor]:
    """Tokens [first, first + length), (1, length), of the first ``count`` documents that are long enough."""
    rows: list[Tensor] = []
    for text in read_documents(source):
        ids = [] if len(rows) == count else encode(tokenizer, text)[first : first + length]
        if len(ids) == length:
            rows.append(torch.tensor([ids]))
    if len(rows) < count:
        sys.exit(f"{source}: only {len(rows)} documents have {first + length} tokens; {count} are wanted.")
    return rows


def run(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    base = find_base(args.model)
    model, tokenizer = convert(load_model(base, torch.float32), ATTENTION), load_tokenizer(base)
    args.work.mkdir(parents=True, exist_ok=True)
    names = {}
    for name, source, count, place, length in (
        ("long", args.train, args.rows, 1, size.length), ("short", args.train, args.rows, 2, size.short),
        ("held-out", args.held_out, args.test_rows, 8, size.length),
    ):  # fmt: skip
        names[name] = [f"{name}-{number}" for number in range(count)]
        for own, ids in zip(names[name], cut(source, tokenizer, count, size.length, place * size.length), strict=True):
            capture(model, ids.view(-1, length), args.layers, own, args.work)
    results: dict[str, Any] = {
        "date": str(date.today()), "model": Path(base.path).name, "processor": processor(),
        "threads": torch.get_num_threads(), "versions": installed("torch", "transformers"), "steps": args.steps,
        "train_rows": args.rows, "held_out_rows": args.test_rows, "layers": args.layers, "length": size.length,
        "positions": [f"{start:,} to {end - 1:,}" for start, end in shown(size.length)], "errors": {},
    }  # fmt: skip
    for number in args.layers:
        found = args.work / f"errors-{number}"
        if not (found / "errors.json").exists():
            write(of_layer(Layer(model, number), number, names, args, size), "", found, "errors")
        results["errors"][str(number)] = read(found, "errors")
    return results


def of_layer(
    layer: Layer, number: int, names: dict[str, list[str]], args: argparse.Namespace, size: Size
) -> dict[str, list[float]]:  # fmt: skip
    """Errors of every variant, by bucket of positions."""
    calls = {kind: [read_tensors(captured(args.work, name, number)) for name in names[kind]] for kind in names}
    rows = calls["held-out"]
    found = {NOTHING_TRAINED: errors(new_maps(layer.linearized.geometry, "window"), layer, "unrotated", rows)}
    for variant in size.variants:
        begin = time.monotonic()
        trained_on = calls["short" if variant.length == size.short else "long"]
        maps = train(layer, variant, trained_on, args.steps, size.length)
        found[str(variant)] = errors(maps, layer, variant.inputs, rows)
        print(f"layer {number}, {variant}: {found[str(variant)]}, {time.monotonic() - begin:.0f} s", flush=True)
    return found


def report(results: dict[str, Any]) -> str:
    names = list(next(iter(results["errors"].values())))
    parts = [
        "# Feature maps at positions that they were not trained at\n",
        f"`python benchmarks/long_range.py`, {results['date']}, {results['model']} on {results['processor']}, fp32; "
        f"{listed(results['versions'])}. {results['steps']} steps of {results['length']:,} tokens from "
        f"{results['train_rows']} rows; squared error of a layer's outputs over their squared size on "
        f"{results['held_out_rows']} rows of {results['length']:,} tokens of other books, by position.\n",
    ]
    for layer, found in results["errors"].items():
        lines = [[name, *(f"{x:.4f}" for x in found[name])] for name in names]
        parts += [f"## Layer {layer}\n", markdown(["feature maps", *results["positions"]], lines) + "\n"]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True, help="data with long documents")
    parser.add_argument("--held-out", required=True, help="data with other long documents")
    parser.add_argument("--work", type=Path, required=True, help="directory for what is captured and found")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 9, 16, 24])
    parser.add_argument("--rows", type=int, default=8, help="training rows")
    parser.add_argument("--test-rows", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tiny", action="store_true", help="short rows: tries the script, measures nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.tiny and args.out == RESULTS:
        sys.exit("--tiny measures nothing: give it a directory of its own with --out.")
    results = run(args, TINY if args.tiny else FULL)
    write(results, report(results), args.out, "long_range")


if __name__ == "__main__":
    main()
