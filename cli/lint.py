"""`apecache lint`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .runs import opener
from .terminal import Json, ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.store.reader import FeatureStore
    from apecache.train.lint.findings import Finding


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
        from apecache.train.lint.findings import require_sound

        opened = FeatureStore.open(store) if store else None
        if Path(target).is_dir():
            findings = _of_run(Path(target), store=opened, report_split=report_split, root=root)
        else:
            findings = _of_recipe(
                target,
                settings=set_,
                store=opened,
                splits=(train_split, dev_split),
                seed=seed,
                features=(image_features, text_features),
                report_split=report_split,
                root=root,
            )
        show_findings(target, findings, json)
        # After the findings are shown: it raises for errors, which sets the exit code.
        require_sound(findings)


def _of_run(
    run: Path,
    store: "FeatureStore | None",
    report_split: str,
    root: str | None,
) -> "list[Finding]":
    """Check a finished run of either trainer."""
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
    store: "FeatureStore | None",
    splits: tuple[str | None, str | None],
    seed: int,
    features: tuple[str | None, str | None],
    report_split: str,
    root: str | None,
) -> "list[Finding]":
    """Check a recipe, and with a store the fit that it would begin there.

    Args:
        splits: Names of the train and the dev split.
        features: Names of the image and the text features.
    """
    from apecache.recipes.recipe import load_recipe
    from apecache.train.batches import SplitSpec

    train_split, dev_split = splits
    image_features, text_features = features
    recipe = load_recipe(name, settings or ())
    split_spec = SplitSpec(train=train_split, dev=dev_split)
    if store is None or recipe.trains_heads_alone:
        from apecache.train.head_data import FitSpec
        from apecache.train.lint.heads import lint_plan

        head_spec = FitSpec(
            image_features,
            text_features=text_features,
            splits=split_spec,
            seed=seed,
            report_split=report_split,
        )
        return lint_plan(recipe, store, head_spec)
    from apecache.train.encoder_data import FitEncoderSpec
    from apecache.train.lint.encoders import lint_encoder_plan

    spec = FitEncoderSpec(
        image_features=image_features,
        text_features=text_features,
        splits=split_spec,
        seed=seed,
        device="cpu",
        report_split=report_split,
    )
    return lint_encoder_plan(recipe, store=store, spec=spec, open_image=opener(root))


def show_findings(target: str, findings: "list[Finding]", json: bool) -> None:
    """Show all findings, or that there are none."""
    if json:
        show_json({"target": target, "findings": [vars(finding) for finding in findings]})
    elif findings:
        rows = [(finding.level, finding.check, finding.message) for finding in findings]
        show_table(target, ("", "check", "what"), rows)
    else:
        typer.echo(f"{target}: nothing found")
