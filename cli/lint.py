"""`apecache lint`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import Json, ending, show_json, show_table


def lint(
    target: Annotated[str, typer.Argument(help="A finished run folder, or a recipe by name or file.toml.")],
    store: Annotated[Path | None, typer.Option(help="Its store: data and weights are checked too.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Recipe: override section.key=value. May be repeated.")
    ] = None,
    train_split: Annotated[str | None, typer.Option(help="Recipe: as in fit-head.")] = None,
    dev_split: Annotated[str | None, typer.Option(help="Recipe: as in fit-head.")] = None,
    report_split: Annotated[str, typer.Option(help="Will be reported: neither trained nor chosen on.")] = "test",
    seed: Annotated[int, typer.Option(help="Recipe: seed of the weights.")] = 0,
    image_features: Annotated[str | None, typer.Option(help="Which, if the store has several.")] = None,
    text_features: Annotated[str | None, typer.Option(help="Which, if the store has several.")] = None,
    json: Json = False,
) -> None:
    """Look for the traps of published training code: parameters without gradient, gates that are shut, selection on
    the reported split, pairs in two splits, fewer negatives than the batch says. Exit code 3 if there is an error.

    Example: apecache lint sail --store store

    Example: apecache lint run --store store --report-split val
    """
    with ending():
        from apecache.store.reader import FeatureStore
        from apecache.train.lint import require_sound

        opened = FeatureStore.open(store) if store else None
        if Path(target).is_dir():
            from apecache.train.lint_run import lint_run

            findings = lint_run(Path(target), opened, report_split)
        else:
            from apecache.recipes.recipe import load_recipe
            from apecache.train.batches import SplitSpec
            from apecache.train.fit_head import FitSpec
            from apecache.train.lint_run import lint_plan

            splits = SplitSpec(train_split, dev_split)
            spec = FitSpec(image_features, text_features, splits, seed, report_split=report_split)
            findings = lint_plan(load_recipe(target, set_ or ()), opened, spec)
        show_findings(target, findings, json)
        require_sound(findings)


def show_findings(target: str, findings: list[Any], json: bool) -> None:
    if json:
        show_json({"target": target, "findings": [vars(finding) for finding in findings]})
    elif findings:
        rows = [(finding.level, finding.check, finding.message) for finding in findings]
        show_table(target, ("", "check", "what"), rows)
    else:
        typer.echo(f"{target}: nothing found")
