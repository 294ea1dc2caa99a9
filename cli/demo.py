"""`apecache demo`: all steps on drawings that the project ships, with encoders from packages."""

import os
import shlex
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from .option_groups import Json, Overwrite
from .terminal import ending, show_json, show_table

RECIPES = ("ape", "projection")  # the last one is indexed and shown
NEXT_RECIPE = "cca"  # a closed form, which takes seconds
TEMPLATES = ("a drawing of {}", "{}")
DEMO_FOLDER = Path("apecache-demo")
ENCODERS = "encoders"
STORE = "store"
INDEX = "index"
REPORT = "report.html"
QUERIES = ("something to eat for breakfast", "an animal that lives in the sea")


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for all files of the demo.")
    ] = Path("apecache-demo"),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run all steps on a small real data set. Needs no network, account or GPU.

    Extracts, trains, evaluates, indexes and searches 577 drawings of single words (CC BY-SA) with
    efficientnet-lite0 and all-MiniLM-L6-v2. Takes about two minutes on two cores. Interrupt at any
    time; run the same command to resume.

    Example: apecache demo --out apecache-demo
    """
    with ending():
        begin = time.perf_counter()
        from apecache.errors import require_new

        if not (overwrite or is_unfinished(out)):
            require_new(out, "folder")
        folder = data_folder()
        encoders = write_encoders(out)
        results = run_commands(context, out, folder, encoders)
        page = write_report(out, folder, results)
        seconds = time.perf_counter() - begin
        if json:
            show_json(
                {
                    "results": results,
                    "page": str(page),
                    "seconds": seconds,
                    "try_next": next_commands(out),
                }
            )
        else:
            show_results(results)
            typer.echo(f"Done in {seconds:.0f} s. Page with curves and pictures: {page}")
            typer.echo("Try next:")
            for command in next_commands(out):
                typer.echo(f"  {command}")


def next_commands(out: Path) -> list[str]:
    """Return three commands that work on the files of the demo."""
    runs = [out / f"run-{recipe}" for recipe in RECIPES]
    commands: tuple[tuple[object, ...], ...] = (
        ("search", out / INDEX, "something with wheels"),
        ("compare", *runs, "--store", out / STORE, "--split", "val"),
        ("fit-head", out / STORE, "--recipe", NEXT_RECIPE, "--out", out / f"run-{NEXT_RECIPE}"),
    )
    return [shlex.join(["apecache", *map(str, command)]) for command in commands]


def is_unfinished(out: Path) -> bool:
    """Return whether a folder holds an interrupted demo and nothing else.

    The same command resumes such a demo. The encoders are written first and the page last.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    demo_names = {ENCODERS, STORE, INDEX, *(f"run-{recipe}" for recipe in RECIPES)}
    # A step that was killed leaves a scratch file, whose name begins with a dot.
    other_names = {name for name in names - demo_names if not name.startswith(".")}
    return ENCODERS in names and not other_names


def data_folder() -> Path:
    """Return the folder of the drawings.

    It is examples/drawings in the sources and apecache_cli/drawings in an installed wheel.
    """
    folder = Path(str(files("apecache_cli.drawings")))
    # A relative path, where there is one, keeps the printed commands short.
    return Path(os.path.relpath(folder)) if folder.is_relative_to(Path.cwd()) else folder


def write_encoders(out: Path) -> tuple[Path, Path]:
    """Write the two packaged encoders as ordinary local folders."""
    from apecache.encoders.packaged import write_packaged_encoders

    typer.echo("writing the two packaged encoders to local folders", err=True)
    return write_packaged_encoders(out / ENCODERS)


def run_commands(
    context: typer.Context,
    out: Path,
    folder: Path,
    encoders: tuple[Path, Path],
) -> list[dict[str, Any]]:
    """Run every step as the command that a user would type.

    Returns:
        The rows of the result table, as `measure` makes them.
    """
    table = folder / "pairs.tsv"
    store = out / STORE
    image_folder, text_folder = encoders
    call(
        context,
        "extract",
        table,
        options={
            "store": store,
            "image": f"timm:{local_name(image_folder)}",
            "text": f"hf:{local_name(text_folder)}",
        },
    )
    rows = []
    for recipe in RECIPES:
        run = out / f"run-{recipe}"
        call(
            context,
            "fit-head",
            store,
            options={"recipe": recipe, "out": run, "overwrite": True},
        )
        call(context, "evaluate", run, options={"store": store, "split": "val"})
        call(
            context,
            "evaluate",
            run,
            options={"task": "zeroshot", "labels": table, "split": "val", "template": TEMPLATES},
        )
        rows += measure(recipe, run=run, store=store, folder=folder)
    index = out / INDEX
    call(
        context,
        "index",
        out / f"run-{RECIPES[-1]}",
        options={"store": store, "split": "val", "out": index, "overwrite": True},
    )
    for query in (*QUERIES, a_val_image(folder)):
        call(context, "search", index, query)
    return rows


def local_name(path: Path) -> str:
    """Write a path so that an encoder spec takes it for a folder even if it is relative."""
    return str(path) if path.is_absolute() else f"./{path}"


