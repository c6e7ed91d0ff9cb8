#!/usr/bin/env bash
# Package: triton 3.9.0 with torch 2.13.0 (the interpreter needs no GPU). triton 3.6.0 computes it.
# Expected: with TRITON_INTERPRET=1, kernels compute what they compute on a GPU. A mask may be `(offsets < n) & flag`, where
#   flag is the result of comparing two scalars: both are boolean (tl.int1).
# What happens: the interpreter makes an int8 of the two and refuses it as a mask, "mask has unsupported dtype". With the scalar
#   inside tl.where, or compared after it is broadcast, the same kernel runs. The compiler (to Triton's own IR) takes all three.
set -euo pipefail
changed() {
    echo "Changed: the interpreter takes a mask made of a boolean tensor and a boolean scalar, or refuses it otherwise."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5 &&
    "$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check --no-deps triton==3.9.0 ||
    { echo "The packages could not be installed."; exit 2; }
cat > "$folder/kernels.py" <<'PYTHON'
import os

import torch
import triton
import triton.language as tl


@triton.jit
def scalar_and(x, out, n, first, N: tl.constexpr):
    i = tl.arange(0, N)
    mask = (i < n) & (first == 0)
    tl.store(out + i, tl.load(x + i, mask=mask, other=7.0))


@triton.jit
def scalar_in_where(x, out, n, first, N: tl.constexpr):
    i = tl.arange(0, N)
    mask = tl.where(first == 0, i < n, i < 0)
    tl.store(out + i, tl.load(x + i, mask=mask, other=7.0))


@triton.jit
def broadcast_first(x, out, n, first, N: tl.constexpr):
    i = tl.arange(0, N)
    mask = (i < n) & (first + tl.zeros_like(i) == 0)
    tl.store(out + i, tl.load(x + i, mask=mask, other=7.0))


kernels = (scalar_and, scalar_in_where, broadcast_first)
found = {}
if os.environ.get("TRITON_INTERPRET"):
    for kernel in kernels:
        out = torch.zeros(8)
        try:
            kernel[(1,)](torch.arange(8.0), out, 5, 0, N=8)
            found[kernel.__name__] = str(out.tolist())
        except triton.runtime.errors.InterpreterError as error:
            found[kernel.__name__] = str(error.__cause__)
    right = "[0.0, 1.0, 2.0, 3.0, 4.0, 7.0, 7.0, 7.0]"
    expected = {"scalar_and": "mask has unsupported dtype", "scalar_in_where": right, "broadcast_first": right}
else:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", 90, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    for kernel in kernels:
        kinds = {"x": "*fp32", "out": "*fp32", "n": "i32", "first": "i32", "N": "constexpr"}
        source = ASTSource(kernel, kinds, {"N": 8})
        options = backend.parse_options({})
        module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
        found[kernel.__name__] = "accepted" if "tt.load" in str(module) else ""
    expected = {kernel.__name__: "accepted" for kernel in kernels}
for name, what in found.items():
    print(f"{'interpreted' if os.environ.get('TRITON_INTERPRET') else 'compiled'}, {name}: {what}", flush=True)
os._exit(found != expected)  # without a report of leaked references, which the compiler's objects leave
PYTHON
"$folder/venv/bin/python" "$folder/kernels.py" && TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/kernels.py" || changed
