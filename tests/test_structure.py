"""Dependencies point one way, file by file, as docs/architecture.md says. Imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lolcats"
OLD_PLACES = ("data_stats",)
"""Modules that only hand on what has moved, for one release."""
ORDER = (
    "errors", "version", "files", "tensors", "memory", "ranks", "ranges", "config", "attention", "weights", "modeling",
    "compared", "run", "data", "stages", "inference", "selection", "reference_import", "evaluation", "report",
    "pipeline", "plan", "lab", "cli", "vllm", *OLD_PLACES,
)  # fmt: skip
"""Each part may import only what stands before it."""


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in SOURCE.rglob("*.py")}


def imported(path: Path) -> Iterator[str]:
    """The project's modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in members]
        yield from (name for name in names if name in MODULES)


EDGES = {name: set(imported(path)) - {name} for name, path in MODULES.items()}


def part(module: str) -> str:
    """The part of the project that a module belongs to; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_its_place() -> None:
    assert {part(module) for module in MODULES} - {"", "recipes"} == set(ORDER), (
        "a new part: give it its place in ORDER"
    )


def test_files_import_only_from_parts_before_their_own() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in EDGES.items()
        for other in sorted(others)
        if part(module) and part(other) and part(module) != part(other)
        and ORDER.index(part(other)) > ORDER.index(part(module))
    ]  # fmt: skip
    assert wrong == []


def test_only_the_command_line_imports_plan_and_lab() -> None:
    users = {wing: {part(m) for m, others in EDGES.items() if wing in map(part, others)} for wing in ("plan", "lab")}
    assert users["plan"] <= {"plan", "lab", "cli"}
    assert users["lab"] <= {"lab", "cli", *OLD_PLACES}


def test_no_file_imports_itself_through_others() -> None:
    """An import of a package runs its __init__, so that counts as well."""

    def reached(start: str) -> set[str]:
        seen, left = set[str](), [start]
        while left:
            for other in EDGES[left.pop()] - seen:
                seen.add(other)
                left.append(other)
        return seen

    assert [module for module in MODULES if module in reached(module)] == []


def test_inference_stands_on_models_only() -> None:
    others = {part(other) for module, others in EDGES.items() if part(module) == "inference" for other in others}
    assert others <= {"errors", "version", "files", "memory", "config", "attention", "modeling", "inference"}


def test_the_vllm_plugin_stands_on_models_only() -> None:
    """It runs in an environment that has neither servers nor data. It stands last, so nothing imports it."""
    others = {part(other) for module, others in EDGES.items() if part(module) == "vllm" for other in others}
    assert others <= {"errors", "tensors", "config", "attention", "modeling", "vllm"}


def test_no_file_imports_the_package_itself() -> None:
    """It hands out what all parts have, so it stands on all of them."""
    assert [module for module, others in EDGES.items() if "lolcats" in others] == []
