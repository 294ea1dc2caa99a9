"""`apecache lint`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .option_groups import (
    DevSplit,
    ImageFeatures,
    Json,
    LiveRoot,
    OptionGroup,
    ReportSplit,
    Seed,
    Settings,
    TextFeatures,
    TrainSplit,
    View,
    takes_groups,
)
from .runs import opener
from .terminal import ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.store.reader import FeatureStore
    from apecache.train.lint.findings import Finding


@dataclass(frozen=True, kw_only=True)
class PlannedFit(OptionGroup):
    """Hold the options of a fit that a recipe would begin; a finished run has its own."""

    set_: Settings = None
    train_split: TrainSplit = None
    dev_split: DevSplit = None
    seed: Seed = 0
    image_features: ImageFeatures = None
    text_features: TextFeatures = None


@takes_groups
def lint(
    target: Annotated[
        str,
        typer.Argument(help="A finished run, or a recipe: its name or a TOML file."),
    ],
    planned: PlannedFit,
    store: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Feature store. Adds checks of the data."),
    ] = None,
    view: View = None,
    root: LiveRoot = None,
    report_split: ReportSplit = "test",
    json: Json = False,
) -> None:
    """Check a run or a recipe for common training mistakes.

    Mistakes are, among others: parameters without gradient, closed gates, choosing on the reported
    split, pairs in two splits, fewer negatives than the batch size suggests. All options except
    --store, --view, --root and --report-split apply to recipes only. The exit code is 3 if there is
    an error.

    Example: apecache lint sail --store store

    Example: apecache lint run --store store --report-split val
    """
    with ending():
        from apecache.store.reader import FeatureStore
        from apecache.train.lint.findings import require_sound

        opened = FeatureStore.open(store, view) if store else None
        if Path(target).is_dir():
            findings = _of_run(Path(target), store=opened, report_split=report_split, root=root)
        else:
            findings = _of_recipe(
                target,
                planned=planned,
                store=opened,
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
    planned: PlannedFit,
    store: "FeatureStore | None",
    report_split: str,
    root: str | None,
) -> "list[Finding]":
    """Check a recipe, and with a store the fit that it would begin there."""
    from apecache.recipes.recipe import load_recipe
    from apecache.train.batches import SplitSpec

    recipe = load_recipe(name, planned.set_ or ())
    split_spec = SplitSpec(train=planned.train_split, dev=planned.dev_split)
    if store is None or recipe.trains_heads_alone:
        from apecache.train.head_data import FitSpec
        from apecache.train.lint.heads import lint_plan

        head_spec = FitSpec(
            planned.image_features,
            text_features=planned.text_features,
            splits=split_spec,
            seed=planned.seed,
            report_split=report_split,
        )
        return lint_plan(recipe, store, head_spec)
    from apecache.train.encoder_data import FitEncoderSpec
    from apecache.train.lint.encoders import lint_encoder_plan

    spec = FitEncoderSpec(
        image_features=planned.image_features,
        text_features=planned.text_features,
        splits=split_spec,
        seed=planned.seed,
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
        show_table(target, ("", "check", "message"), rows)
    else:
        typer.echo(f"{target}: no problems found")
