"""`apecache lint`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .runs import opener
from .terminal import Json, ending, show_json, show_table


def lint(
    target: Annotated[
        str, typer.Argument(help="A finished run folder, or a recipe by name or file.toml.")
    ],
    store: Annotated[
        str | None, typer.Option(help="Its store: data and weights are checked too.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Recipe: override section.key=value. May be repeated."),
    ] = None,
    train_split: Annotated[str | None, typer.Option(help="Recipe: as in fit-head.")] = None,
    dev_split: Annotated[str | None, typer.Option(help="Recipe: as in fit-head.")] = None,
    report_split: Annotated[
        str, typer.Option(help="Will be reported: neither trained nor chosen on.")
    ] = "test",
    seed: Annotated[int, typer.Option(help="Recipe: seed of the weights.")] = 0,
    image_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    text_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Folder of the images, needed if the image tower trains.")
    ] = None,
    json: Json = False,
) -> None:
    """Look for the traps of published training code: parameters without gradient, gates that are
    shut, selection on the reported split, pairs in two splits, fewer negatives than the batch says.
    Exit code 3 if there is an error.

    Example: apecache lint sail --store store

    Example: apecache lint run --store store --report-split val
    """
    with ending():
        from apecache.store.reader import FeatureStore
        from apecache.train.lint.checks import require_sound

        opened = FeatureStore.open(store) if store else None
        if Path(target).is_dir():
            findings = _of_run(Path(target), store=opened, report_split=report_split, root=root)
        else:
            splits = train_split, dev_split
            features = image_features, text_features
            findings = _of_recipe(
                target,
                settings=set_,
                store=opened,
                splits=splits,
                seed=seed,
                features=features,
                report_split=report_split,
                root=root,
            )
        show_findings(target, findings, json)
        require_sound(findings)


def _of_run(run: Path, store: Any, report_split: str, root: str | None) -> list[Any]:
    from apecache.runs.load import is_encoder_run

    if is_encoder_run(run):
        from apecache.train.lint.encoders import lint_encoder_run

        return lint_encoder_run(
            run,
            store=store,
            report_split=report_split,
            open_image=opener(root),
        )
    from apecache.train.lint.heads import lint_run

    return lint_run(run, store, report_split)


def _of_recipe(
    name: str,
    settings: list[str] | None,
    store: Any,
    splits: tuple[str | None, str | None],
    seed: int,
    features: tuple[str | None, str | None],
    report_split: str,
    root: str | None,
) -> list[Any]:
    from apecache.recipes.recipe import load_recipe
    from apecache.train.batches import SplitSpec

    train, dev = splits
    recipe = load_recipe(name, settings or ())
    chosen = SplitSpec(train=train, dev=dev)
    if store is None or recipe.trains_heads_alone:
        from apecache.train.head_data import FitSpec
        from apecache.train.lint.heads import lint_plan

        return lint_plan(recipe, store, FitSpec(*features, chosen, seed, report_split=report_split))
    from apecache.train.encoder_data import FitEncoderSpec
    from apecache.train.lint.encoders import lint_encoder_plan

    spec = FitEncoderSpec(
        None,
        None,
        *features,
        chosen,
        seed,
        device="cpu",
        report_split=report_split,
    )
    return lint_encoder_plan(recipe, store=store, spec=spec, open_image=opener(root))


def show_findings(target: str, findings: list[Any], json: bool) -> None:
    if json:
        show_json({"target": target, "findings": [vars(finding) for finding in findings]})
    elif findings:
        rows = [(finding.level, finding.check, finding.message) for finding in findings]
        show_table(target, ("", "check", "what"), rows)
    else:
        typer.echo(f"{target}: nothing found")
