"""Blocks of tokens in a memory of fixed size: which are free, how many hold each, and which ones a sequence has.

Pure bookkeeping: the memory itself is in :mod:`.kept`. A sequence's keys of all layers lie in blocks of the same
numbers, so that one table serves them all.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Sequence

from lolcats.errors import LolcatsError

VERSIONS = itertools.count(1)


class OutOfBlocks(LolcatsError):
    """Fewer blocks are free than are needed."""


class Blocks:
    """Blocks 0 .. count − 1 of ``size`` tokens each; a block is free if nobody holds it."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.holders = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._dropped: deque[Sequence[int]] = deque()

    @property
    def free(self) -> int:
        self._settle()
        return len(self._free)

    @property
    def held(self) -> int:
        """Blocks in use when the engine last looked. May be read from any thread."""
        return self.count - len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens fill, the last one perhaps partly."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        """Hold ``count`` free blocks.

        Raises:
            OutOfBlocks: fewer are free; none is taken.
        """
        if count > self.free:
            raise OutOfBlocks(f"{count} blocks of keys are needed, and {self.free} are free.")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.holders[block] = 1
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold blocks that others hold already."""
        for block in blocks:
            self.holders[block] += 1

    def is_shared(self, block: int) -> bool:
        self._settle()
        return self.holders[block] > 1

    def drop(self, blocks: Sequence[int]) -> None:
        """Stop holding blocks. May be called from any thread, as Python may end a table's life in any."""
        self._dropped.append(blocks)

    def _settle(self) -> None:
        while self._dropped:
            for block in self._dropped.popleft():
                self.holders[block] -= 1
                if not self.holders[block]:
                    self._free.append(block)


class Table:
    """The blocks of one sequence in order, which go back when nothing refers to the table any more.

    Forks share blocks. Only the last one can be partly filled; it is copied before a sequence writes into a shared one.
    """

    def __init__(self, pool: Blocks, blocks: list[int] | None = None, length: int = 0) -> None:
        self.pool, self.blocks, self.length = pool, blocks if blocks is not None else [], length
        """``length``: tokens whose keys are in the blocks."""
        self.version = next(VERSIONS)
        """Another number whenever the blocks are others, and in no two tables the same."""
        weakref.finalize(self, pool.drop, self.blocks).atexit = False

    def fork(self) -> Table:
        """Another sequence that begins with the same tokens."""
        shared = self.blocks[: self.pool.needed(self.length)]
        self.pool.hold(shared)
        return Table(self.pool, shared, self.length)

    def lacking(self, tokens: int) -> int:
        """Blocks that have to be free for ``tokens`` more."""
        return self._added(tokens) + (tokens > 0 and self._shares_last())

    def reserve(self, tokens: int) -> tuple[int, int] | None:
        """Make room for ``tokens`` more.

        Returns:
            The block to copy and the one to copy it to, if the last one is shared.

        Raises:
            OutOfBlocks: fewer are free than are lacking; nothing has changed.
        """
        copied = tokens > 0 and self._shares_last()
        new, copy = self.pool.take(self._added(tokens) + copied), None
        if copied:
            place = self.length // self.pool.size
            copy = self.blocks[place], new.pop()
            self.blocks[place] = copy[1]
            self.pool.drop([copy[0]])
        self.blocks += new
        if new:
            self.version = next(VERSIONS)
        return copy

    def _added(self, tokens: int) -> int:
        return max(0, self.pool.needed(self.length + tokens) - len(self.blocks))

    def _shares_last(self) -> bool:
        """Whether the next token's block is partly filled and somebody else's as well."""
        place, filled = divmod(self.length, self.pool.size)
        return bool(filled) and self.pool.is_shared(self.blocks[place])
