"""The checks of `apecache.train.lint.checks` on a fit within towers: one that is to be done, and a
run that exists."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from apecache.encoders.encoder import parse_device
from apecache.encoders.spec import spec_from_json
from apecache.errors import MismatchError, RunError
from apecache.fingerprint import Json, Modality
from apecache.recipes.recipe import Recipe, parse_recipe
from apecache.runs.encoders import DESCRIPTION, WEIGHTS, read_description, read_tensors
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.encoder_fit import EncoderFit
from apecache.train.encoder_setup import Setup, require_sensible, set_up
from apecache.train.lint.checks import (
    Finding,
    lint_encoder_data,
    lint_encoder_model,
    lint_named,
    lint_recipe,
)
from apecache.train.live import OpenImage
from apecache.train.ranks import ALONE


def lint_encoder_plan(
    recipe: Recipe,
    store: FeatureStore,
    spec: FitEncoderSpec,
    open_image: OpenImage | None = None,
) -> list[Finding]:
    """Of the fit that `fit_encoder` would begin. Raises as it does before it trains."""
    require_sensible(recipe, spec, ALONE)
    return _lint(
        set_up(
            store,
            recipe=recipe,
            spec=spec,
            open_image=open_image,
            device=parse_device(spec.device),
        )
    )


def lint_encoder_run(
    run: Path,
    store: FeatureStore | None,
    report_split: str,
    open_image: OpenImage | None = None,
) -> list[Finding]:
    """Of a finished run of `fit_encoder`: its recipe and splits; with its store, also its weights
    and data. A tower that ran from its inputs does so here, so an image tower needs its images.

    Raises:
        RunError: a damaged run. MismatchError: the store or an encoder is not what it was trained
            on. And what
        `fit_encoder` raises before it trains.
    """
    about = read_description(run)
    try:
        recipe = parse_recipe(about["recipe"], str(run / DESCRIPTION))
        splits = SplitSpec(**about["splits"])
        n_images = int(about["n_train_images"])
        n_dev = int(about["n_dev_images"])
        data = about["data"]
        spec = _spec_of(about, recipe=recipe, splits=splits, report_split=report_split)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run / DESCRIPTION} is damaged ({error}); train again") from None
    if store is None:
        return [*lint_recipe(recipe, n_images), *lint_named(splits, n_dev, report_split)]
    if data != store.digest:
        raise MismatchError(
            f"{run} was trained on other pairs than those of {store.path}; give its own store"
        )
    setup = set_up(
        store,
        recipe=recipe,
        spec=spec,
        open_image=open_image,
        device=parse_device(spec.device),
    )
    _require_encoders(run, about, setup)
    setup.model.load_kept(_with_bank(read_tensors(run / WEIGHTS)[0], setup.model.kept_state()))
    return _lint(setup)


def _lint(setup: Setup) -> list[Finding]:
    opened = setup.opened
    training = EncoderFit(
        setup.model,
        inputs=setup.inputs,
        recipe=opened.recipe,
        spec=opened.spec,
        ranks=ALONE,
    )
    return [
        *lint_encoder_data(
            opened.store,
            recipe=opened.recipe,
            splits=opened.spec.splits,
            report_split=opened.spec.report_split,
            train=setup.train,
        ),
        *lint_encoder_model(training, setup.train),
    ]


def _spec_of(
    about: Mapping[str, Json],
    recipe: Recipe,
    splits: SplitSpec,
    report_split: str,
) -> FitEncoderSpec:
    """What the run was made with, on the CPU."""
    names = {side: about[side].get("features") for side in ("image", "text")}
    spec = FitEncoderSpec(
        splits=splits,
        seed=about["seed"],
        device="cpu",
        report_split=report_split,
    )
    spec = replace(spec, image_features=names["image"], text_features=names["text"])
    sides: tuple[Modality, ...] = ("image", "text")
    for side in sides:
        if names[side] is None and recipe.towers.may_train(side):
            encoder = spec_from_json(about[side]["encoder"])
            spec = replace(spec, image=encoder) if side == "image" else replace(spec, text=encoder)
    return spec


def _require_encoders(run: Path, about: Mapping[str, Json], setup: Setup) -> None:
    for source in setup.opened.sources:
        if source.fingerprint.fields != about[source.side]["fingerprint"]:
            raise MismatchError(
                f"the {source.side} encoder of {run} has changed; give the store of its fit"
            )


def _with_bank(kept: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the bank of teacher features, which a finished run does not keep, as it is at the
    beginning."""
    return {**{name: tensor for name, tensor in fresh.items() if ".bank." in name}, **kept}
