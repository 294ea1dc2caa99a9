"""`apecache evaluate --suite`: suites of other programs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .terminal import show_table, warn

if TYPE_CHECKING:
    from apecache.encoders.spec import EncoderSpec


def require_suite_options(
    suite: str | None,
    data_root: Path | None,
    task: str,
    given: Sequence[str],
) -> None:
    """Refuse options that a suite would ignore, and --data-root without a suite.

    Args:
        suite: The value of --suite.
        data_root: The value of --data-root.
        task: The value of --task.
        given: Names of the options of tasks that were given.

    Raises:
        OptionError: Such an option was given.
    """
    from apecache.errors import OptionError

    if suite is None:
        if data_root is not None:
            raise OptionError("--data-root has no effect without --suite: leave it out")
        return
    if task != "retrieval":
        raise OptionError(f"--task {task} has no effect with --suite: leave one of them out")
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise OptionError(f"{option} has no effect with --suite: leave it out")


def measure_suites(
    run: Path,
    suite: str,
    data_root: Path | None,
    moved: "tuple[EncoderSpec | None, EncoderSpec | None]",
    device: str,
) -> list[dict[str, Any]]:
    """Measure a run by the suites that --suite names; return the JSON form of their reports."""
    from apecache.device import resolve_device
    from apecache.export.benchmark_suite import SuiteSpec, run_suite, suite_names

    image, text = moved
    names = suite_names(suite)
    spec = SuiteSpec(image=image, text=text, device=str(resolve_device(device)))
    reports = []
    for name in names:
        report = run_suite(
            run,
            name,
            data_root=data_root,
            spec=spec,
            progress=lambda data_set: typer.echo(f"measuring {data_set}", err=True),
        )
        reports.append(asdict(report))
    return reports


def show_suites(run: str, results: Sequence[dict[str, Any]]) -> None:
    """Show the figures of suites in per cent, and what could not be measured."""
    from apecache.export.suite_report import SuiteRow

    for result in results:
        rows: list[tuple[object, ...]] = []
        for value in result["rows"]:
            row = SuiteRow(**value)
            span = row.intervals.get(row.shown)
            rows.append(
                (
                    row.title,
                    row.shown,
                    100 * row.metrics[row.shown],
                    f"{100 * span[0]:.1f} to {100 * span[1]:.1f}" if span else "",
                    row.n_images,
                    row.source,
                )
            )
        columns: tuple[str, ...] = ("data set", "figure", "%", "95 % interval", "images", "source")
        if not any(row[-1] for row in rows):
            columns = columns[:-1]
            rows = [row[:-1] for row in rows]
        show_table(f"{result['suite']}: {run}", columns, rows)
        _show_mean(result)
        for name, reason in result["failed"].items():
            warn(f"not measured: {reason if reason.startswith(name) else f'{name}: {reason}'}")


def _show_mean(result: dict[str, Any]) -> None:
    """Show the mean of DataComp, which is over 38 tasks: one over fewer says so."""
    if result["main_score"] is None:
        return
    n_measured = 38 - len(result["missing"])
    typer.echo(
        f"mean of the {n_measured} of 38 tasks that were measured: "
        f"{100 * result['main_score']:.2f} %"
    )
    typer.echo(f"missing: {', '.join(result['missing'])}")
