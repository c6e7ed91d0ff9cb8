"""Tests of kernels: where they run, and Triton's interpreter with the bf16 products it lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where tests of kernels put their tensors: on a GPU if there is one, else Triton's interpreter runs the kernels."""
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="models of this test are on the CPU")


def add_bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add bf16 products. The interpreter truncates to bf16 instead of rounding, so errors are three times the GPU's."""
    from triton import language
    from triton.runtime import interpreter

    def widened(x: Any) -> Any:
        bits = x.dtype.scalar == language.bfloat16
        return (x.data.astype("uint32") << 16).view("float32") if bits else x.data

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        return interpreter.TensorHandle(widened(a) @ widened(b) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
