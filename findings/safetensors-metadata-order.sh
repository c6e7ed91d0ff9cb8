#!/usr/bin/env bash
# Package: safetensors 0.8.0 (numpy 2.4.6).
# Expected: the same tensors with the same metadata make the same bytes. safetensors sorts the tensors, and files without
#   metadata, or with one key of it, do come out the same each time.
# What happens: with several keys of metadata, each call of save() writes them in another order, even in one process. The
#   files load alike, but their checksums differ.
set -euo pipefail
changed() {
    echo "Changed: safetensors writes several keys of metadata in a fixed order."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 ||
    { echo "The packages could not be installed."; exit 2; }
"$folder/venv/bin/python" - <<'PYTHON' || changed
import hashlib
import sys

import numpy
from safetensors.numpy import save

tensors = {name: numpy.arange(4, dtype=numpy.float32) for name in ("b", "a")}
checksums = {}
for keys in (0, 1, 12):
    metadata = {f"key{key}": "value" for key in range(keys)}
    files = [save(tensors, metadata=metadata) for _ in range(5)]
    checksums[keys] = {hashlib.sha256(file).hexdigest()[:16] for file in files}
    print(f"{keys} keys of metadata, saved 5 times: {len(checksums[keys])} different checksums")
for file in files[:2]:
    print("  ", file[8:120].decode(), "...")
sys.exit(not (len(checksums[0]) == len(checksums[1]) == 1 and len(checksums[12]) > 1))
PYTHON
