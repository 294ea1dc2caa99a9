"""Faults: kills, power cuts, I/O errors, crowds of writers and damaged files, in the counts that
the store promises.

    python -m benchmarks.reliability.faults [--quick] [--json FILE]

The scenarios are those of `injection`, with more of everything; `--quick` takes the counts of the
tests. To add one, write a function that returns a `Row` and put it into `SCENARIOS`.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.record import Goal, print_goals, print_table, write_result
from benchmarks.reliability.injection import (
    damage,
    hostile,
    io_errors,
    kill,
    power,
    removals,
    writers,
)
from benchmarks.reliability.injection.tower import EDITED, SMALL, Towers, TowerSpec, run

SPEC = TowerSpec()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scenario: `faults` injected, `detail` in words, `broken` promises (the first one in
    `example`)."""

    scenario: str
    faults: int
    broken: int
    detail: str
    example: str = ""


@dataclass(frozen=True, kw_only=True)
class Bench:
    towers: Towers
    folder: Path
    quick: bool
    seed: int

    def count(self, quick: int, long: int) -> int:
        return quick if self.quick else long


def named_kills(bench: Bench) -> Row:
    result = kill.named_kills(bench.towers, bench.folder, SPEC)
    return _row(
        "kill -9 at named points",
        faults=result.kills,
        wrong=result.wrong,
        detail=f"{result.stores} stores finished",
    )


def random_kills(bench: Bench) -> Row:
    result = kill.random_kills(
        bench.towers,
        folder=bench.folder,
        spec=SPEC,
        count=bench.count(40, 500),
        seed=bench.seed,
    )
    return _row(
        "kill -9 at any moment",
        faults=result.kills,
        wrong=result.wrong,
        detail=f"{result.stores} stores finished, bit-identical",
    )


def power_cuts(bench: Bench) -> Row:
    result = power.cut_anywhere(
        bench.folder,
        SPEC,
        resumes=bench.count(120, -1),
        seed=bench.seed,
    )
    detail = f"{result.cuts} cuts, {result.resumed} states finished by another run"
    return _row("power cut at any call", faults=result.states, wrong=result.wrong, detail=detail)


def power_cuts_after_kills(bench: Bench) -> Row:
    spec = TowerSpec(images=5) if bench.quick else SMALL
    result = power.kill_then_cut(bench.folder, spec, everywhere=not bench.quick)
    return _row(
        "kill, resume, power cut",
        faults=result.states,
        wrong=result.wrong,
        detail=f"{result.resumed} kills, {result.cuts} cuts",
    )


def needless_fsyncs(bench: Bench) -> Row:
    """Each fsync left out in turn must break a promise."""
    needless = [
        name
        for number, name in enumerate(power.sync_calls())
        if not power.finds_violation(
            bench.folder / str(number),
            SMALL,
            power.without_sync(number),
        )
    ]
    tried = len(power.sync_calls())
    return _row(
        "fsync left out",
        faults=tried,
        wrong=needless,
        detail=f"{tried - len(needless)} of {tried} are needed",
    )


def failing_calls(bench: Bench) -> Row:
    result = io_errors.failing_calls(
        bench.folder,
        SMALL if bench.quick else SPEC,
        every=not bench.quick,
    )
    detail = ", ".join(f"{count} {op}" for op, count in sorted(result.failed.items()))
    return _row(
        "system call fails",
        faults=result.failed.total(),
        wrong=result.wrong,
        detail=detail,
    )


def crowds(bench: Bench) -> Row:
    spec = SMALL if bench.quick else SPEC
    result = writers.crowded_rounds(
        bench.towers,
        folder=bench.folder,
        spec=spec,
        rounds=bench.count(20, 200),
        seed=bench.seed,
    )
    detail = f"{writers.WRITERS} processes, {result.commits} commits, {result.killed} killed"
    return _row("several writers, rounds", faults=result.rounds, wrong=result.wrong, detail=detail)


def damaged_files(bench: Bench) -> Row:
    run(bench.folder / "store", SMALL)
    outcomes, wrong = damage.damages(
        bench.folder / "store",
        bench.count(500, 5000),
        bench.seed,
    )
    detail = ", ".join(f"{count} {what}" for what, count in outcomes.most_common())
    return _row("damaged file, then read", faults=outcomes.total(), wrong=wrong, detail=detail)


def hostile_files(bench: Bench) -> Row:
    result = hostile.hostile_files(bench.folder, bench.count(500, 5000), bench.seed)
    detail = ", ".join(
        f"{result.refused[kind]} of {count} {kind}s" for kind, count in sorted(result.tried.items())
    )
    return _row(
        "file made to do harm",
        faults=result.tried.total(),
        wrong=result.wrong,
        detail=f"refused: {detail}",
    )


def edit_kills(bench: Bench) -> Row:
    (bench.folder / "named").mkdir()
    (bench.folder / "random").mkdir()
    named = kill.named_kills(bench.towers, bench.folder / "named", EDITED)
    result = kill.random_kills(
        bench.towers,
        folder=bench.folder / "random",
        spec=EDITED,
        count=bench.count(20, 500),
        seed=bench.seed,
    )
    return _row(
        "kill -9 while a table is edited",
        faults=named.kills + result.kills,
        wrong=[*named.wrong, *result.wrong],
        detail=f"{named.stores + result.stores} stores finished, bit-identical",
    )


