"""lolcats plan: counts against real models, memory and time against committed measurements, refusals."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from support.scripts import script
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig
from typer.testing import CliRunner

import lolcats
from lolcats.cli import app
from lolcats.config import Config, load_config
from lolcats.errors import LolcatsError
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import linearized_layers
from lolcats.plan import Machine, Size, Speeds, Work, plan_finetune, plan_transfer, read_config, report, size_of
from lolcats.plan.costs import GIB, finetune_activations, finetune_token, gpu_need, transfer_token
from lolcats.stages.finetune import fits
from lolcats.stages.finetune.stage import add_lora
from lolcats.weights.base import Base

ROOT = Path(__file__).parent.parent
MEASURED = json.loads((ROOT / "benchmarks/results/training.json").read_text())
LARGE = json.loads((ROOT / "benchmarks/results/large.json").read_text())
SMALL = ["attention.window_size=8", "attention.feature_dim=8", "data.sequence_length=32"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("maps", ["per_query_head", "per_kv_head"])
def test_counts_are_those_of_the_model(family: str, maps: str) -> None:
    config = load_config("paper-sinks", [*SMALL, f"attention.key_maps={maps}"])
    size = size_of(FAMILIES[family](vocab_size=320), config)
    model = tiny_model(family)
    total, layers = sum(p.numel() for p in model.parameters()), len(decoder(model).layers)
    model = lolcats.convert(model, config)
    assert size.maps == sum(p.numel() for layer in linearized_layers(model) for p in layer.parameters())
    assert (size.layers, size.linearized) == (layers, len(linearized_layers(model)))
    assert size.total + size.hidden == total  # but for the last norm
    wrapped = add_lora(model, config.finetune)
    assert size.lora == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert size.mlp == 2 * model.config.intermediate_size


def test_a_sequence_takes_a_state_and_the_keys_of_kept_heads() -> None:
    kept = load_config("paper-sinks", [*SMALL, "attention.softmax_heads={0: [1]}"])
    plain, size = (size_of(FAMILIES["llama"](vocab_size=320), c) for c in (load_config("paper-sinks", SMALL), kept))
    assert (plain.token, size.token) == (0, 2 * 8 * 2)
    assert plain.teacher_token == size.teacher_token == 2 * 2 * 2 * 8 * 2
    assert 0 < size.state < plain.state
    assert "kept heads" not in report.generation_line(plain)
    line = report.generation_line(size)
    assert "and 32 B a token for the keys of kept heads and layers; at 32,768 tokens" in line
    assert line.endswith("the base model's cache 4 MiB.")


def test_layers_that_slide_a_window_take_no_more_than_it() -> None:
    config = load_config("paper-sinks", [*SMALL, "attention.softmax_heads={1: [0]}"])
    size = size_of(FAMILIES["gemma3"](vocab_size=320), config)  # a window of 24 keys in one layer of three
    one = 2 * 16 * 2  # bytes of a head's key and value
    assert (size.token, size.window) == (one, 24 * 2 * one)
    assert (size.teacher_token, size.teacher_window) == (4 * one, 24 * 2 * one)
    line = report.generation_line(size)
    assert ", up to 3 KiB for the windows of layers that slide one and 64 B a token for the keys of kept" in line


def test_experts_that_a_token_skips_cost_nothing() -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=320,
    )  # fmt: skip
    size = size_of(config, load_config("paper-sinks", SMALL))
    experts = 2 * 8 * 3 * 32 * 48
    assert size.decoder - size.active == experts * 6 // 8
    assert size.mlp == 2 * 2 * 48 + 8


@pytest.fixture(scope="module")
def measured_geometry() -> tuple[Size, Config]:
    """The geometry and batches of benchmarks/training.py."""
    g = MEASURED["geometry"]
    config = load_config("paper-sinks", [
        f"attention.feature_dim={g['feature_dim']}", f"attention.sinks={g['sinks']}",
        f"data.sequence_length={g['length']}", f"transfer.batch_size={g['transfer_rows']}",
        f"transfer.micro_batch_size={g['transfer_rows']}", f"finetune.micro_batch_size={g['finetune_rows']}",
        f"finetune.batch_size={g['finetune_rows'] * g['accumulated']}",
    ])  # fmt: skip
    size = size_of(read_config("llama-3-8b"), config)
    assert (size.layers, size.heads, size.kv_heads, size.head_dim) == (
        g["layers"], g["heads"], g["kv_heads"], g["head_dim"])  # fmt: skip
    return size, config


PARTS = {
    "stage 1, a key map per query head": (0, "transfer"), "stage 2, linear attention": (0, "finetune"),
    "stage 2, linear attention, recomputed layers": (1, "finetune"),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_memory_and_time_are_those_measured(part: str, measured_geometry: tuple[Size, Config]) -> None:
    (size, config), (number, stage) = measured_geometry, PARTS[part]
    found = MEASURED["parts"][part]
    if number:
        config = replace(config, finetune=replace(config.finetune, gradient_checkpointing=True))
    plan = (plan_transfer if stage == "transfer" else plan_finetune)(size, config, Machine(), Work())[0]
    assert plan.peak / GIB == pytest.approx(found["peak_gib"], rel=0.1)
    token = (transfer_token if stage == "transfer" else finetune_token)(size, config, Speeds())
    assert token * found["tokens"] == pytest.approx(statistics.median(found["seconds"]), rel=0.25)


@pytest.mark.parametrize("maps", ["per_query_head", "per_kv_head"])
def test_maps_before_rope_keep_their_inputs(maps: str) -> None:
    stage2 = {}
    for inputs in ("rotated", "unrotated"):
        size, config = llama(
            "llama-3-8b", f"attention.feature_inputs={inputs}", f"attention.key_maps={maps}",
            "finetune.micro_batch_size=4",
        )  # fmt: skip
        stage2[inputs] = plan_finetune(size, config, Machine(), Work())[0]
        assert bool(report.time_line(size)) == (inputs == "unrotated")
    H, G, D = 32, 8, 128
    rows = config.finetune.micro_batch_size * config.data.sequence_length
    assert stage2["unrotated"].peak - stage2["rotated"].peak == 2 * rows * 32 * (H + G) * D
    assert stage2["unrotated"].seconds == stage2["rotated"].seconds


def test_activations_of_kept_heads_are_kept_twice() -> None:
    """Alone and put together with those of linearized heads, of which the kernels keep 8 bits more a channel."""
    heads = {str(layer): [0] for layer in range(16)}
    (plain, config), (size, _) = llama("llama-3-8b"), llama("llama-3-8b", f"attention.softmax_heads={heads}")
    assert (size.queries, size.keys, size.parted, plain.parted) == (32, 8, 16, 0)
    some, none = (finetune_activations(each, 1, 1024) for each in (size, plain))
    assert some - none == 2 * 1024 * 32 * 128 * 16 / 32
    chunked = replace(plain, kernels=False)
    assert none - finetune_activations(chunked, 1, 1024) == 1024 * 32 * 128
    every = llama("llama-3-8b", f"attention.softmax_heads={ {str(layer): [0] for layer in range(32)} }")[0]
    assert (every.heads, every.queries) == (28, 32)
    softmax = 3.5 * 2 * 1024 * 32 * 128 * 32 / 8 / Speeds().softmax / Speeds().matmul
    linear = 1e-9 * Speeds().finetune_ns * 32 * 4
    more = finetune_token(every, config, Speeds()) - finetune_token(plain, config, Speeds())
    assert more == pytest.approx(softmax - linear)


def test_recomputing_ends_before_the_last_product() -> None:
    """As torch does it, and so as it is planned."""
    model = tiny_model().requires_grad_(False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in decoder(model).layers:
        layer.self_attn.q_proj.weight.requires_grad_()
    shapes, ids = list[tuple[int, ...]](), torch.arange(16)[None]
    loss = model(input_ids=ids, labels=ids).loss
    hooks = [layer.mlp.up_proj.register_forward_hook(lambda *_: shapes.append((1,))) for layer in decoder(model).layers]

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.mm.default:
                shapes.append((*args[0].shape, args[1].shape[1]))
            return function(*args, **(kwargs or {}))

    with Products():
        loss.backward()
    text, layers = model.config, len(hooks)
    assert shapes.count((1,)) == layers, "each layer was computed again"
    down = (16, text.intermediate_size, text.hidden_size)  # also the shape of both gradients through gate and up
    assert shapes.count(down) == 2 * layers
    size, config = llama("llama-3.1-70b", "finetune.gradient_checkpointing=true", "finetune.micro_batch_size=8")
    without = replace(config, finetune=replace(config.finetune, gradient_checkpointing=False))
    token = finetune_token(size, config, Speeds()) - finetune_token(size, without, Speeds())
    products = 2 * (size.decoder - 80 * 28672 * 8192) / Speeds().forward / Speeds().matmul
    assert token == pytest.approx(products + 80 * Speeds().recomputed_layer / 8192)


@pytest.mark.parametrize("loss", ["kl", "mix"])
def test_learning_from_the_teacher_takes_its_forward_pass(loss: Any, measured_geometry: tuple[Size, Config]) -> None:
    """Half as long again, or a little less or more, and the logits of a part; nothing for the weights."""
    size, config = measured_geometry
    taught = replace(config, finetune=replace(config.finetune, loss=loss))
    plain, longer = (plan_finetune(size, c, Machine(), Work(finetune_tokens=10**9))[0] for c in (config, taught))
    assert 1.3 < longer.seconds["computing"] / plain.seconds["computing"] < 1.6
    assert 0 <= sum(longer.gpu.values()) - sum(plain.gpu.values()) < 2**31
    assert longer.gpu["weights"] == plain.gpu["weights"]


def test_as_many_rows_as_fit() -> None:
    """``micro_batch_size: auto``, as it does by a trial when it trains."""
    size, config = llama("llama-3-8b")
    assert config.finetune.micro_batch_size == "auto"

    def rows(gib: int, *settings: str) -> tuple[float, list[str]]:
        _, chosen = llama("llama-3-8b", *settings)
        plan = plan_finetune(size, chosen, Machine(gpu_memory=gib * GIB), Work())[0]
        return plan.gpu["activations kept for backward"], plan.settings + plan.problems

    one, eight = (rows(141, f"finetune.micro_batch_size={n}")[0] for n in (1, 8))
    assert rows(141) == (eight, [])
    assert rows(24) == (one, [])
    assert rows(8)[1]
    assert one < rows(40)[0] < eight


def test_what_the_kernels_leave_to_the_chunked_path_takes_its_time() -> None:
    plain, kind = load_config("paper-sinks", SMALL), ["attention.kind=linear", "attention.decay=retnet"]
    decays = load_config("paper-sinks", [*SMALL, *kind])
    fast, slow = (size_of(FAMILIES["llama"](vocab_size=320), config) for config in (plain, decays))
    assert (fast.kernels, slow.kernels) == (True, False)
    assert transfer_token(slow, decays, Speeds()) > transfer_token(replace(slow, kernels=True), decays, Speeds())


@pytest.mark.parametrize(("name", "part"), [("llama-3.1-70b", "Llama 3.1 70B"), ("llama-3.1-405b", "Llama 3.1 405B")])
def test_streamed_layers_cost_what_was_measured(name: str, part: str) -> None:
    found = json.loads((ROOT / "benchmarks/results/scale.json").read_text())["geometries"][part]
    g = found["geometry"]
    config = load_config("paper-sinks", [
        f"attention.feature_dim={g['feature_dim']}", f"data.sequence_length={g['length']}", "data.validation_rows=32",
        f"transfer.batch_size={g['rows']}", f"transfer.micro_batch_size={g['rows']}", "transfer.eval_steps=100",
    ])  # fmt: skip
    plans = plan_transfer(size_of(read_config(name), config), config, Machine(), Work(transfer_tokens=20e6))
    plan = next(plan for plan in plans if plan.schedule == "stream")
    assert plan.peak / GIB == pytest.approx(found["peak_gpu_gib"], rel=0.1)
    assert plan.time / 3600 == pytest.approx(found["whole_run"]["hours"], rel=0.25)


def test_the_table_of_speeds_is_what_was_measured() -> None:
    values = script("plan_speeds").speeds(MEASURED, LARGE)
    assert len(values) == 9
    for name, value in values.items():
        assert getattr(Speeds(), name) == pytest.approx(value, rel=0.05), name


def llama(name: str, *settings: str, recipe: str = "paper-sinks") -> tuple[Size, Config]:
    config = load_config(recipe, settings)
    return size_of(read_config(name), config), config


def test_schedules_of_70b_on_one_gpu() -> None:
    size, config = llama("llama-3.1-70b", "transfer.micro_batch_size=1")
    assert size.total == pytest.approx(70.55e9, rel=1e-3)
    joint, stream, blocks = plan_transfer(size, config, Machine(), Work())
    assert "GPU memory" in joint.problems[0]
    assert not stream.problems
    assert stream.peak < 10 * GIB
    assert not blocks.problems
    chunk = int(stream.settings[0].split("=")[1])
    assert stream.host["hidden states of a chunk"] == 2 * 8192 * (chunk + 32 * 1024)
    assert stream.read == math.ceil(20e6 / chunk) * 2 * size.decoder + 2 * size.embedding
    assert blocks.disk["hidden states at two boundaries"] <= 2 * 2 * 8192 * 20e6
    assert stream.time == stream.seconds[stream.limit] >= max(stream.seconds.values())


def test_streaming_is_preferred_to_blocks_that_hardly_save_time() -> None:
    size, config = llama("llama-3.1-70b", recipe="paper-70b")
    joint, stream, blocks = plan_transfer(size, config, Machine(gpu_memory=141 * GIB), Work())
    assert blocks.schedule == "blocks of 80"
    assert joint.problems
    assert stream.time > blocks.time > stream.time / 1.02
    assert report.recommended([joint, stream, blocks]) == [stream]
    slower = replace(stream, seconds={"computing": 1.03 * blocks.time})
    assert report.recommended([joint, slower, blocks]) == [blocks]
    whole = replace(joint, problems=[], seconds=blocks.seconds)
    assert report.recommended([whole, stream, blocks]) == [whole], "it trains all layers together"


def test_slow_disks_are_named_as_the_limit() -> None:
    size, config = llama("llama-3.1-70b")
    work, slow = Work(block_size=10), Machine(read_speed=20e6)
    assert plan_transfer(size, config, slow, work)[1].limit == "reading"
    assert plan_transfer(size, config, slow, work)[2].limit == "reading and writing"
    assert plan_transfer(size, config, Machine(), work)[2].schedule == "blocks of 10"


def test_blocks_take_as_many_layers_as_fit() -> None:
    size, config = llama("llama-3.1-405b", "transfer.micro_batch_size=1")
    blocks = plan_transfer(size, config, Machine(), Work())[2]
    k = int(blocks.schedule.split()[-1])
    larger = plan_transfer(size, config, Machine(), Work(block_size=k + 1))[2]
    assert gpu_need(blocks.peak) <= 80 * GIB < gpu_need(larger.peak)
    assert report.paper_line(size, Work(), [blocks]).startswith("Hidden states on disk: the paper's blocks store")
    assert f"{2 * 20e6 * 16384 * 14 / 1e12:.2f} TB in blocks of 9" in report.paper_line(size, Work(), [blocks])


SHARDED = "sharded (FSDP2), recomputed"


def form(plans: list[Any], schedule: str) -> Any:
    return next(plan for plan in plans if plan.schedule == schedule)


def test_whole_models_where_they_fit_and_shards_where_not() -> None:
    """If one GPU holds the model, a whole copy on each GPU is faster than shards, as nothing is gathered."""
    size, config = llama("llama-3-8b", "finetune.micro_batch_size=4")
    plans = plan_finetune(size, config, Machine(gpus=2), Work())
    assert [plan.schedule for plan in plans] == [
        "whole on each GPU", "whole on each GPU, recomputed", "sharded (FSDP2)", SHARDED]  # fmt: skip
    whole, sharded = plans[0], plans[2]
    assert report.recommended(plans) == [whole]
    assert whole.settings == ["finetune.sharding=never"]
    single = plan_finetune(size, config, Machine(), Work())[0]
    assert whole.gpu == single.gpu
    assert whole.time == pytest.approx(single.time / 2, rel=0.01)
    assert sharded.gpu["weights"] == whole.gpu["weights"] / 2
    assert sharded.limit == "handling shards"
    large, config = llama("llama-3.1-70b", "finetune.micro_batch_size=1")
    plans = plan_finetune(large, config, Machine(gpus=8, host_memory=2**41), Work())
    assert {plan.schedule for plan in plans if not plan.problems} == {"sharded (FSDP2)", SHARDED}
    for asked, start in (("always", "sharded"), ("never", "whole")):
        config = load_config("paper-sinks", [f"finetune.sharding={asked}"])
        assert all(p.schedule.startswith(start) for p in plan_finetune(size, config, Machine(gpus=2), Work()))


@pytest.mark.parametrize(("recipe", "gib", "whole"), [
    ("paper-sinks", 16, False), ("paper-sinks", 24, True), ("paper-sinks", 40, True), ("paper", 16, False),
    ("paper", 24, True), ("paper-70b", 24, True),
])  # fmt: skip
def test_stage_2_shards_what_the_plan_says_does_not_fit(recipe: str, gib: int, whole: bool, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Its own rule is simpler; they agree on an 8B model."""
    read_config("llama-3-8b").save_pretrained(tmp_path)
    base, config = Base(str(tmp_path), "directory", ""), load_config(recipe)

    def holds(host: int) -> bool:
        monkeypatch.setattr(fits, "free_host_memory", lambda: host * GIB)
        return fits._fits(base, config, torch.device("cuda"), torch.bfloat16)

    properties = SimpleNamespace(total_memory=gib * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    machine = Machine(2, gib * GIB, 64 * GIB)
    plan = plan_finetune(size_of(read_config("llama-3-8b"), config), config, machine, Work())[0]
    assert plan.schedule.startswith("whole on each GPU")
    assert holds(64) == (not plan.problems) == whole
    assert not holds(16)  # cannot be loaded


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize(
    "part", ["stage 1", "stage 2", "stage 2, sharded", "stage 2, sharded, larger", "large stage 2"]
)
def test_several_gpus_take_what_was_measured(part: str, gpus: int) -> None:
    """benchmarks/multi_gpu.py on four H100."""
    found = json.loads((ROOT / "benchmarks/results/multi_gpu.json").read_text())["parts"][part][str(gpus)]
    stage, large = "transfer" if part == "stage 1" else "finetune", part == "large stage 2"
    rows = {"stage 1": 8, "stage 2, sharded, larger": 12, "large stage 2": 2}.get(part, 4)
    size, config = llama(
        "llama-3.1-70b" if large else "llama-3-8b",
        f"{stage}.batch_size={4 * rows}", f"{stage}.micro_batch_size={rows}",
        f"finetune.sharding={'never' if part == 'stage 2' else 'always'}",
        f"finetune.gradient_checkpointing={str(large).lower()}",
    )  # fmt: skip
    plans = plan_transfer if stage == "transfer" else plan_finetune
    plan = plans(size, config, Machine(gpus, 79 * GIB, host_memory=2**50), Work())[0]
    if "missing" in found:
        assert plan.problems
        return
    assert not plan.problems
    assert plan.peak / GIB == pytest.approx(found["peak_gib"], rel=0.1)
    assert plan.tokens / plan.time == pytest.approx(found["tokens_per_second"], rel=0.1)


def test_more_gpus_share_weights_and_time() -> None:
    size, config = llama("llama-3.1-70b", "finetune.micro_batch_size=1")
    two, eight = (form(plan_finetune(size, config, Machine(gpus=n), Work()), SHARDED) for n in (2, 8))
    assert two.gpu["weights"] == 4 * eight.gpu["weights"] == size.total
    assert two.seconds["computing"] == pytest.approx(4 * eight.seconds["computing"], rel=1e-3)
    assert two.gpu["LoRA, gradients, Adam"] == eight.gpu["LoRA, gradients, Adam"]
    assert eight.gpu["gathered layers or logits"] > 0
    assert eight.seconds["gathering"] > two.seconds["gathering"] / 4
    waiting = eight.seconds["computing, waiting for shards"] - eight.seconds["computing"]
    assert waiting == pytest.approx(eight.seconds["gathering"] / 2)
    roomy = load_config("paper-sinks", ["finetune.batch_size=16"])
    nodes = form(plan_finetune(size, roomy, Machine(gpus=16), Work()), SHARDED)
    assert nodes.limit == "gathering"  # the network between nodes


def test_gpus_without_rows_do_not_help() -> None:
    size, config = llama("llama-3.1-70b", "transfer.micro_batch_size=1")
    four, six, eight, many = (
        plan_transfer(size, config, Machine(gpus=n, host_memory=2**43), Work())[1].seconds["computing"]
        for n in (4, 6, 8, 24)
    )
    assert four == pytest.approx(six, rel=0.01)  # two of eight rows each
    assert four == pytest.approx(2 * eight, rel=0.02)
    assert eight == pytest.approx(many, rel=0.2)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    size, config = llama("llama-3.1-405b", "finetune.micro_batch_size=1")
    machine = Machine(gpus=8)
    plans = plan_finetune(size, config, machine, Work())
    text = report.refusal(plans, size, config, machine, Work())
    assert "Stage 2 does not fit in any form" in text
    assert "It would fit on 16 such GPUs" in text
    enough = Machine(gpus=16)
    roomy = load_config("paper-sinks", ["finetune.batch_size=16", "finetune.micro_batch_size=1"])
    assert not report.refusal(plan_finetune(size, roomy, enough, Work()), size, roomy, enough, Work())
    tiny = Machine(gpu_memory=GIB)
    assert "No number of such GPUs is enough" in report.refusal(
        plan_finetune(size, config, tiny, Work()), size, config, tiny, Work())  # fmt: skip
    assert "GiB of host memory and" in report.refusal(
        plan_transfer(size, config, tiny, Work()), size, config, tiny, Work())  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"), [("80GiB", 80 * GIB), ("3GB/s", 3e9), ("20M", 20e6), ("7", 7), ("1.5 TB", 1.5e12)]
)
def test_quantities(text: str, value: float) -> None:
    assert report.parse_quantity(text, "--x") == value


