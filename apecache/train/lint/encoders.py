"""Check a fit within towers by `apecache.train.lint.checks`: one to come, or a finished run."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.device import resolve_device
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import MismatchError, RunError
from apecache.fingerprint import Json, Modality
from apecache.recipes.recipe import Recipe, as_recipe, parse_recipe
from apecache.runs.encoders import DESCRIPTION, WEIGHTS, read_description, read_tensors
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.encoder_setup import PreparedFit, require_sensible, set_up
from apecache.train.lint.checks import lint_encoder_data, lint_named, lint_recipe
from apecache.train.lint.findings import Finding
from apecache.train.lint.model_checks import lint_encoder_model
from apecache.train.live import OpenImage
from apecache.train.ranks import ALONE
from apecache.train.tower_fit import EncoderFit


def lint_encoder_plan(
    recipe: Recipe | AnyPath,
    store: FeatureStore,
    spec: FitEncoderSpec | None = None,
    open_image: OpenImage | None = None,
) -> list[Finding]:
    """Check the fit that `fit_encoder` would begin.

    Raises as `fit_encoder` does before it trains.
    """
    recipe = as_recipe(recipe)
    require_type(store, FeatureStore, "store")
    require_spec(spec, FitEncoderSpec, "spec", optional=True)
    spec = spec or FitEncoderSpec()
    require_sensible(recipe, spec, ALONE)
    setup = set_up(
        store,
        recipe=recipe,
        spec=spec,
        open_image=open_image,
        device=resolve_device(spec.device),
    )
    return _lint(setup)


def lint_encoder_run(
    run: AnyPath,
    store: FeatureStore | None = None,
    report_split: str = "test",
    open_image: OpenImage | None = None,
) -> list[Finding]:
    """Check a finished run of `fit_encoder`.

    Args:
        run: Folder of the run.
        store: Store of the run; None: only recipe and splits are checked, not weights and data.
        report_split: Split that results will be reported on.
        open_image: Reads the image of a key. Needed if the image tower ran from pixels.

    Raises:
        RunError: The run is damaged.
        MismatchError: The store or an encoder is not what the run was trained on.

    Also raises what `fit_encoder` raises before it trains.
    """
    run = as_path(run, "run")
    description = read_description(run)
    # The description may be of an older version, or edited by hand.
    try:
        recipe = parse_recipe(description["recipe"], str(run / DESCRIPTION))
        splits = SplitSpec(**description["splits"])
        n_images = int(description["n_train_images"])
        n_dev = int(description["n_dev_images"])
        data = description["data"]
        spec = _spec_of(description, recipe=recipe, splits=splits, report_split=report_split)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run / DESCRIPTION} is damaged ({error}); train again") from None
    if store is None:
        return [*lint_recipe(recipe, n_images), *lint_named(splits, n_dev, report_split)]
    # Findings on other pairs would say nothing about this run.
    if data != store.digest:
        raise MismatchError(
            f"{run} was trained on other pairs than those of {store.path}; give its own store"
            f"{store.hint(data)}"
        )
    setup = set_up(
        store,
        recipe=recipe,
        spec=spec,
        open_image=open_image,
        device=resolve_device(spec.device),
    )
    _require_encoders(run, description, setup)
    tensors, _ = read_tensors(run / WEIGHTS)
    # The checks look at what training made, and not at the initial weights.
    setup.model.load_kept(_with_bank(tensors, setup.model.kept_state()))
    return _lint(setup)


def _lint(setup: PreparedFit) -> list[Finding]:
    """Run the checks on a fit that is ready to begin."""
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
    description: Mapping[str, Json],
    recipe: Recipe,
    splits: SplitSpec,
    report_split: str,
) -> FitEncoderSpec:
    """Return the settings that the run was made with, on the CPU."""
    image_features = description["image"].get("features")
    text_features = description["text"].get("features")
    seed = description["seed"]
    return FitEncoderSpec(
        image=_live_encoder(description["image"], side="image", recipe=recipe),
        text=_live_encoder(description["text"], side="text", recipe=recipe),
        image_features=image_features,
        text_features=text_features,
        splits=splits,
        seed=seed,
        device="cpu",
        report_split=report_split,
    )


def _live_encoder(
    side_description: Mapping[str, Json],
    side: Modality,
    recipe: Recipe,
) -> EncoderSpec | None:
    """Return the encoder of a side that ran without features of the store; None otherwise."""
    # Cached features need no encoder, and neither does a tower that never trains.
    if side_description.get("features") is not None or not recipe.towers.may_train(side):
        return None
    return spec_from_json(side_description["encoder"])


def _require_encoders(run: Path, description: Mapping[str, Json], setup: PreparedFit) -> None:
    """Check that the encoders are those of the run. Raises MismatchError if one has changed."""
    for source in setup.opened.sources:
        if source.fingerprint.fields != description[source.side]["fingerprint"]:
            raise MismatchError(
                f"the {source.side} encoder of {run} has changed; give the store of its fit"
            )


def _with_bank(run_tensors: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the initial bank of teacher features, which a finished run does not keep."""
    bank = {name: tensor for name, tensor in fresh.items() if ".bank." in name}
    return {**bank, **run_tensors}
