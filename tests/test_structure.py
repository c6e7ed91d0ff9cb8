"""Dependencies point one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lolcats"
ORDER = (
    "errors", "memory", "config", "files", "ranks", "attention", "modeling", "run", "reference_import", "inference",
    "training", "inputs", "plan", "evaluation", "data_stats", "report", "pipeline", "sweep", "cli",
)  # fmt: skip


def parts_imported(path: Path) -> Iterator[str]:
    """First names below ``lolcats`` that a file imports, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in modules if name.startswith("lolcats."))


def test_every_part_imports_only_what_is_below_it() -> None:
    edges = set()
    for path in SOURCE.rglob("*.py"):
        own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if own != "__init__":
            edges |= {(own, other) for other in parts_imported(path) if other not in (own, "__version__")}
    assert {name for edge in edges for name in edge} == set(ORDER), "a new part: give it its place in ORDER"
    assert [edge for edge in sorted(edges) if ORDER.index(edge[1]) >= ORDER.index(edge[0])] == []
    assert {other for own, other in edges if own == "inference"} <= {"errors", "config", "attention", "modeling"}