def call(
    context: typer.Context,
    command: str,
    *operands: str | Path,
    options: Mapping[str, str | Path | bool | tuple[str, ...]] | None = None,
) -> None:
    """Print a command and run it in this process.

    Args:
        context: Of the command that is running.
        command: Name of the command.
        operands: Its arguments, in their order.
        options: Values by the name of the option. True is a flag; a tuple repeats the option.
    """
    words = [command, *map(str, operands)]
    for name, value in (options or {}).items():
        if value is True:
            words.append(f"--{name}")
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [f"--{name}", str(item)]
    typer.secho(f"\n$ {shlex.join(['apecache', *words])}", bold=True, err=True)
    # Not standalone: a command that fails returns its code, and does not end this process.
    code = context.find_root().command.main(words, standalone_mode=False)
    if code:
        raise typer.Exit(code)


def measure(name: str, run: Path, store: Path, folder: Path) -> list[dict[str, Any]]:
    """Measure retrieval and zero-shot of the trained heads, and of the same heads before training.

    Args:
        name: The recipe.
        run: Its run folder.
        store: The feature store.
        folder: The drawings.

    Returns:
        A row for each stage; recalls and accuracies in per cent.
    """
    from apecache.data.sources import open_pairs
    from apecache.evaluate.embeddings import embed_store
    from apecache.evaluate.labeled import LabeledSpec
    from apecache.evaluate.zeroshot import ZeroShotSpec, zero_shot
    from apecache.metrics.retrieval import retrieval_report
    from apecache.recipes.recipe import load_recipe
    from apecache.runs.heads import load_heads
    from apecache.store.reader import FeatureStore
    from apecache.train.fit_head import untrained_heads

    opened = FeatureStore.open(store)
    rows = []
    stages = (
        ("before training", untrained_heads(opened, load_recipe(name))),
        ("trained", load_heads(run)),
    )
    images = LabeledSpec(open_pairs(folder / "pairs.tsv"), run / "caches", ("val",))
    spec = ZeroShotSpec(images, TEMPLATES)
    for stage, heads in stages:
        embedded = embed_store(heads, opened, "val")
        report = retrieval_report(
            embedded.image,
            embedded.text,
            embedded.image_of_text,
            relevance=embedded.relevance,
        )
        classes = zero_shot(heads, spec)
        rows.append(
            {
                "recipe": name,
                "stage": stage,
                **vars(report),
                "top1": classes.top1,
                "top5": classes.top5,
                "chance_top1": classes.chance_top1,
                "chance_top5": classes.chance_top5,
            }
        )
    return rows


def a_val_image(folder: Path) -> Path:
    """Return the first image of the val split."""
    from apecache.data.sources import open_pairs

    pairs = open_pairs(folder / "pairs.tsv")
    return folder / next(pair.key for pair in pairs if pair.split == "val")


COLUMNS = (
    "",
    "image to text R@1",
    "R@5",
    "R@10",
    "text to image R@1",
    "R@5",
    "R@10",
    "category top-1",
    "top-5",
)


def result_rows(results: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the table: chance, then each recipe before and after training, in per cent."""
    first = results[0]
    chance = (*first["chance_image_to_text"].values(), *first["chance_text_to_image"].values())
    rows: list[tuple[Any, ...]] = [("chance", *chance, first["chance_top1"], first["chance_top5"])]
    for row in results:
        recalls = (*row["image_to_text"].values(), *row["text_to_image"].values())
        rows.append((f"{row['recipe']}, {row['stage']}", *recalls, row["top1"], row["top5"]))
    return rows


def title(results: list[dict[str, Any]]) -> str:
    """Return the title of the result table."""
    return (
        f"val: {results[0]['n_images']} drawings, {results[0]['n_texts']} words, 12 "
        "categories (zero-shot)"
    )


def show_results(results: list[dict[str, Any]]) -> None:
    """Show the result table."""
    show_table(title(results), COLUMNS, result_rows(results))


def write_report(out: Path, folder: Path, results: list[dict[str, Any]]) -> Path:
    """Write the page of all runs, with pictures of the last recipe's results."""
    from apecache.data.media import FolderMedia
    from apecache.evaluate.embeddings import embed_store
    from apecache.report.page import Page, Table, write_page
    from apecache.report.run_page import learning_charts, ledger_table, retrieval_galleries
    from apecache.runs.heads import load_heads
    from apecache.store.reader import FeatureStore

    runs = {recipe: out / f"run-{recipe}" for recipe in RECIPES}
    heads = load_heads(runs[RECIPES[-1]])
    store = FeatureStore.open(out / STORE)
    galleries = retrieval_galleries(
        embed_store(heads, store, "val"),
        store,
        FolderMedia(root=folder),
    )
    page = Page(
        title="apecache demo",
        subtitle=(
            "577 drawings of single words; efficientnet-lite0 and all-MiniLM-L6-v2 stay frozen, "
            "heads train"
        ),
        commands=(f"apecache demo --out {out}",),
        tables=(
            Table(title=title(results), columns=COLUMNS, rows=tuple(result_rows(results))),
            ledger_table(runs),
        ),
        charts=learning_charts(runs),
        galleries=galleries,
        notes=("Drawings: Art4Apps, CC BY-SA 3.0; see examples/drawings/ATTRIBUTION.md.",),
    )
    return write_page(page, out / REPORT)
