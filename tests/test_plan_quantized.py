"""lolcats plan: models in 4 bits on one GPU, and the search for heads to keep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.scripts import script
from test_plan import LARGE, llama, run

from lolcats.plan import Machine, Speeds, Work, plan_finetune
from lolcats.plan import quantized as quantized_plan
from lolcats.plan.costs import GIB
from lolcats.selection import Settings
from lolcats.selection.search import grow


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_in_4_bits_take_what_bitsandbytes_takes(layers: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(1024, layers * 512)
    quantized = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    state = quantized.to("cpu").quant_state
    taken = quantized.data.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert taken == pytest.approx(quantized_plan.NF4_BYTES * weight.numel(), rel=1e-3)


@pytest.mark.parametrize("each", [2, 3])
@pytest.mark.parametrize("count", [1, 8, 9, 80, 81, 126])
def test_rounds_of_a_search_are_those_that_are_counted(count: int, each: int) -> None:
    class Counting:
        """Scores nothing, and counts what each call costs, in passes through all layers."""

        passes = 0.0

        def move_to(self, heads: Any) -> None:
            self.passes += 1

        def slopes(self, shares: Any) -> Any:
            self.passes += each
            return 0.0, dict.fromkeys(units, 0.0)

        def losses(self, sets: Any) -> list[float]:
            self.passes += 0.5 * len(sets)
            return [0.0] * len(sets)

    units: Any = [(layer, head) for layer in range(80) for head in range(8)]
    scorer: Any = Counting()
    found = grow(scorer, [], [(unit,) for unit in units], count, Settings().width, lambda _: None)
    expected = scorer.passes + len(found) + 6  # right answers of each point, and what comes before the search
    assert quantized_plan.passes_of_search(count, each) == expected


@pytest.mark.parametrize("count", [1, 8, 9, 16, 80, 126])
def test_passes_over_the_weights_are_those_that_are_counted(count: int) -> None:
    class Streamed:
        """Scores nothing, and counts how often the layers come: see ``StreamedScorer``."""

        streams, at = 0.0, None

        def move_to(self, heads: Any) -> float:
            self.streams += frozenset(heads) != self.at
            self.at = frozenset(heads)
            return 0.0

        def slopes(self, shares: Any) -> Any:
            self.move_to(shares)
            self.streams += 1
            return 0.0, dict.fromkeys(units, 0.0)

        def losses(self, sets: Any) -> list[float]:
            if len(sets) == 1:
                return [self.move_to(sets[0])]
            self.streams += 1
            return [0.0] * len(sets)

    units: Any = [(layer, head) for layer in range(126) for head in range(8)]
    scorer: Any = Streamed()
    grow(scorer, [], [(unit,) for unit in units], count, Settings().width, lambda _: None)
    assert quantized_plan.streams_of_search(count) == scorer.streams + 4


def test_70b_in_4_bits_takes_what_was_measured() -> None:
    """Every part of benchmarks/large.py on an H200: stage 2 in each form, both searches, stage 1 in each turn."""
    large = script("large")
    plan, compared = large.planned(large.MODELS[LARGE["model"]], large.GIB), 0
    for name, part in LARGE["parts"].items():
        if "missing" in part or name == "build":
            continue
        found, said = part.get("whole_run", part), plan.get(name) or plan[name.partition(",")[0]]
        speed = "tokens_per_second" if "tokens_per_second" in found else "seconds"
        assert said[speed] == pytest.approx(found[speed], rel=0.1), name
        assert said["gib"] == pytest.approx(part.get("peak_gib", part.get("peak_gpu_gib")), rel=0.1), name
        compared += 1
    assert compared == 11


def test_a_search_records_on_the_gpu_if_it_has_room_twice() -> None:
    """And it halves the tokens that pass at once until they fit, as ``lolcats select`` does."""
    size, config = llama("llama-3.1-70b", recipe="paper-70b")
    plans = {
        (gib, form): quantized_plan.search(size, config, Machine(gpu_memory=gib * GIB), (1024, 2048), form)
        for gib in (24, 48, 80, 139)
        for form in quantized_plan.FORMS[1:]
    }
    recorded = 2 * 80 * 14336 * 8192
    roomy = [(48, "streamed"), (80, "streamed"), (139, "4 bits"), (139, "streamed")]  # 80: not beside the slopes
    for key, plan in plans.items():
        place, other = (plan.gpu, plan.host) if key in roomy else (plan.host, plan.gpu)
        assert place["hidden states"] == recorded
        assert "hidden states" not in other
    large, small = plans[139, "4 bits"], plans[48, "4 bits"]
    assert large.gpu["inputs of layers, for slopes"] == 6 * small.gpu["inputs of layers, for slopes"]
    more = 204.5 * (7 - 2) * quantized_plan.dequantized_bytes(size) / Speeds().dequantize
    assert small.seconds["computing"] - large.seconds["computing"] == pytest.approx(more)
    kept = [plan.host["kept free"] for (_, form), plan in plans.items() if form == "streamed"]
    assert kept == [8 * GIB, *[8 * GIB + recorded] * 3]
    assert not plans[80, "4 bits"].problems


def test_70b_on_one_gpu_has_a_path() -> None:
    """Select, stage 1 layer by layer, stage 2 in 4 bits, export: for the GPU sizes there are."""
    none, config = llama("llama-3.1-70b", recipe="paper-70b")
    assert quantized_plan.nf4_bytes(none) == pytest.approx(39.5e9, rel=0.01)
    (export,) = quantized_plan.plan_export(none, Machine())
    assert sum(export.host.values()) < 24 * GIB
    settings: dict[int, list[list[str]]] = {}
    for gib, enough in ((24, False), (48, True), (80, True), (141, True)):
        machine = Machine(gpu_memory=gib * GIB)
        plans = quantized_plan.plan_quantized(none, config, machine, Work(8e6, 8e6))
        assert [not plan.problems for plan in plans] == [enough, enough]
        assert bool(quantized_plan.what_would_fit(plans)) != enough
        assert plans[1].time > plans[0].time
        searches = quantized_plan.plan_select(none, config, machine)
        form = "4 bits" if enough else "streamed"
        assert all(form in plan.schedule for plan in searches)
        assert quantized_plan.chosen_search(searches)
        settings[gib] = [plan.settings[1:] for plan in plans]
    again, rows = "finetune.gradient_checkpointing", "finetune.micro_batch_size"
    assert settings[48] == [[f"{again}=true", f"{rows}=2"]] * 2
    assert settings[80] == [[f"{again}=false", f"{rows}=2"]] * 2, "all activations of two rows fit"
    assert settings[141] == [[f"{again}=false", f"{rows}=4"]] * 2
    assert plans[0].peak < 120 * GIB
    taught = replace(config, finetune=replace(config.finetune, loss="kl"))
    (only,) = quantized_plan.plan_quantized(none, taught, machine, Work(8e6, 8e6))
    assert (only.schedule, only.time, only.peak) == ("4 bits, KL loss", plans[1].time, plans[1].peak)
    small = Machine(gpu_memory=24 * GIB)
    (streamed,) = quantized_plan.chosen_search(quantized_plan.plan_select(none, config, small))
    assert streamed.settings == ["--lengths 1024,2048,4096", "--schedule stream"]
    assert streamed.time <= quantized_plan.PATIENCE
    assert streamed.peak < 16 * GIB
    assert streamed.host["weights that are kept"] > 60 * GIB
    little = quantized_plan.search(none, config, replace(small, host_memory=32 * GIB), (1024, 2048), "streamed")
    assert little.host["weights that are kept"] == 0
    assert little.read == pytest.approx(2.0 * none.total + 59 * 2.0 * none.decoder)
    assert little.limit == "reading"
    (search,) = quantized_plan.chosen_search(searches)
    assert search.time <= quantized_plan.PATIENCE
    assert not quantized_plan.plan_quantized(none, config, Machine(gpus=2), Work())
    eight, other = llama("llama-3-8b")
    assert not any("4 bits" in plan.schedule for plan in quantized_plan.plan_select(eight, other, Machine()))


def test_gradient_checkpointing_that_a_run_decides_on_is_planned_both_ways() -> None:
    size, config = llama("llama-3-8b", "finetune.gradient_checkpointing=auto")
    _, plain = llama("llama-3-8b")
    plans = plan_finetune(size, config, Machine(), Work())
    assert [(plan.schedule, plan.time, plan.peak) for plan in plans] == [
        (plan.schedule, plan.time, plan.peak) for plan in plan_finetune(size, plain, Machine(), Work())
    ]
    (again,) = plan_finetune(size, llama("llama-3-8b", "finetune.gradient_checkpointing=true")[1], Machine(), Work())
    assert plans[1] == again


def test_a_budget_of_heads_is_planned_with_its_search() -> None:
    paper = ("--recipe", "paper-sinks")
    done = run("llama-3-8b", *paper, "--set", "attention.softmax_budget=0.125", "--set", "finetune.rank=4")
    assert done.exit_code == 0, done.output
    assert "lolcats select llama-3-8b --out selection.yaml --budget 0.125 --beyond 1 --lengths" in done.output
    (transfer,) = [line for line in done.output.splitlines() if line.startswith("lolcats transfer")]
    assert "--selection selection.yaml" in transfer
    assert "--set finetune.rank=4" in transfer
    assert transfer.count("softmax_budget") == transfer.count("--set attention.softmax_budget=0") == 1
    assert "The time of export is an estimate: it was never measured." in done.output
    assert "for the keys of kept heads" in done.output
    plain = run("llama-3-8b", *paper).output
    assert "lolcats select" not in plain
