"""Sweeps: many settings of recipes on one store, small heads of one structure trained together.

Everything is chosen on the dev split. A trial is one point of the space, with one or more seeds.
Its value is the mean over seeds of the best mean recall on dev.

An interrupted sweep resumes: finished trials are in `trials.jsonl`, and the population that was
training has a checkpoint.
"""

import json
import logging
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.errors import MismatchError, OptionError, RecipeError, RunError, counted
from apecache.fingerprint import Fingerprint
from apecache.recipes.recipe import Recipe
from apecache.runs.folder import RECIPE, locked
from apecache.runs.heads import DESCRIPTION
from apecache.storage.replace import replace_text, scratch_of
from apecache.store.reader import FeatureStore
from apecache.sweeps.data import SweepData
from apecache.sweeps.halving import WAVE, SweepSpec, TrialBatch, plan_trials
from apecache.sweeps.space import Space, Values
from apecache.sweeps.trials import Trial, ranked, read_trials
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from apecache.train.head_inputs import open_inputs
from apecache.train.keep_list import digest_keep_list

__all__ = ["SweepReport", "SweepSpec", "Trial", "read_trials", "sweep"]

logger = logging.getLogger(__name__)

DESCRIBED = "sweep.json"
COMMAND = "command.txt"


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Report a finished sweep."""

    folder: Path
    run: Path
    """The run of the best trial, with the first seed."""
    best: Trial
    command: str
    """The command that makes `run` again."""
    trials: tuple[Trial, ...]
    """All trials, the best on dev first."""


def sweep(
    store: FeatureStore,
    space: Space,
    out: AnyPath,
    spec: SweepSpec | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
    make_trial_batch: Callable[..., TrialBatch] = TrialBatch,
) -> SweepReport:
    """Run or resume a sweep, then fit the best trial into `out`/best.

    Args:
        store: A complete feature store.
        space: The points to choose from.
        out: The folder of the sweep.
        spec: The settings; default: those of `SweepSpec`.
        progress: Called with each trial that ends.
        make_trial_batch: Called as `TrialBatch` is; another class trains elsewhere.

    Raises:
        OptionError: A count in the settings is below 1.
        MismatchError: `out` holds another sweep, or the features are pooled in another way than a
            recipe says.
        RunError: `out` holds something else, or no trial succeeded.
        RecipeError: A trial failed, and `spec` has no `keep_going`.
        ApecacheError: Any other error of `fit_head`.
    """
    out = as_path(out, "out")
    require_spec(spec, SweepSpec, "spec", optional=True)
    spec = spec or SweepSpec()
    order = run_trials(
        store,
        space=space,
        out=out,
        spec=spec,
        progress=progress,
        make_trial_batch=make_trial_batch,
    )
    best = order[0]
    logger.info("sweep in %s: the best of %d trials is %d", out, len(order), best.number)
    run = out / "best"
    recipe = open_inputs(store, space.recipe(best.values), spec.fit).recipe
    recorded = _recorded_recipe(run)
    if recorded != recipe or not (run / DESCRIPTION).is_file():
        # A run of an earlier best trial is replaced; an unfinished one of this trial resumes.
        is_other = recorded is not None and recorded != recipe
        fit_head(store, recipe=recipe, out=run, spec=replace(spec.fit, overwrite=is_other))
    command = _command(store, best=best, fit=spec.fit, run=run)
    replace_text(out / COMMAND, f"{command}\n")
    return SweepReport(folder=out, run=run, best=best, command=command, trials=order)


def run_trials(
    store: FeatureStore,
    space: Space,
    out: Path,
    spec: SweepSpec,
    progress: Callable[[Trial], None] = lambda _: None,
    make_trial_batch: Callable[..., TrialBatch] = TrialBatch,
) -> tuple[Trial, ...]:
    """Run or resume the trials of a sweep, and fit no run.

    Arguments and errors are those of `sweep`.

    Returns:
        All trials, the best on dev first. The first one did not fail.
    """
    require_type(store, FeatureStore, "store")
    require_type(space, Space, "space")
    if min(spec.n_trials, spec.seeds, spec.population, spec.rungs) < 1:
        raise OptionError("n_trials, seeds, population and rungs must be at least 1")
    points = list(space.grid())[: spec.n_trials] if spec.sampler == "grid" else None
    total = len(points) if points is not None else spec.n_trials
    data = SweepData(store=store, fit=spec.fit, memory_bytes=spec.memory_bytes)
    # Before the folder is claimed: after an error the same folder takes other settings.
    for recipe in _first_recipes(space, spec, points):
        data.splits(recipe)
    with locked(out):
        _require_same(out, _identity(store, space, spec))
        trials = read_trials(out)
        logger.info("sweep in %s: %d trials, %d of them done", out, total, len(trials))
        # Optuna learns from finished trials: its batches are as small as the populations allow.
        size = WAVE if spec.sampler != "tpe" else max(1, spec.population // spec.seeds)
        for begin in range(0, total, size):
            numbers = range(begin, min(begin + size, total))
            if not set(numbers) <= set(trials):
                # Positional: `make_trial_batch` may be a partial that passes its arguments through.
                trial_batch = make_trial_batch(out, spec, space, data, trials, progress)
                planned = plan_trials(trial_batch, numbers, points)
                trial_batch.run(planned)
        order = ranked(trials)
    if order[0].mean is None:
        raise RunError(
            f"none of {counted(len(order), 'trial')} succeeded; the first failed with: "
            f"{order[0].error}"
        )
    return tuple(order)


def _first_recipes(
    space: Space,
    spec: SweepSpec,
    points: list[Values] | None,
) -> Iterator[Recipe]:
    """Yield the valid recipes of the first points.

    Their features are opened before the folder is claimed.

    Args:
        space: The space to choose from.
        spec: Settings of the sweep.
        points: All points of a grid; None for the other samplers.
    """
    if points is None:
        # Optuna chooses other points of the same space.
        points = [space.draw(spec.seed, number) for number in range(min(spec.n_trials, WAVE))]
    for values in points[:WAVE]:
        try:
            recipe = space.recipe(values)
        except RecipeError:
            # It fails later, as a trial.
            continue
        if recipe.trains_heads_alone:
            yield recipe


def _identity(store: FeatureStore, space: Space, spec: SweepSpec) -> Fingerprint:
    """Return what must be the same when a sweep resumes."""
    settings = asdict(spec)
    del settings["keep_going"]
    # Halving ranks all trials of a batch: with more trials it would have stopped others.
    if not spec.halving:
        del settings["n_trials"]
    for name in ("device", "overwrite", "save_seconds"):
        del settings["fit"][name]
    # They change no trial, and count as not given.
    settings["fit"] |= {"extract_report": None, "price_per_hour": None}
    # Left out where there is none: earlier sweeps had no keep list.
    keep = settings["fit"].pop("keep")
    if keep is not None:
        settings["fit"]["keep"] = digest_keep_list(as_path(keep, "keep"))
    dimensions = {}
    for name, dimension in space.dimensions.items():
        dimensions[name] = dimension.model_dump(mode="json", by_alias=True, exclude_none=True)
    recipes = {}
    for name in space.recipes:
        recipes[name] = space.recipe({"recipe": name}).model_dump(mode="json")
    if space.first:
        settings["first"] = space.first
    described = {"data": store.digest, "space": dimensions, "recipes": recipes, **settings}
    # Through JSON, so that tuples equal the lists of an identity that was read.
    return Fingerprint(fields=json.loads(json.dumps(described)))


def _require_same(out: Path, identity: Fingerprint) -> None:
    """Write the identity of a new sweep, or compare it with that of the sweep in the folder."""
    path = out / DESCRIBED
    if not path.is_file():
        if any(entry != scratch_of(path) for entry in out.iterdir()):
            raise RunError(f"{out} exists and is not a sweep; choose another --out")
        replace_text(path, json.dumps(dict(identity.fields), indent=1))
        return
    text = path.read_text(encoding="utf-8")
    recorded = Fingerprint(fields=json.loads(text))
    differences = identity.difference(recorded)
    if differences:
        raise MismatchError(
            f"{out} holds another sweep ({differences[0][0]} differs); choose another --out",
            differences,
        )


def _recorded_recipe(run: Path) -> Recipe | None:
    """Return the recipe of a run, finished or not; None if there is no run."""
    path = run / RECIPE
    if not path.is_file():
        return None
    return Recipe.model_validate_json(path.read_text(encoding="utf-8"))


def _command(store: FeatureStore, best: Trial, fit: FitSpec, run: Path) -> str:
    """Return the `apecache fit-head` command, with every option that differs from its default."""
    words = [
        "apecache",
        "fit-head",
        str(store.path),
        "--recipe",
        best.recipe,
        "--out",
        f"{run}-again",
    ]
    for setting in best.settings:
        words += ["--set", setting]
    usual = FitSpec()
    splits = fit.splits
    options = {
        "--train-split": (splits.train, usual.splits.train),
        "--dev-split": (splits.dev, usual.splits.dev),
        "--dev-images": (splits.dev_images, usual.splits.dev_images),
        "--dev-seed": (splits.seed, usual.splits.seed),
        "--seed": (fit.seed, usual.seed),
        "--image-features": (fit.image_features, None),
        "--text-features": (fit.text_features, None),
        "--keep": (fit.keep, None),
        "--view": (store.older_view, None),
    }
    for name, (value, default) in options.items():
        if value != default:
            words += [name, str(value)]
    return shlex.join(words)
