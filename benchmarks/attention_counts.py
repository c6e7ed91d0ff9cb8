"""What each attention kernel moves and computes per token, by its tiles: the table of docs/theory/kernels.md.

    python benchmarks/attention_counts.py

Geometry of one Llama-3-8B layer: 32 query and 8 kv heads of 128, f = 64, a terraced window of 64, sinks, bf16. Products
are counted as they are executed, masked keys and padded sinks included.
"""

from dataclasses import dataclass

H, G, D, F = 32, 8, 128, 64
KEYS, SINKS, TILE = 128, 16, 64  # keys that a tile of queries reads; sinks are padded to 16
BYTES, OPERATIONS = 4.3e12, 790e12  # a second: an H200's copy and bf16 product
HEAD = 2 * D  # bytes of one head's vector
PRODUCT = 4 * F  # bytes of one head's x·W in fp32
WEIGHT = 4 * D * F // TILE  # bytes per token of a map's weights in fp32, read for every tile
STATE = 2 * F * HEAD // TILE  # bytes per token of a state, both halves in bf16, of every tile
TABLE = 2 * D  # bytes per token of cosines and sines, in fp16, of every pair of channels


@dataclass(frozen=True)
class Count:
    """Of one kernel, per token: bytes of device memory, bytes that multiprocessors read, operations."""

    name: str
    memory: float
    read: float
    operations: float

    def cells(self) -> str:
        moved, computed = self.memory / BYTES * 1e9, self.operations / OPERATIONS * 1e9
        sizes = f"{self.memory / 1024:.1f} | {self.read / 1024:.1f} | {self.operations / 1e6:.2f}"
        return f"| {self.name} | {sizes} | {moved:.1f} | {computed:.1f} |"


def total(name: str, counts: list[Count]) -> Count:
    return Count(name, sum(c.memory for c in counts), sum(c.read for c in counts), sum(c.operations for c in counts))


def states(maps: int, stored: bool) -> Count:
    """Sums over keys: of whole segments, or before every tile."""
    operations = maps * (2 * D * F + 4 * F * D)
    name = "state kernel, every tile" if stored else "state kernel, sums of segments"
    return Count(name, 2 * G * HEAD + stored * maps * STATE, maps * 2 * HEAD, operations)


