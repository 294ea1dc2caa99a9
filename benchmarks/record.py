"""What every benchmark shares: goals, the printed table, and the JSON file that is committed.

    rows = [{"case": "numpy", "cpu_ms": 12.1}, …]
    goals = [Goal("cpu per 100 MB", value=41.0, target=60.0, better="lower")]
    print_table(rows)
    print_goals(goals)
    write_result("speed-store", goals, rows, options.json)

A goal that is missed is written as missed. The machine is described by its size alone: results are
published.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "apecache",
    "numpy",
    "zarr",
    "torch",
    "timm",
    "transformers",
    "blake3",
    "google-crc32c",
    "faiss-cpu",
)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`met` compares `value` with `target`; reaching it exactly is enough. NaN never meets a
    goal."""

    name: str
    value: float
    target: float
    better: Literal["lower", "higher"]

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.better == "lower" else self.value >= self.target

    def to_json(self) -> dict[str, Any]:
        value = self.value if self.value == self.value else None
        return {
            "name": self.name,
            "value": value,
            "target": self.target,
            "better": self.better,
            "met": self.met,
        }


def write_result(
    name: str,
    goals: Sequence[Goal],
    rows: Sequence[Mapping[str, Any]],
    path: Path | str | None = None,
) -> Path:
    """Write `benchmarks/results/<name>.json` (or `path`); returns where. `name` is
    `<area>-<benchmark>`."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    result = {
        "name": name,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "command": command(sys.argv),
        "goals": [goal.to_json() for goal in goals],
        "rows": [dict(row) for row in rows],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return target


def commit() -> str:
    """The checked-out commit, with `+` when tracked files differ from it; `unknown` outside a
    checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Size only: no host name, user or path."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "architecture": platform.machine(),
        "memory_gb": round(memory / 2**30, 1),
        "python": platform.python_version(),
    }


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of the packages that are installed."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command(arguments: Sequence[str]) -> str:
    """`python -m benchmarks.<area>.<name>` and its options, without those that only say where to
    write.

    The value of an option that is a path is shown by its last part.
    """
    script = Path(arguments[0]).resolve()
    folder = Path(__file__).resolve().parent
    module = (
        ".".join(("benchmarks", *script.relative_to(folder).with_suffix("").parts))
        if (script.is_relative_to(folder))
        else script.stem
    )
    shown: list[str] = []
    skip = False
    for argument in arguments[1:]:
        if skip or argument.startswith("--json="):
            skip = False
        elif argument == "--json":
            skip = True
        else:
            option, equals, value = argument.rpartition("=")
            shown.append(f"{option}{equals}{Path(value).name if '/' in value else value}")
    return " ".join(("python -m", module, *shown))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row, numbers to the right, columns in the order in which they first appear."""
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    numeric = [all(isinstance(row.get(name, 0), int | float) for row in rows) for name in names]
    for number, line in enumerate(cells):
        parts = (
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)
        )
        print("  ".join(parts).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def print_goals(goals: Sequence[Goal]) -> None:
    for goal in goals:
        sign = "<=" if goal.better == "lower" else ">="
        print(
            f"{'met   ' if goal.met else 'MISSED'}  {goal.name}: {_cell(goal.value)} ({sign} "
            f"{_cell(goal.target)})"
        )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
