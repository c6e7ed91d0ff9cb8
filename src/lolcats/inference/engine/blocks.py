"""Blocks of tokens in a memory of fixed size: which are free, how many hold each, and which ones a sequence has.

Pure bookkeeping: the memory itself is in :mod:`.kept`. Layers that see equally far back share a pool: a sequence's keys
of these layers lie in blocks of the same numbers, so that one table serves them all. If they see only a window, the
blocks that have wholly left it go back, or hold the next tokens of a prompt.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Sequence

from lolcats.errors import LolcatsError

VERSIONS = itertools.count(1)


class OutOfBlocks(LolcatsError):
    """Fewer blocks are free than are needed."""


class Blocks:
    """Blocks 0 .. count − 1 of ``size`` tokens each; a block is free if nobody holds it.

    Args:
        window: how many of the last keys a token sees, its own among them; 0 for all.
        piece: maximum number of tokens that a sequence adds at a time.
    """

    def __init__(self, count: int, size: int, window: int = 0, piece: int = 1) -> None:
        self.count, self.size, self.window, self.piece = count, size, window, piece
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

    def passed(self, tokens: int) -> int:
        """Blocks at the beginning of a sequence of so many tokens that no later token sees."""
        return max(0, tokens + 1 - self.window) // self.size if self.window else 0

    def added(self, before: int, tokens: int) -> int:
        """Blocks that ``tokens`` more take after ``before``: those that pass out of the window are used again."""
        added = self.needed(before + tokens) - self.needed(before)
        return min(added, self.needed(self.window - 1 + self.piece) + 1) if self.window else added

    def most(self, tokens: int) -> int:
        """Blocks that a sequence of up to ``tokens`` tokens holds at a time, and one for the copy that a fork makes.
        With a window, these are its own and those of the state that it goes on from."""
        whole = self.needed(tokens) + 1
        return min(whole, self.added(0, tokens) + self.needed(self.window - 1) + 2) if self.window else whole

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

    length: tokens so far. passed: blocks at the beginning that have gone back. blocks: those after them, of which some
    may be for tokens to come.
    """

    def __init__(self, pool: Blocks, blocks: list[int] | None = None, length: int = 0, passed: int = 0) -> None:
        self.pool, self.blocks, self.length, self.passed = pool, blocks if blocks is not None else [], length, passed
        self.expected = length
        """Tokens for which room was made."""
        self.version = next(VERSIONS)
        """Another number whenever there are new blocks, and in no two tables the same."""
        weakref.finalize(self, pool.drop, self.blocks).atexit = False

    def fork(self) -> Table:
        """Another sequence that begins with the same tokens."""
        shared = self.blocks[: self.pool.needed(self.length) - self.passed]
        self.pool.hold(shared)
        return Table(self.pool, shared, self.length, self.passed)

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
            place = self.length // self.pool.size - self.passed
            copy = self.blocks[place], new.pop()
            self.blocks[place] = copy[1]
            self.pool.drop([copy[0]])
        self.blocks += new
        self.expected = self.length + tokens
        if new or copied:
            self.version = next(VERSIONS)
        return copy

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` that are stored, and give back what no later token sees."""
        self.length += tokens
        while self.passed < self.pool.passed(self.length):
            block = self.blocks.pop(0)
            self.passed += 1
            if self._end < self.pool.needed(self.expected) and not self.pool.is_shared(block):
                self.blocks.append(block)
                self.version = next(VERSIONS)
            else:
                self.pool.drop([block])

    @property
    def _end(self) -> int:
        """The number of blocks with those that have gone back."""
        return self.passed + len(self.blocks)

    def _added(self, tokens: int) -> int:
        return max(0, self.pool.added(self._end * self.pool.size, self.length + tokens - self._end * self.pool.size))

    def _shares_last(self) -> bool:
        """Whether the next token's block is partly filled and somebody else's as well."""
        place, filled = divmod(self.length, self.pool.size)
        return bool(filled) and self.pool.is_shared(self.blocks[place - self.passed])


class Tables:
    """The tables of one sequence, one for each pool."""

    def __init__(self, each: Iterable[Table]) -> None:
        self.each = tuple(each)

    @property
    def length(self) -> int:
        return self.each[0].length

    def fork(self) -> Tables:
        """Another sequence that begins with the same tokens."""
        return Tables(table.fork() for table in self.each)

    def lacking(self, tokens: int) -> list[int]:
        """Blocks of each pool that have to be free for ``tokens`` more."""
        return [table.lacking(tokens) for table in self.each]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` that are stored."""
        for table in self.each:
            table.advance(tokens)