def edit_power_cuts(bench: Bench) -> Row:
    (bench.folder / "kill").mkdir()
    (bench.folder / "cut").mkdir()
    result = power.cut_anywhere(
        bench.folder / "cut",
        EDITED,
        resumes=bench.count(60, 2000),
        seed=bench.seed,
    )
    after = power.kill_then_cut(bench.folder / "kill", replace(EDITED, images=5))
    return _row(
        "power cut while a table is edited",
        faults=result.states + after.states,
        wrong=[*result.wrong, *after.wrong],
        detail=f"{result.cuts + after.cuts} cuts, {after.resumed} kills before",
    )


def edit_failing_calls(bench: Bench) -> Row:
    result = io_errors.failing_calls(bench.folder, EDITED, every=not bench.quick)
    detail = ", ".join(f"{count} {op}" for op, count in sorted(result.failed.items()))
    return _row(
        "system call fails while a table is edited",
        faults=result.failed.total(),
        wrong=result.wrong,
        detail=detail,
    )


def edit_crowds(bench: Bench) -> Row:
    result = writers.edited_rounds(
        bench.towers,
        folder=bench.folder,
        spec=EDITED,
        rounds=bench.count(6, 100),
        seed=bench.seed,
    )
    detail = f"{writers.WRITERS} processes, {result.commits} commits, {result.killed} killed"
    return _row("several editors, rounds", faults=result.rounds, wrong=result.wrong, detail=detail)


def removal_kills(bench: Bench) -> Row:
    result = removals.removal_kills(bench.towers, bench.folder, bench.count(9, 200), bench.seed)
    return _row(
        "kill -9 while views are removed",
        faults=result.faults,
        wrong=result.wrong,
        detail="views removed, then the store compacted",
    )


def removal_power_cuts(bench: Bench) -> Row:
    result = removals.removal_cuts(bench.folder, bench.count(12, 250), bench.seed)
    return _row(
        "power cut while views are removed",
        faults=result.states,
        wrong=result.wrong,
        detail=f"{result.cuts} cuts, {result.resumed} states finished by another run",
    )


def removal_failing_calls(bench: Bench) -> Row:
    result = removals.removal_errors(bench.folder, bench.count(40, 1))
    detail = ", ".join(f"{count} {op}" for op, count in sorted(result.kinds.items()))
    return _row(
        "system call fails while views are removed",
        faults=result.faults,
        wrong=result.wrong,
        detail=detail,
    )


SCENARIOS: tuple[Callable[[Bench], Row], ...] = (
    named_kills,
    random_kills,
    power_cuts,
    power_cuts_after_kills,
    needless_fsyncs,
    failing_calls,
    crowds,
    edit_kills,
    edit_power_cuts,
    edit_failing_calls,
    edit_crowds,
    removal_kills,
    removal_power_cuts,
    removal_failing_calls,
    damaged_files,
    hostile_files,
)


def _row(scenario: str, faults: int, wrong: list[str], detail: str) -> Row:
    return Row(
        scenario=scenario,
        faults=faults,
        broken=len(wrong),
        detail=detail,
        example=wrong[0][:200] if wrong else "",
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the counts of the tests: about two minutes",
    )
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument(
        "--only",
        default="",
        help="scenarios whose name contains this; writes no result without --json",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=random.SystemRandom().randrange(10**6),
        help="default: another each time",
    )
    options = parser.parse_args()
    rows = []
    seconds = []
    with tempfile.TemporaryDirectory() as temporary, Towers() as towers:
        for scenario in SCENARIOS:
            if options.only in scenario.__name__:
                folder = Path(temporary) / scenario.__name__
                folder.mkdir()
                begin = time.perf_counter()
                print(f"{scenario.__name__} …", file=sys.stderr, flush=True)
                rows.append(
                    scenario(
                        Bench(towers=towers, folder=folder, quick=options.quick, seed=options.seed)
                    )
                )
                seconds.append(time.perf_counter() - begin)
                # A run takes an hour: what is known is shown, also if the rest is broken off.
                print(f"{rows[-1]}, {seconds[-1]:.0f} s", file=sys.stderr, flush=True)
                shutil.rmtree(folder)
    table = [
        {**asdict(row), "seconds": round(s, 1), "seed": options.seed}
        for row, s in zip(rows, seconds, strict=True)
    ]
    print_table([{k: v for k, v in row.items() if k not in ("example", "seed")} for row in table])
    goals = [
        Goal(name=f"{row.scenario}: broken promises", value=row.broken, target=0, better="lower")
        for row in rows
    ]
    print_goals(goals)
    if options.json or not options.only:
        write_result("reliability-faults", goals=goals, rows=table, path=options.json)
    return int(not all(goal.met for goal in goals))


if __name__ == "__main__":
    sys.exit(main())
