"""One step of one layer, for all requests of a batch, with states in a pool. Knows nothing of vLLM.

Shapes: B rows, H query heads, G key/value heads, T tokens, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from lolcats.attention import Mixer, choose_path, extend, step
from lolcats.attention.path import choose_decode_path
from lolcats.modeling.layer import LinearizedAttention
from lolcats.vllm.batch import Batch, Rows
from lolcats.vllm.pool import Pool


def attend(
    pool: Pool, layer: LinearizedAttention, mixer: Mixer, batch: Batch, q: Tensor, k: Tensor, v: Tensor, out: Tensor
) -> None:  # fmt: skip
    """q (tokens, H, D), k and v (tokens, G, D) -> ``out`` (tokens, H, D); the states in the pool move forward."""
    if batch.decodes is not None:
        batch.decodes.put(decode(pool, mixer, batch.decodes, *map(batch.decodes.take, (q, k, v))), out)
    for rows in batch.prefills:
        rows.put(prefill(pool, layer, mixer, rows, *map(rows.take, (q, k, v))), out)


def decode(pool: Pool, mixer: Mixer, rows: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Outputs (B, H, 1, D) for one token of each row, and their states moved forward."""
    if choose_decode_path(q, mixer) == "kernels":
        return step(pool.whole(rows.seen.rows), q, k, v, mixer, slots=rows.slots)[0]
    assert rows.tokens is not None, "only the kernel knows padding and what begins without the host"
    if rows.fresh is not None:
        pool.clear(rows.fresh)
    return step(pool.rows(rows.slots, rows.seen), q, k, v, mixer)[0]


def prefill(
    pool: Pool, layer: LinearizedAttention, mixer: Mixer, rows: Rows, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:  # fmt: skip
    """Outputs (B, H, T, D) for the new tokens of each row, and the states after them."""
    state = layer.empty_state(k, v) if rows.begin else pool.read(rows.slots, rows.seen)
    path = choose_path(q, mixer.spec, final=True)
    y, state = extend(state, q, k, v, mixer, rows.mask, rows.lengths, path)
    pool.write(rows.slots, state)
    return y
