"""Attention transfer on several gloo processes equals that on one, also if a rank dies and another number continues."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import SETTINGS, tiny_model
from safetensors.torch import load_file
from support.rank_worker import Task, train, work
from support.ranks import forked, free_port

from lolcats.ranks import Ranks

ORDERS = ("joint", "stream", "blocks")
PER_LAYER = [
    *SETTINGS, "transfer.coupling=per_layer", "transfer.max_steps=6", "transfer.batch_size=8",
    "transfer.micro_batch_size=4", "transfer.eval_steps=2", "transfer.save_steps=2",
    "transfer.schedule=reduce_on_plateau", "transfer.chunk_tokens=700", "transfer.block_size=2",
    "transfer.xent_weight=0.5", "seed=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_model(num_hidden_layers=3).save_pretrained(path)
    return path


def settings(order: str, *changes: str) -> list[str]:
    return [*PER_LAYER, f"transfer.order={order}", *changes]


def launch(ranks: int, model: Path, tasks: Sequence[Task]) -> list[int | None]:
    """Start processes as torchrun would, and return their exit codes."""
    context, port = forked(), free_port()
    processes = [context.Process(target=work, args=(rank, ranks, port, model, tasks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in processes]


def assert_close(found: Path, expected: dict[str, torch.Tensor]) -> None:
    """Equal up to the order of sums."""
    maps = load_file(found / "maps.safetensors")
    assert set(maps) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(maps[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def said(out: Path, ranks: int) -> list[str]:
    return [(out / f"{rank}.txt").read_text() for rank in range(ranks)]


def test_shares() -> None:
    for size in (1, 2, 3, 4, 9):
        shares = [Ranks(rank, size).share(range(10, 17)) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(10, 17))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_two_ranks_agree_or_report_how_they_differ(model: Path, tmp_path: Path) -> None:
    tasks = [
        Task(tmp_path / "differ", settings("stream"), different="transfer.learning_rate=0.3"),
        Task(tmp_path / "few", settings("stream", "transfer.batch_size=1", "transfer.micro_batch_size=1")),
        Task(tmp_path / "same", settings("stream")),
    ]
    assert launch(2, model, tasks) == [0, 0]
    for text in said(tmp_path / "differ", 2):
        assert text.startswith("The ranks disagree: transfer.learning_rate is 0.01 on rank 0 and 0.3 on rank 1.")
    assert not list((tmp_path / "differ").rglob("*.safetensors"))
    for text in said(tmp_path / "few", 2):
        assert text.startswith("transfer.batch_size (1) is below the number of ranks (2)")
    assert_close(tmp_path / "same", train(model, Task(tmp_path / "one", settings("stream"))))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_same_as_one(ranks: int, model: Path, tmp_path: Path) -> None:
    """In every order, with all layers coupled, with kept heads, and with rows of several documents. On four ranks, a
    last batch of six rows and five validation rows give some ranks fewer rows than others."""
    tasks = [Task(tmp_path / order, settings(order)) for order in ORDERS]
    coupled = settings("joint", "transfer.coupling=joint", "transfer.micro_batch_size=2")
    kept = "attention.softmax_heads={0: [1], 2: [0]}"
    tasks += [Task(tmp_path / f"kept {order}", settings(order, kept)) for order in ("stream", "blocks")]
    tasks += [Task(tmp_path / "coupled", coupled), Task(tmp_path / "apart", settings("stream"), apart=True)]
    assert launch(ranks, model, tasks) == [0] * ranks
    expected = train(model, Task(tmp_path / "one", settings("joint")))
    for order in ORDERS:
        assert_close(tmp_path / order, expected)
    alone = Task(tmp_path / "alone", coupled)
    assert_close(tmp_path / "coupled", train(model, alone))
    expected = train(model, Task(tmp_path / "one kept", settings("joint", kept)))
    for order in ("stream", "blocks"):
        assert_close(tmp_path / f"kept {order}", expected)
    assert_close(tmp_path / "apart", train(model, Task(tmp_path / "one apart", settings("joint"), apart=True)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_lost_rank_and_another_number_of_ranks(order: str, model: Path, tmp_path: Path) -> None:
    """A rank is killed in two runs in a row, the second on more ranks; the third, on one, finishes."""
    out = tmp_path / "out"
    for ranks, die in ((2, (1, 4)), (3, (0, 2))):
        codes = launch(ranks, model, [Task(out, settings(order), die=die)])
        assert codes[die[0]] == -9
        others = [rank for rank in range(ranks) if rank != die[0]]
        assert {codes[rank] for rank in others} == {1}
        for rank in others:
            assert (out / f"{rank}.txt").read_text().startswith("Another rank was lost")
    maps = train(model, Task(out, settings(order)))
    expected = train(model, Task(tmp_path / "one", settings(order)))
    for name, tensor in expected.items():
        torch.testing.assert_close(maps[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["joint", "stream", "blocks"])
def test_killed_at_any_moment(order: str, model: Path, tmp_path: Path) -> None:
    """SIGKILL at arbitrary moments, repeated until a run finishes."""
    changes = settings(order, "transfer.max_steps=120", "transfer.save_steps=3", "transfer.early_stopping_patience=0")
    expected = train(model, Task(tmp_path / "a", changes))
    rng, kills, task = random.Random(0), 0, Task(tmp_path / "b", changes)
    for attempt in range(40):
        process = forked().Process(target=work, args=(0, 1, 0, model, [task]))
        process.start()
        process.join(rng.uniform(0.2, 0.9) if attempt < 6 else 120)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 3
    maps = load_file(tmp_path / "b" / "maps.safetensors")
    assert [n for n in expected if not torch.equal(maps[n], expected[n])] == []
