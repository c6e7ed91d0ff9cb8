#!/usr/bin/env bash
# Package: torch 2.13.0. No GPU needed.
# Expected: a forward hook that is registered with always_call=True runs whatever ends the module's forward, as `finally` does:
#   the documentation says "regardless of whether an exception is raised".
# What happens: it runs after an Exception, but not after KeyboardInterrupt or SystemExit. What such a hook should clean up is
#   left as it was after Ctrl-C in a notebook, and the next call finds it.
set -euo pipefail
changed() { echo "Changed: the hook also runs after KeyboardInterrupt or SystemExit, or no longer after an Exception."; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5 ||
    { echo "The packages could not be installed."; exit 2; }
cat > "$folder/hooks.py" <<'PYTHON'
import sys

import torch


class Ending(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


def runs(error):
    """How often the hook and a `finally` block run in one call."""
    seen = {"hook": 0, "finally": 0}

    def note(*_):
        seen["hook"] += 1

    module = Ending(error)
    module.register_forward_hook(note, always_call=True)
    try:
        module(torch.zeros(1))
    except BaseException:
        pass
    finally:
        seen["finally"] += 1
    return seen


found = {type(error).__name__: runs(error) for error in (None, ValueError(), KeyboardInterrupt(), SystemExit())}
for name, seen in found.items():
    print(f"{name}: {seen}")
sys.exit([seen["hook"] for seen in found.values()] != [1, 1, 0, 0])
PYTHON
"$folder/venv/bin/python" "$folder/hooks.py" || changed
