"""Whether the working tree computes what another commit computes, bit for bit: for changes that must change nothing.

    python benchmarks/same_bits.py                        # against b5a2d0a
    python benchmarks/same_bits.py --commit HEAD --only "variant|stage"

A program of tiny models runs once with each tree, on the CPU with one thread: logits, gradients, states and tokens of
every variant of attention and of every family that the tests know, losses and weights of both stages. Every tensor is
compared with that of the other tree; those that differ are named, and the exit status is 1.

The program uses public paths only. States are compared by what they hold, whatever its names are.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "b5a2d0a"
MODULES = {
    "AttentionConfig": ("lolcats.config",),
    "app": ("lolcats.cli",),
}
"""Where a name may be found: add a place when it moves."""
HELPERS = {
    "tiny": ("tests/support/tiny.py",),
    "families": ("tests/support/families.py",),
}
"""Files of the working tree that build the models for both trees; they must not import lolcats."""
INPUTS = "tests/fixtures/b5a2d0a"  # a base model with its tokenizer, data and a recipe
IDS = torch.randint(6, 300, (2, 40), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(6, 300, (1, 1100), generator=torch.Generator().manual_seed(1))
PADDING = torch.ones_like(IDS)
PADDING[1, :13] = 0
PREFILL = 21
SMALL = {"window_size": 8, "sinks": 2, "feature_dim": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "no sinks": {"sinks": 0},
    "sliding": {"window": "sliding"},
    "linear": {"kind": "linear"},
    "window": {"kind": "window"},
    "softmax": {"kind": "softmax"},
    "mixed": {"layers": {"0": "softmax"}},
    "t2r": {"feature_map": "t2r"},
    "exp": {"feature_map": "exp"},
    "elu": {"feature_map": "elu"},
    "per_kv_head": {"key_maps": "per_kv_head"},
    "unrotated": {"feature_inputs": "unrotated"},
    "unrotated linear": {"feature_inputs": "unrotated", "kind": "linear"},
    "decay": {"kind": "linear", "decay": "retnet"},
    "supra": {"kind": "linear", "feature_map": "t2r", "decay": "retnet", "normalizer": "group_norm"},
}
"""Settings of attention, beyond ``SMALL``."""
PER_LAYER = "transfer.coupling=per_layer"
STAGES: dict[str, tuple[str, list[str]]] = {
    "joint": ("linearize", ["controls=[window_lora]"]),
    "documents": ("linearize", ["data.reset_at_documents=true"]),
    "without stage 1": ("linearize", ["transfer.max_steps=0", "finetune.feature_map_learning_rate=0.01"]),
    "per_layer": ("transfer", [PER_LAYER]),
    "stream": ("transfer", [PER_LAYER, "transfer.order=stream", "transfer.chunk_tokens=700"]),
    "blocks": ("transfer", [PER_LAYER, "transfer.order=blocks"]),
    "cosine": ("transfer", ["transfer.schedule=cosine", "transfer.warmup_steps=2", "transfer.epochs=0.3",
                            "transfer.max_steps=-1"]),
    "cross-entropy": ("transfer", ["transfer.xent_weight=0.5", "transfer.weight_decay=0.1"]),
    "unrotated maps": ("transfer", ["attention.feature_inputs=unrotated", "attention.sinks=4"]),
    "bfloat16": ("transfer", ["dtype=bfloat16"]),
}  # fmt: skip
"""Command and settings of each run."""
SERIES = ("loss", "eval_loss", "grad_norm", "learning_rate")
Found = dict[str, Tensor]


def look_up(name: str) -> Any:
    """A public name of the tree that runs, wherever it is today."""
    for module in MODULES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise LookupError(f"{name} is in none of {', '.join(MODULES[name])}: add its place to MODULES.")


def helper(name: str) -> Any:
    """A helper of the working tree's tests."""
    path = next((ROOT / place for place in HELPERS[name] if (ROOT / place).is_file()), None)
    if path is None:
        raise LookupError(f"None of {', '.join(HELPERS[name])} exists: add its place to HELPERS.")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def converted(model: nn.Module, **attention: Any) -> Any:
    """A tiny model linearized, with the same feature maps each time."""
    import lolcats

    torch.manual_seed(1)
    return lolcats.convert(model, look_up("AttentionConfig")(**{**SMALL, **attention}))


