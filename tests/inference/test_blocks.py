"""Blocks go to those who need them, are shared by forks, and come back."""

from __future__ import annotations

import random

import pytest

from lolcats.inference.engine.blocks import Blocks, OutOfBlocks, Table


def test_a_table_takes_blocks_as_it_grows_and_gives_them_back_at_its_end() -> None:
    pool = Blocks(4, 8)
    table = Table(pool)
    assert table.lacking(0) == 0
    assert [table.lacking(n) for n in (1, 8, 9, 32)] == [1, 1, 2, 4]
    assert table.reserve(9) is None
    table.length = 9
    assert (pool.free, pool.held, table.lacking(7), table.lacking(8)) == (2, 2, 0, 1)
    del table
    assert pool.free == 4


def test_too_few_blocks_change_nothing() -> None:
    pool = Blocks(2, 8)
    table = Table(pool)
    table.reserve(8)
    table.length = 8
    with pytest.raises(OutOfBlocks, match="2 blocks of keys are needed, and 1 are free"):
        table.reserve(16)
    assert (len(table.blocks), pool.free) == (1, 1)
    table.reserve(8)


def test_forks_share_full_blocks_and_copy_a_partly_filled_one_before_they_write() -> None:
    pool = Blocks(6, 4)
    first = Table(pool)
    first.reserve(12)  # more than it has tokens for: a fork takes only what is filled
    first.length = 6
    fork = first.fork()
    other = first.fork()
    assert fork.blocks == other.blocks == first.blocks[:2]
    assert pool.free == 3
    assert fork.lacking(1) == 1
    source, target = fork.reserve(1) or (None, None)
    assert (source, target) == (first.blocks[1], fork.blocks[1])
    assert fork.blocks[0] == first.blocks[0]
    assert first.reserve(1) is not None  # the other fork still holds it
    assert other.reserve(1) is None  # nobody else does any more
    assert len({first.blocks[1], fork.blocks[1], other.blocks[1]}) == 3
    assert first.fork().reserve(0) is None
    del first, other
    assert pool.free == 4
    assert pool.holders.count(1) == 2


def test_a_full_last_block_is_shared_without_a_copy() -> None:
    pool = Blocks(3, 4)
    first = Table(pool)
    first.reserve(4)
    first.length = 4
    fork = first.fork()
    assert fork.reserve(1) is None
    assert fork.blocks[0] == first.blocks[0]
    assert pool.free == 1


def change(rng: random.Random, pool: Blocks, tables: list[Table]) -> None:
    """Make, fork, grow or end one of the tables."""
    action = rng.random()
    if action < 0.3 or not tables:
        tables.append(rng.choice(tables).fork() if tables and rng.random() < 0.6 else Table(pool))
    elif action < 0.5:
        tables.pop(rng.randrange(len(tables)))
    else:
        table, tokens, free = rng.choice(tables), rng.randint(1, 9), pool.free
        lacking = table.lacking(tokens)
        if lacking <= free:
            table.reserve(tokens)
            table.length += tokens
            assert pool.free == free - lacking


def test_no_block_is_lost_or_given_twice() -> None:
    rng, pool, tables = random.Random(0), Blocks(40, 4), list[Table]()
    for _ in range(3000):
        change(rng, pool, tables)
        held = [block for table in tables for block in table.blocks]
        assert pool.free == 40 - len(set(held))
        assert pool.holders == [held.count(block) for block in range(40)]
        for place in range(len(tables)):  # what a table may write into next is its own
            if tables[place].length % 4 and not tables[place].lacking(1):
                assert pool.holders[tables[place].blocks[tables[place].length // 4]] == 1
    tables.clear()
    assert pool.free == 40
