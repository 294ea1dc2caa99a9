"""`apecache compare`."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apecache.errors import counted

from .labeled import show_left_out
from .option_groups import Device, Json, Root, View
from .runs import opener
from .terminal import ending, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.evaluate.comparison import RunComparison


def compare(
    store: Annotated[
        str, typer.Option(metavar="STORE", help="Feature store to measure retrieval on.")
    ],
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN RUN]",
            help="Two finished runs: folders, s3://…, gs://… or az://….",
        ),
    ] = None,
    a: Annotated[
        list[str] | None,
        typer.Option("--a", metavar="RUN", help="Run of recipe A. Repeat for more seeds."),
    ] = None,
    b: Annotated[
        list[str] | None,
        typer.Option("--b", metavar="RUN", help="Run of recipe B. Repeat for more seeds."),
    ] = None,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Split to measure.")] = "val",
    view: View = None,
    root: Root = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare the recalls of two runs, or of two recipes with several seeds.

    Shows each difference A - B with its 95 % interval and p-value. Both sides are measured on the
    same images. With several seeds, the variance between seeds is included.

    Example: apecache compare run-ape run-projection --store store --split val

    Example: apecache compare --a ape-0 --a ape-1 --b csa-0 --b csa-1 --store store
    """
    with ending(), ExitStack() as stack:
        names_a, names_b = two_sides(runs or [], a or [], b or [])
        from apecache.runs.remote import fetched_run

        folders = {}
        # Each run once: fetching one again from object storage would copy it again.
        for name in dict.fromkeys([*names_a, *names_b]):
            folders[name] = stack.enter_context(fetched_run(name))
        side_a = [folders[name] for name in names_a]
        side_b = [folders[name] for name in names_b]
        comparison = measure(
            [side_a, side_b],
            names={str(folder): name for name, folder in folders.items()},
            store=store,
            view=view,
            split=split,
            root=root,
            device=device,
        )
        if json:
            show_json({"a": names_a, "b": names_b, **asdict(comparison)})
        else:
            show_comparison(names_a, names_b, comparison)


def two_sides(runs: list[str], a: list[str], b: list[str]) -> tuple[list[str], list[str]]:
    """Return the runs of both sides.

    Raises:
        OptionError: Neither two runs nor --a and --b are given, or more than that.
    """
    from apecache.errors import OptionError

    if len(runs) == 2 and not a and not b:
        return runs[:1], runs[1:]
    if not runs and a and b:
        return a, b
    raise OptionError(
        f"expected two runs, or --a RUN and --b RUN; found {counted(len(runs), 'run')}, "
        f"{len(a)} --a and {len(b)} --b"
    )


def measure(
    sides: list[list[Path]],
    names: dict[str, str],
    store: str,
    view: str | None,
    split: str,
    root: str | None,
    device: str,
) -> "RunComparison":
    """Compare two sides, and warn of runs that used the split in training.

    Args:
        sides: The run folders of A and of B.
        names: For each run folder, the name that the user gave.

    Returns:
        The comparison, with the runs under the names that the user gave.
    """
    from apecache.evaluate.comparison import compare_runs
    from apecache.store.reader import FeatureStore

    opened = FeatureStore.open(store, view)
    comparison = compare_runs(
        sides[0],
        run_b=sides[1],
        store=opened,
        split=split,
        device=device,
        open_image=opener(root, opened),
    )
    trained_on_split = [names[folder] for folder in comparison.seen_in_training]
    for name in trained_on_split:
        warn(
            f"{name} used split {split!r} in training or to choose its epoch: its figures are "
            "too high"
        )
    return replace(comparison, seen_in_training=tuple(trained_on_split))


def show_comparison(names_a: list[str], names_b: list[str], comparison: "RunComparison") -> None:
    """Show the differences, the counts of what was left out, and the runs of each side."""
    rows = []
    for row in comparison.rows:
        rows.append(
            (
                row.metric,
                row.value_a,
                row.value_b,
                row.chance,
                f"{row.difference:+.1f}",
                f"{row.low:+.1f} to {row.high:+.1f}",
                f"{row.p_value:.4f}" if row.p_value >= 0.0001 else "< 0.0001",
            )
        )
    title = (
        f"{comparison.split}: {counted(comparison.n_images, 'image')}, "
        f"{counted(comparison.n_texts, 'text')}"
    )
    show_table(
        title,
        ("", "A, %", "B, %", "chance", "A - B, points", "95 % interval", "p"),
        rows,
    )
    show_left_out(asdict(comparison.left_out))
    typer.echo(f"A: {', '.join(names_a)}")
    typer.echo(f"B: {', '.join(names_b)}")
    typer.echo(f"p-values: {comparison.method}, two-sided.")
    single = [side for side, names in (("A", names_a), ("B", names_b)) if len(names) == 1]
    if single:
        typer.echo(
            f"The interval has no variance over seeds of {' and '.join(single)}: one run only."
        )
