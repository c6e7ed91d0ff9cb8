"""q, k and v of a real model's attention layers on real text, for the errors of benchmarks/attention.py.

python benchmarks/activations.py MODEL TEXT OUT.safetensors     # MODEL: whatever `lolcats run` takes as base
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import lolcats
from lolcats.config import AttentionConfig
from lolcats.modeling.layer import AttentionCall, LinearizedAttention
from lolcats.modeling.observe import watch_layers
from lolcats.weights.base import find_base, load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20], help="indices (default: %(default)s)")
    arguments = parser.parse_args()
    base = find_base(arguments.model)
    model = lolcats.convert(load_model(base, torch.float32), AttentionConfig())
    ids = load_tokenizer(base)(arguments.text.read_text(), return_tensors="pt").input_ids[:, : arguments.tokens]
    found: dict[str, Tensor] = {}

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        if layer.geometry.layer in arguments.layers:
            tensors = dict(zip("qkv", (*call.queries_and_keys(), call.v), strict=True))
            found.update({f"{layer.geometry.layer}.{n}": x.bfloat16().contiguous() for n, x in tensors.items()})

    watch_layers(model, ids, observe)
    save_file(found, arguments.out)
    print(f"{arguments.out}: layers {arguments.layers}, {ids.shape[1]} tokens")


if __name__ == "__main__":
    main()
