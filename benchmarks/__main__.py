"""Run benchmarks: `python -m benchmarks [AREA[.NAME]] [--quick] [--json FILE]`.

Without an area the benchmarks are listed. `speed` runs all of that area one after another,
`speed.fit` that one alone. Further options go to the benchmark as they are.
"""

import subprocess
import sys
from pathlib import Path

AREAS = ("speed", "quality", "reliability", "cost", "gpu")
HERE = Path(__file__).parent


def main() -> int:
    """Run what was asked for; the exit code is that of the first benchmark that failed."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        print("\n".join(benchmark_names()))
        return 0
    chosen = [name for name in benchmark_names() if is_named(name, arguments[0])]
    if not chosen:
        print(
            f"no benchmark {arguments[0]!r}; list them with: python -m benchmarks",
            file=sys.stderr,
        )
        return 2
    for name in chosen:
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments[1:]]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


def benchmark_names() -> list[str]:
    """Find the modules of all areas that are benchmarks: those with a `main`."""
    return [
        f"{area}.{path.stem}"
        for area in AREAS
        for path in sorted((HERE / area).glob("*.py"))
        if "def main(" in path.read_text(encoding="utf-8")
    ]


def is_named(name: str, request: str) -> bool:
    """Tell whether an area or a benchmark was asked for by this name."""
    return request in (name, name.partition(".")[0])


if __name__ == "__main__":
    sys.exit(main())
