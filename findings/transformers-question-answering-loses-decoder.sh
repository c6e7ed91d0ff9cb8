#!/usr/bin/env bash
# Package: transformers 5.23.0 (torch 2.13.0).
# Expected: AutoModelForQuestionAnswering.from_pretrained() on a Llama checkpoint keeps the decoder and adds a new head, as
#   AutoModelForSequenceClassification and AutoModelForTokenClassification do.
# What happens: LlamaForQuestionAnswering calls its decoder "transformer", and a checkpoint of LlamaForCausalLM calls it "model".
#   Not one weight of the decoder is loaded; from_pretrained() ends well, with a report of newly initialized weights, and the
#   model to be finetuned starts from random numbers.
set -euo pipefail
changed() {
    echo "Changed: the decoder is loaded for question answering, or it is not for the other tasks."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 ||
    { echo "The packages could not be installed."; exit 2; }
cd "$folder"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON' || changed
import sys

import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
saved = LlamaForCausalLM(config)
saved.save_pretrained("checkpoint")
expected = dict(saved.model.named_parameters())
kept = {}
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
    torch.manual_seed(1)
    model = auto.from_pretrained("checkpoint")
    found = dict(model.base_model.named_parameters())
    matrices = [name for name, weight in expected.items() if weight.ndim == 2]
    kept[type(model).__name__] = sum(torch.equal(found[name], expected[name]) for name in matrices), len(matrices)
for name, (count, total) in kept.items():
    print(f"{name}: {count} of {total} weight matrices of the decoder are those of the checkpoint")
*others, answering = kept.values()
sys.exit(not (all(count == total for count, total in others) and answering[0] == 0))
PYTHON
