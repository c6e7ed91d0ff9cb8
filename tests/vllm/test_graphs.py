"""What vLLM may record as a CUDA graph. There are none on a CPU: here PyTorch takes the place of the kernel, and
batches of one token for each sequence are padded to a recorded size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import engine, generate, references, tokens, wanted
from torch import Tensor

ROWS = 6
"""The only size that is recorded: all steps of one token for each sequence are padded to it."""


class Steps:
    """Stands in for the kernel in :mod:`lolcats.vllm.attend`, and notes where each layer finds its rows."""

    def __init__(self) -> None:
        self.places: dict[int, set[tuple[int, int]]] = {}
        self.padding = 0

    def decode(self, pool: Any, mixer: Any, rows: Any, *qkv: Tensor) -> Tensor:
        from lolcats.attention import step
        from lolcats.attention.state import Seen
        from lolcats.vllm.batch import PADDING

        seen = rows.seen.rows.tolist()
        real = len(seen) - seen.count(PADDING)
        assert PADDING not in seen[:real]
        if rows.tokens is None:
            assert len(seen) == ROWS
            assert not rows.slots[real:].any()  # vLLM's block for nothing
            self.places.setdefault(id(pool), set()).add((rows.seen.rows.data_ptr(), rows.slots.data_ptr()))
            self.padding += ROWS - real
        slots = rows.slots[:real].long()
        pool.clear(slots[rows.seen.rows[:real] == 0])
        known = Seen(rows.seen.rows[:real], tuple(seen[:real]))
        y = step(pool.rows(slots, known), *(x[:real] for x in qkv), mixer)[0]
        return torch.cat([y, y.new_zeros(len(seen) - real, *y.shape[1:])])


def with_padding(forward: Any) -> Any:
    """The computation of a layer, with as many tokens as rows."""

    def padded(self: Any, layer: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, metadata: Any,
               output: Tensor, **rest: Any) -> Tensor:  # fmt: skip
        rows = None if metadata is None else metadata.batch.decodes
        if rows is None or rows.tokens is not None:
            return forward(self, layer, q, k, v, cache, metadata, output, **rest)  # type: ignore[no-any-return]
        q, k, v, out = (torch.cat([x, x.new_full((ROWS - len(x), *x.shape[1:]), 1)]) for x in (q, k, v, output))
        return output.copy_(forward(self, layer, q, k, v, cache, metadata, out)[: len(output)])

    return padded


def padded(common: Any) -> Any:
    """``common`` with more rows, as vLLM pads a batch to a size that it has recorded. What it says of them is wrong."""
    if common.max_query_len > 1:
        return common
    more = ROWS - common.num_reqs
    starts, starts_cpu = (
        torch.cat([x, x[-1:].expand(more)]) for x in (common.query_start_loc, common.query_start_loc_cpu)
    )
    lengths, table = common.seq_lens, common.block_table_tensor
    return replace(
        common, query_start_loc=starts, query_start_loc_cpu=starts_cpu, num_reqs=ROWS,
        seq_lens=torch.cat([lengths, lengths.new_full((more,), 3)]),
        block_table_tensor=torch.cat([table, table.new_ones(more, table.shape[1])]),
        is_prefilling=torch.cat([common.is_prefilling, common.is_prefilling.new_zeros(more)]),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "kept", "heads", "unrotated glm4"])
def test_padded_steps_of_one_token_each(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are those of ``generate``, and each step finds its rows where the one before it did."""
    import lolcats.vllm.attend as attention
    from lolcats.vllm.backend import StateBuilder
    from lolcats.vllm.layer import Computation, StateAttention

    steps, build = Steps(), StateBuilder.build
    monkeypatch.setattr(StateAttention, "decodes_in_place", lambda *_: True)
    monkeypatch.setattr(attention, "decode", steps.decode)
    monkeypatch.setattr(StateBuilder, "build", lambda self, prefix, common, **_: build(self, prefix, padded(common)))
    monkeypatch.setattr(Computation, "forward", with_padding(Computation.forward))
    cases = references(models / name)
    with engine(models / name, max_num_seqs=ROWS) as llm:
        assert tokens(generate(llm, cases)) == wanted(cases)
    assert steps.padding > 20
    assert {len(places) for places in steps.places.values()} == {1}


@pytest.mark.parametrize(("dtype", "feature_map", "able"), [
    ("float32", "hedgehog", True), ("bfloat16", "hedgehog", False), ("float32", "t2r", False),
])  # fmt: skip
def test_what_the_kernel_does_not_compute_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, dtype: str, feature_map: str, able: bool
) -> None:
    """On a CPU it only computes float32, in Triton's interpreter; nothing is launched here."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from vllm.v1.attention.backend import AttentionCGSupport

    from lolcats.attention import use_backend
    from lolcats.config import AttentionConfig
    from lolcats.modeling.layer import Geometry, LinearizedAttention, layer_spec
    from lolcats.vllm.backend import StateBuilder
    from lolcats.vllm.layer import StateAttention

    config = AttentionConfig(feature_map=feature_map, feature_dim=8)
    layer = LinearizedAttention(Geometry(0, 4, 2, 16, 16), config, layer_spec(config, "hybrid"), "vllm")
    vllm: Any = SimpleNamespace(head_size=16, head_size_v=16, layer_name="0", impl=SimpleNamespace(scale=0.25))
    ours: Any = StateAttention(vllm, layer, None, None)  # type: ignore[arg-type]
    config = configuration({"model.layers.0.attn": ours, "model.layers.1.attn": object()}, getattr(torch, dtype))
    recorded = {}
    for backend in ("triton", "chunked"):
        with use_backend(backend):
            recorded[backend] = StateBuilder.get_cudagraph_support(config, None)
    never, single = AttentionCGSupport.NEVER, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert recorded == {"triton": single if able else never, "chunked": never}


def configuration(layers: dict[str, Any], dtype: torch.dtype) -> Any:
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(dtype=dtype), scheduler_config=SimpleNamespace(max_num_seqs=8),
        cache_config=SimpleNamespace(mamba_cache_mode="align"), speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )  # fmt: skip


def test_a_step_is_described_without_waiting() -> None:
    """Tensors on the meta device have no values to wait for."""
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import MambaSpec

    from lolcats.vllm.backend import StateBuilder

    spec = MambaSpec(block_size=16, shapes=((64,),), dtypes=(torch.uint8,))
    builder = StateBuilder(spec, ["0"], configuration({}, torch.float32), torch.device("meta"))
    starts = torch.tensor([0, 1, 2, 3, 3], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts.to("meta"), query_start_loc_cpu=starts, num_reqs=4, num_actual_tokens=4,
        seq_lens=torch.empty(4, dtype=torch.int32, device="meta"), max_query_len=1, max_seq_len=64,
        block_table_tensor=torch.empty(4, 4, dtype=torch.int32, device="meta"),
        slot_mapping=torch.empty(4, dtype=torch.int64, device="meta"), is_prefilling=torch.zeros(4, dtype=torch.bool),
    )  # fmt: skip
    batch = builder.build(0, common).batch
    assert batch.decodes is not None
    assert batch.decodes.slots.is_meta
    assert batch.positions.shape == (4,)
