#!/bin/bash
# Both stages on all GPUs of one machine.
#   MODEL=meta-llama/Llama-3.1-70B DATA=alpaca.jsonl OUT=run RECIPE=paper-70b bash examples/launch/one_node.sh
# If it is killed, run the same command again to continue.
set -euo pipefail
: "${MODEL:?a hub id or a model directory}" "${DATA:?a file or a hub data set}" "${OUT:?a directory to write}"
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}

lolcats plan "$MODEL" --gpus "$GPUS" --recipe "${RECIPE:-paper-70b}"
torchrun --standalone --nproc-per-node "$GPUS" --no-python \
  lolcats transfer "$MODEL" --data "$DATA" --out "$OUT" --recipe "${RECIPE:-paper-70b}" "$@"
torchrun --standalone --nproc-per-node "$GPUS" --no-python lolcats finetune "$OUT"
