"""`apecache compare`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from apecache.errors import counted

from .inputs import Root
from .labeled import show_left_out
from .runs import opener
from .terminal import Device, Json, ending, show_json, show_table, warn


def compare(
    store: Annotated[str, typer.Option(help="The feature store with the split.")],
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN RUN]", help="Two finished runs; s3://… and the like too."),
    ] = None,
    a: Annotated[
        list[str] | None,
        typer.Option("--a", help="A run of the first recipe. Repeat for other seeds."),
    ] = None,
    b: Annotated[
        list[str] | None,
        typer.Option("--b", help="A run of the second recipe. Repeat for other seeds."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split to measure.")] = "val",
    root: Root = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare two runs on the same images: differences of recalls with a 95 % interval and a
    p-value.

    Give two runs, or the seeds of two recipes with --a and --b. A difference is A less B, paired
    over images, each image with its captions. With several seeds the variance over seeds is added.

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
        result = measure(
            [side_a, side_b],
            names={str(folder): name for name, folder in folders.items()},
            store=store,
            split=split,
            root=root,
            device=device,
        )
        if json:
            show_json({"a": names_a, "b": names_b, **result})
        else:
            show_comparison(names_a, names_b, result)


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
        f"{len(a)} --a and "
        f"{len(b)} --b"
    )


def measure(
    sides: list[list[Path]],
    names: dict[str, str],
    store: str,
    split: str,
    root: str | None,
    device: str,
) -> dict[str, Any]:
    """Compare two sides, and warn of runs that used the split in training.

    Args:
        sides: The run folders of A and of B.
        names: For each run folder, the name that the user gave.

    Returns:
        The JSON form of the comparison.
    """
    from dataclasses import asdict

    from apecache.evaluate.comparison import compare_runs
    from apecache.store.reader import FeatureStore

    comparison = compare_runs(
        sides[0],
        run_b=sides[1],
        store=FeatureStore.open(store),
        split=split,
        device=device,
        open_image=opener(root),
    )
    trained_on_split = [names[folder] for folder in comparison.seen_in_training]
    for name in trained_on_split:
        warn(
            f"{name} used split {split!r} in training or to choose its epoch: its figures are "
            "too high"
        )
    return {**asdict(comparison), "seen_in_training": trained_on_split}


def show_comparison(names_a: list[str], names_b: list[str], result: dict[str, Any]) -> None:
    """Show the differences, what was left out, and what each side is."""
    rows = []
    for row in result["rows"]:
        rows.append(
            (
                row["metric"],
                row["value_a"],
                row["value_b"],
                row["chance"],
                f"{row['difference']:+.1f}",
                f"{row['low']:+.1f} to {row['high']:+.1f}",
                f"{row['p_value']:.4f}" if row["p_value"] >= 0.0001 else "< 0.0001",
            )
        )
    title = (
        f"{result['split']}: {counted(result['n_images'], 'image')}, "
        f"{counted(result['n_texts'], 'text')}"
    )
    show_table(
        title,
        ("", "A, %", "B, %", "chance", "A less B, points", "95 % interval", "p"),
        rows,
    )
    show_left_out(result["left_out"])
    typer.echo(f"A: {', '.join(names_a)}")
    typer.echo(f"B: {', '.join(names_b)}")
    single = [side for side, names in (("A", names_a), ("B", names_b)) if len(names) == 1]
    typer.echo(f"p: {result['method']}, two-sided.")
    if single:
        typer.echo(
            f"The interval has no variance over seeds of {' and '.join(single)}: one run only."
        )