def test_memory_without_a_unit() -> None:
    with pytest.raises(LolcatsError, match=r"--gpu-memory 80 is 80 bytes: give a unit, such as 80GiB"):
        report.parse_quantity("80", "--gpu-memory", least=1e6)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_command_line(model_dirs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    done = run("llama-3-8b", "--recipe", "paper-sinks", "--gpus", "2", "--set", "transfer.micro_batch_size=8")
    assert done.exit_code == 0, done.output
    words = ("joint", "stream", "blocks of 32", "sharded (FSDP2)", "whole on each GPU", "tokens/s",
             "feature maps, gradients, Adam", "finetune.sharding=never")  # fmt: skip
    for word in words:
        assert word in done.output
    assert "torchrun --nproc-per-node 2 --no-python lolcats transfer llama-3-8b" in done.output
    assert "--set transfer.micro_batch_size=8" in done.output
    small = ["--set", "attention.window_size=8", "--set", "data.sequence_length=32"]
    assert run(str(model_dirs["gemma3"]), *small).exit_code == 0
    done = run(str(model_dirs["gemma3"] / "config.json"), *small, "--recipe", "long")
    assert done.exit_code == 0
    assert "Times were measured with attention.feature_inputs=rotated" in done.output


def test_the_default_recipe() -> None:
    """Queries and keys of kept heads have no LoRA, and a window keeps no keys before RoPE. Without feature maps, one
    command does everything on one GPU, also if the model only fits in 4 bits. Several GPUs take one for each stage."""
    done = run("llama-3-8b")
    assert done.exit_code == 0, done.output
    assert "lolcats select llama-3-8b --out selection.yaml --budget 0.125" in done.output
    assert (
        "lolcats linearize llama-3-8b --data DATA --out DIR --recipe default --selection selection.yaml" in done.output
    )
    for absent in ("stage 1", "feature maps", "lolcats transfer", "lolcats finetune", "the paper's blocks"):
        assert absent not in done.output
    large, several = run("llama-3.1-70b", "--gpu-memory", "139GiB"), run("llama-3-8b", "--gpus", "2")
    assert "lolcats linearize llama-3.1-70b" in large.output
    assert "finetune.quantize_base=nf4" in large.output
    assert "All of it takes about" in large.output
    assert "lolcats transfer" in several.output
    assert "lolcats finetune DIR" in several.output
    for other, absent in ((large, "transfer"), (several, "| stage 1")):
        assert other.exit_code == 0, other.output
        assert absent not in other.output
    window = 32 * 7 * (2 * 256 + 4) * 2 * 128 * 2 / 2**20
    assert f"a sequence takes {window:.2f} MiB and 16 KiB a token" in " ".join(done.output.split())


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["nowhere/at-all"], "Cannot load a configuration from"),
    (["llama-3-8b", "--recipe", "paper-sinks", "--gpus", "3"], "3 GPUs cannot share equally. Use 1, 2, 4, 8 GPUs"),
    (["llama-3-8b", "--gpus", "0"], "gpus must be above 0"),
    (["llama-3-8b", "--tokens", "many"], "--tokens many: expected a quantity"),
    (["llama-3.1-70b", "--gpu-memory", "30GiB"], "In 4 bits, stage 2 fits on one GPU with"),
    (["llama-3.1-405b", "--recipe", "paper-sinks", "--host-memory", "1TiB"], "It would fit on 16 such GPUs"),
    (["llama-3-8b", "--disk", "1GB"], "disk: needs"),
])  # fmt: skip
def test_bad_input_is_a_sentence(arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert sentence in done.output
    assert "Traceback" not in done.output


def test_models_that_are_not_decoders_are_refused() -> None:
    from transformers import BertConfig

    with pytest.raises(LolcatsError):
        size_of(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), Config())