def variant(
    model_type: str = "llama", dtype: torch.dtype = torch.float32, changes: Any = None, **attention: Any
) -> Found:
    """Everything that a linearized model computes."""
    import lolcats

    model = converted(helper("tiny").tiny(model_type, **(changes or {})).to(dtype), **attention)
    found = outputs(model)
    model.requires_grad_(True)
    loss = model(IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    found["loss"] = loss.detach()
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad(), lolcats.override(model, mode="teacher"):
        found["teacher's logits"] = model(IDS, use_cache=False).logits
    return found


@torch.no_grad()
def outputs(model: Any) -> Found:
    """Logits of whole, padded and cached calls, states, and greedy tokens."""
    from transformers import DynamicCache

    found = {"logits": model(IDS, use_cache=False).logits}
    found["padded logits"] = model(IDS, attention_mask=PADDING, use_cache=False).logits[PADDING.bool()]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    pieces = [IDS[:, :PREFILL], *IDS[:, PREFILL:].split(1, 1)]
    parts = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    found["logits through the cache"] = torch.cat(parts, 1)
    found |= {f"state {name}": x for name, x in state_tensors(cache)}
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found["tokens"] = model.generate(IDS[:, :20], attention_mask=PADDING[:, :20], **greedy)
    return found


def state_tensors(cache: Any) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in the states of a cache, under names without meaning."""
    for number, layer in enumerate(cache.layers):
        yield from held(layer, f"layer {number}", set())


def held(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a value holds, inside objects of lolcats or transformers too; modules hold none of the state."""
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from held(entry, f"{name}.{key}", seen)
    elif isinstance(value, list | tuple):
        yield from held(dict(enumerate(value)), name, seen)
    elif type(value).__module__.split(".")[0] in ("lolcats", "transformers"):
        slots = {slot: getattr(value, slot) for slot in getattr(value, "__slots__", ()) if hasattr(value, slot)}
        yield from held({**getattr(value, "__dict__", {}), **slots}, name, seen)


def long_sequence(**attention: Any) -> Found:
    """Logits and gradients of a row longer than what is laid out at a time."""
    model = converted(helper("tiny").tiny("llama"), **attention)
    loss = model(LONG, labels=LONG, use_cache=False).loss
    loss.backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        return {**found, "loss": loss.detach(), "logits": model(LONG, use_cache=False).logits}


def packed(**attention: Any) -> Found:
    """Logits of rows in which documents are kept apart."""
    model = converted(helper("tiny").tiny("llama"), **attention)
    places = torch.cat([torch.arange(n) for n in (11, 3, 26, 1, 39)]).view_as(IDS)
    with torch.no_grad():
        return {"logits": model(IDS, position_ids=places, use_cache=False).logits}


def invoke(*words: str) -> str:
    from typer.testing import CliRunner

    result = CliRunner().invoke(look_up("app"), list(words))
    if result.exit_code:
        raise RuntimeError(f"lolcats {' '.join(words)}: {result.output}") from result.exception
    return result.output


def stage(name: str) -> Found:
    """What a run logs, measures and writes, and what its model computes and says."""
    command, settings = STAGES[name]
    out, inputs = Path(name.replace(" ", "-")), ROOT / INPUTS
    sets = [word for setting in settings for word in ("--set", setting)]
    given = (str(inputs / "base"), "--data", str(inputs / "data.jsonl"), "--recipe", str(inputs / "recipe.yaml"))
    invoke(command, *given, *sets, "--out", str(out))
    found = logged(out)
    for file in sorted(out.rglob("*.safetensors")):
        found |= {f"{file.relative_to(out)}: {key}": x for key, x in load_file(file).items()}
    return found | used(str(out))


def logged(out: Path) -> Found:
    """Losses and the like of both stages, and the perplexities and errors in run.json."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for key in {(line["stage"], name) for line in lines for name in SERIES if name in line}:
        series = [[line["step"], line[key[1]]] for line in lines if line["stage"] == key[0] and key[1] in line]
        found[" ".join(key)] = torch.tensor(series, dtype=torch.float64)
    results = json.loads((out / "run.json").read_text())["results"]
    wanted = {key: value for key, value in results.items() if key.startswith(("ppl_", "layer_errors_", "gamma"))}
    return found | {key: torch.tensor(value, dtype=torch.float64) for key, value in wanted.items()}


def used(out: str) -> Found:
    """What the model in a run directory computes, through transformers and the command line."""
    from transformers import AutoModelForCausalLM

    import lolcats  # noqa: F401  registers the model type

    text = invoke("generate", out, "--prompt", "the cat sat on", "--max-new-tokens", "16")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    return {**outputs(model), "generated text": torch.tensor(list(text.encode()), dtype=torch.uint8)}


def parts() -> dict[str, Callable[[], Found]]:
    """Everything that is compared, by name."""
    found: dict[str, Callable[[], Found]] = {
        f"variant {name}": partial(variant, **attention) for name, attention in VARIANTS.items()
    }
    found["variant bfloat16"] = partial(variant, dtype=torch.bfloat16)
    for name in ("hybrid", "linear", "unrotated"):
        found[f"1,100 tokens, {name}"] = partial(long_sequence, **VARIANTS[name])
        found[f"documents, {name}"] = partial(packed, **VARIANTS[name])
    for name, family in helper("families").FAMILIES.items():
        found[f"family {name}"] = partial(variant, family.model_type, changes=family.changes)
    return found | {f"stage {name}": partial(stage, name) for name in STAGES}


def run_program(out: Path, tree: Path, only: str) -> None:
    """Compute all parts with the code of ``tree`` and write their tensors; a part that fails is one by its error."""
    import lolcats

    assert tree.resolve() in Path(lolcats.__file__).resolve().parents, f"{lolcats.__file__} is not in {tree}"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    tensors: Found = {}
    for name, part in parts().items():
        if not re.search(only, name):
            continue
        try:
            found = part()
        except Exception as error:
            traceback.print_exc()
            found = {f"error {type(error).__name__}": torch.zeros(1)}
        tensors |= {f"{name}|{key}": x.detach().clone().contiguous() for key, x in found.items()}
    save_file(tensors, out)


@contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, in a folder that git knows as long as the block lasts."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", "--quiet", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def start(tree: Path, work: Path, only: str) -> subprocess.Popen[bytes]:
    """The program with the code of ``tree``, in a process and a folder of its own."""
    work.mkdir()
    fixed = {
        "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, __file__, "--program", str(tree), "--only", only]
    with (work / "log").open("w") as log:
        return subprocess.Popen(command, cwd=work, env={**os.environ, **fixed}, stdout=log, stderr=log)


def program_tensors(trees: list[Path], work: Path, only: str) -> list[Found]:
    """What the program finds with each tree, at the same time."""
    places = [work / str(number) for number in range(len(trees))]
    processes = [start(tree, place, only) for tree, place in zip(trees, places, strict=True)]
    for process, place in zip(processes, places, strict=True):
        status, log = process.wait(), (place / "log").read_text()
        if status:
            sys.exit(f"The program failed:\n{log[-4000:]}")
        if "Traceback" in log:
            print(log[log.index("Traceback") :][:4000], file=sys.stderr)
    return [load_file(place / "tensors.safetensors") for place in places]


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """What two tensors must share to be the same; NaN is like NaN, and 0 is not like -0."""
    return str(tensor.dtype), tuple(tensor.shape), tensor.flatten().view(torch.uint8).numpy().tobytes()


def differences(old: Found, new: Found) -> dict[str, str]:
    """Name -> how it differs, of the tensors of one part."""
    found = {}
    states = [{key for key in tensors if key.startswith("state ")} for tensors in (old, new)]
    for key in sorted((old.keys() | new.keys()) - states[0] - states[1]):
        if key not in old or key not in new:
            found[key] = f"only in the {'new' if key not in old else 'old'} tree"
        elif bits(old[key]) != bits(new[key]):
            found[key] = distance(old[key], new[key])
    held_now = Counter(bits(new[key]) for key in states[1])
    for key in sorted(states[0]):
        if not held_now[bits(old[key])]:
            found[key] = "not held by the new tree's states"
        held_now[bits(old[key])] -= 1
    return found


def distance(old: Tensor, new: Tensor) -> str:
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{tuple(old.shape)} {old.dtype} and {tuple(new.shape)} {new.dtype}"
    return f"by up to {(old.double() - new.double()).abs().max().item():.3g}"


def by_part(tensors: Found) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition("|")
        found.setdefault(part, {})[key] = tensor
    return found


def report(old: Found, new: Found) -> bool:
    """Print a table of the parts and the names of what differs; whether all is equal."""
    parts = [by_part(tensors) for tensors in (old, new)]
    names = list(dict.fromkeys([*parts[0], *parts[1]]))
    found = {name: differences(*(tensors.get(name, {}) for tensors in parts)) for name in names}
    print("| part | tensors | that differ |\n|---|---:|---:|")
    for name in names:
        print(f"| {name} | {len(parts[0].get(name, {}))} | {len(found[name])} |")
    print(f"\n{len(old)} tensors, {sum(map(len, found.values()))} differ.")
    for name, differing in found.items():
        for key, how in differing.items():
            print(f"{name}: {key}: {how}")
    failed = sorted({key for key in old if "|error " in key})
    print("".join(f"\nFails in both trees: {key}" for key in failed if key in new))
    return not any(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default=COMMIT, help="what the working tree is compared with")
    parser.add_argument("--only", default="", metavar="REGEX", help="parts to compare, by name; default: all")
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        run_program(Path("tensors.safetensors"), arguments.program, arguments.only)
        return
    with tempfile.TemporaryDirectory() as folder, worktree(arguments.commit, Path(folder) / "tree") as tree:
        found = program_tensors([tree, ROOT], Path(folder), arguments.only)
    sys.exit(0 if report(*found) else 1)


if __name__ == "__main__":
    main()
