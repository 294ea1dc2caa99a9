"""Benchmarks run from a checkout without importing anything from tests/."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported_names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_no_benchmark_imports_from_tests_or_changes_the_path() -> None:
    test_modules = {path.stem for path in (ROOT / "tests").rglob("*.py")} - {"__init__"}
    paths = list((ROOT / "benchmarks").rglob("*.py"))
    assert len(paths) > 30
    for path in paths:
        source = path.read_text(encoding="utf-8")
        assert not {"tests", *test_modules} & set(imported_names(source)), path
        assert "sys.path" not in source, path