def outputs(maps: int) -> Count:
    memory = 2 * H * HEAD + 2 * G * HEAD + maps * STATE
    read = H * (HEAD + 2 * HEAD * KEYS // TILE + STATE)
    return Count("output kernel", memory, read, H * (2 * D * F + 4 * D * (KEYS + SINKS) + 4 * F * D))


def projected(name: str, heads: int, maps: int, turned: bool = False) -> Count:
    count = Count(f"projection of {name}", heads * HEAD + maps * PRODUCT, maps * HEAD, maps * 4 * D * F)
    return seen(count, *turning(maps)) if turned else count


def turning(programs: int) -> tuple[float, float, float]:
    """What turning back costs: the table, and two products and a sum for each channel."""
    return TABLE, programs * TABLE, programs * 3 * D


def seen(count: Count, memory: float, read: float, operations: float) -> Count:
    """A kernel with what it moves and computes besides, as maps see other vectors."""
    return Count(count.name, count.memory + memory, count.read + read, count.operations + operations)


def forward_seen(maps: int) -> list[Count]:
    """Maps before RoPE: W in two parts, inside."""
    sums = [seen(states(maps, stored), 0, 0, maps * 2 * D * F) for stored in (False, True)]
    return [*sums, seen(outputs(maps), H * HEAD, H * (HEAD + WEIGHT), H * 2 * D * F)]


def forward_turned(maps: int) -> list[Count]:
    """Maps before RoPE: q and k turned back on chip, W in two parts, inside."""
    *sums, output = forward_seen(maps)
    return [*(seen(x, *turning(maps)) for x in sums), seen(seen(output, -H * HEAD, 0, 0), *turning(H))]


def projected_states(maps: int) -> list[Count]:
    more = maps * PRODUCT - G * HEAD, maps * (PRODUCT - HEAD), -maps * 2 * D * F
    return [seen(states(maps, stored), *more) for stored in (False, True)]


def forward_projected(maps: int) -> list[Count]:
    """Maps before RoPE: x·W first."""
    output = seen(outputs(maps), H * PRODUCT, H * PRODUCT, -H * 2 * D * F)
    return [projected("queries", H, H), projected("keys", G, maps), *projected_states(maps), output]


def undone() -> list[Count]:
    """RoPE undone: q and k, and twice as much; 16-bit cosines and sines."""
    narrow = (H + G) * HEAD
    return [
        Count("forward", 3 * narrow + 4 * D, narrow + 4 * D, 6 * (H + G) * D),
        Count("backward", 3 * narrow + 4 * D, 2 * narrow + 4 * D, 8 * (H + G) * D),
    ]


def query_gradients(maps: int) -> Count:
    memory = 4 * H * HEAD + H * D + 2 * G * HEAD + maps * STATE
    read = H * (3 * HEAD + D + 2 * HEAD * KEYS // TILE + STATE)
    return Count("query kernel", memory, read, H * (4 * D * F + 4 * F * D + 6 * D * (KEYS + SINKS)))


def key_gradients(maps: int) -> Count:
    memory = 2 * H * HEAD + 4 * G * HEAD + maps * STATE
    read = G * 2 * HEAD + maps * STATE + H * 2 * HEAD * KEYS // TILE
    return Count("key kernel", memory, read, maps * (4 * D * F + 8 * F * D) + H * 8 * D * KEYS)


def query_states(maps: int, stored: bool) -> Count:
    """Sums over queries, for the gradients of keys."""
    name = "state kernel of queries, every tile" if stored else "state kernel of queries, sums of segments"
    read = H * 2 * HEAD
    return Count(name, 2 * H * HEAD + stored * maps * STATE, read, H * (2 * D * F + 4 * F * D))


def sink_gradients() -> Count:
    return Count("sink kernel", 2 * H * HEAD, H * 2 * HEAD, H * 8 * D * SINKS)


def backward_projected(maps: int, turned: bool) -> list[Count]:
    """Maps before RoPE: x·W again, and its gradient, from which that of x follows. turned: of q and k on chip."""
    more = H * (PRODUCT - HEAD), H * (PRODUCT - HEAD), -H * 2 * D * F
    return [
        projected("queries", H, H, turned), projected("keys", G, maps, turned), *projected_states(maps),
        seen(query_gradients(maps), 2 * H * PRODUCT, H * PRODUCT, -H * 4 * D * F),
        *(seen(query_states(maps, stored), *more) for stored in (False, True)), sink_gradients(),
        seen(key_gradients(maps), 2 * maps * PRODUCT, maps * PRODUCT, -maps * 4 * D * F),
        back("queries", H, H, turned), back("keys", G, maps, turned), *([] if turned else [joined()]),
    ]  # fmt: skip


def back(name: str, heads: int, maps: int, turned: bool) -> Count:
    """From the gradient of x·W to that of x, in tensors of its own or added to that of q or k."""
    count = Count(
        f"gradient of x, {name}", maps * PRODUCT + heads * HEAD, maps * PRODUCT, maps * 4 * D * F
    )  # fmt: skip
    return seen(seen(count, heads * HEAD, heads * HEAD, 0), *turning(heads)) if turned else count


def joined() -> Count:
    """PyTorch puts the gradients of both halves of q and k side by side."""
    return Count("gradients joined", 4 * (H + G) * HEAD, 2 * (H + G) * HEAD, 0)


def tables() -> dict[str, list[Count]]:
    found = {}
    for maps, name in ((G, "key maps per kv head"), (H, "key maps per query head")):
        stored = [states(maps, stored=False), states(maps, stored=True)]
        found[f"Forward, {name}"] = [*stored, outputs(maps)]
        found[f"Forward, maps before RoPE, {name}"] = forward_seen(maps)
        found[f"Forward, maps before RoPE, on chip, {name}"] = forward_turned(maps)
        found[f"Forward, maps before RoPE, x·W first, {name}"] = forward_projected(maps)
        found[f"Backward, {name}"] = [
            *stored, query_gradients(maps), query_states(maps, stored=False), query_states(maps, stored=True),
            sink_gradients(), key_gradients(maps),
        ]  # fmt: skip
        found[f"Backward, maps before RoPE, {name}"] = backward_projected(maps, turned=False)
        found[f"Backward, maps before RoPE, on chip, {name}"] = backward_projected(maps, turned=True)
    found["RoPE undone"] = undone()
    return found


def report() -> str:
    lines = [
        "| | memory, KB | read by processors, KB | MFLOP | ns by memory | ns by products |",
        "|---|---|---|---|---|---|",
    ]
    for name, counts in tables().items():
        lines += [total(f"**{name}**", counts).cells(), *(count.cells() for count in counts)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(report(), end="")
