#!/usr/bin/env bash
# Package: triton 3.9.0 (3.6.0 does the same). No GPU needed.
# Expected: triton.constexpr_function wraps "an arbitrary Python function", so that kernels can call it at compile time. One
#   that calls a helper of its own is called like any other.
# What happens: the function works when Python calls it, but a kernel that uses it is refused, since the helper is a plain
#   function; with the helper's line written out, or the helper wrapped as well, the same kernel is accepted.
set -euo pipefail
changed() {
    echo "Changed: a constexpr_function may call a plain Python function, or kernels refuse it in another way."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check triton==3.9.0 ||
    { echo "The package could not be installed."; exit 2; }
cat > "$folder/kernels.py" <<'PYTHON'
import sys

import triton
import triton.language as tl


def halved(n):
    return n // 2


@triton.constexpr_function
def halved_inside(n):
    return n // 2


@triton.constexpr_function
def quarter(n):
    return halved(n) // 2


@triton.constexpr_function
def quarter_written_out(n):
    return n // 2 // 2


@triton.constexpr_function
def quarter_wrapped(n):
    return halved_inside(n) // 2


@triton.jit
def plain_helper(x, N: tl.constexpr):
    tl.store(x, quarter(N))


@triton.jit
def written_out(x, N: tl.constexpr):
    tl.store(x, quarter_written_out(N))


@triton.jit
def wrapped_helper(x, N: tl.constexpr):
    tl.store(x, quarter_wrapped(N))


print("called from Python:", quarter(8), quarter_written_out(8), quarter_wrapped(8))
said = {}
for kernel in (plain_helper, written_out, wrapped_helper):
    try:
        said[kernel.__name__] = "accepted" if kernel.cache_key else ""
    except RuntimeError as error:
        said[kernel.__name__] = str(error).split(":")[0]
    print(f"{kernel.__name__}: {said[kernel.__name__]}")
expected = {"plain_helper": "Unsupported function referenced", "written_out": "accepted", "wrapped_helper": "accepted"}
sys.exit(said != expected or quarter(8) != 2)
PYTHON
"$folder/venv/bin/python" "$folder/kernels.py" || changed
