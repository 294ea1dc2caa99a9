"""Sweeps: many settings of recipes on one store, small heads of one structure trained together.

Everything is chosen on the dev split. A trial is one point of the space, with several seeds if asked for; its value is
the mean over seeds of the best mean recall on dev. A sweep that was broken off goes on: finished trials stand in
`trials.jsonl`, and the population that was under way goes on from its last checkpoint.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apecache.durable import replace_text, scratch_of
from apecache.errors import MismatchError, OptionError, RunError
from apecache.fingerprint import Fingerprint
from apecache.heads.checkpoint import DESCRIPTION
from apecache.recipes.recipe import Recipe
from apecache.space import Space
from apecache.store.reader import FeatureStore
from apecache.sweep_results import Trial, ranked, read_trials
from apecache.sweep_wave import WAVE, SweepData, SweepSpec, Wave, plan_trials
from apecache.train.fit_head import FitSpec, choose_device, fit_head, load_splits, require_kind
from apecache.train.run_folder import RECIPE, locked

__all__ = ["SweepReport", "SweepSpec", "Trial", "read_trials", "sweep"]

DESCRIBED, COMMAND = "sweep.json", "command.txt"


@dataclass(frozen=True)
class SweepReport:
    """`trials`: the best on dev first. `command` makes `run`, the best trial with the first seed, again."""

    folder: Path
    run: Path
    best: Trial
    command: str
    trials: tuple[Trial, ...]


def sweep(
    store: FeatureStore,
    space: Space,
    out: Path,
    spec: SweepSpec | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
    make_wave: Callable[..., Wave] = Wave,
) -> SweepReport:
    """Run, or go on with, a sweep; then fit the best trial into `out`/best. `make_wave` says where populations train:
    called as `Wave` is.

    Raises:
        OptionError: settings that make no sense. MismatchError: `out` holds another sweep. RunError: `out` holds
        something else, or no trial succeeded. RecipeError: a trial failed, without `keep_going`. Others as `fit_head`.
    """
    spec = spec or SweepSpec()
    if min(spec.n_trials, spec.seeds, spec.population, spec.rungs) < 1:
        raise OptionError("n_trials, seeds, population and rungs must be at least 1")
    data = load_data(store, spec.fit)
    with locked(out):
        _require_same(out, _identity(store, space, spec))
        trials = read_trials(out)
        points = list(space.grid())[: spec.n_trials] if spec.sampler == "grid" else None
        total = len(points) if points is not None else spec.n_trials
        size = WAVE if spec.sampler != "tpe" else max(1, spec.population // spec.seeds)
        for begin in range(0, total, size):
            numbers = range(begin, min(begin + size, total))
            if not set(numbers) <= set(trials):
                wave = make_wave(out, spec, space, data, trials, progress)
                wave.run(plan_trials(wave, numbers, points))
        order = ranked(trials)
    best = order[0]
    if best.mean is None:
        raise RunError(f"none of {len(order)} trials succeeded; the first failed with: {best.error}")
    run, recipe = out / "best", space.recipe(best.values)
    if not _is_run_of(run, recipe):
        fit_head(store, recipe, run, replace(spec.fit, overwrite=(run / DESCRIPTION).is_file()))
    command = _command(store, best, spec.fit, run)
    replace_text(out / COMMAND, f"{command}\n")
    return SweepReport(out, run, best, command, tuple(order))


def load_data(store: FeatureStore, fit: FitSpec) -> SweepData:
    """Features of the train and dev splits, in memory. Raises as `fit_head` does."""
    arrays = store.array("image", fit.image_features), store.array("text", fit.text_features)
    train, dev = load_splits(store, *arrays, fit.splits, choose_device(fit.device))

    def require_kinds(recipe: Recipe) -> None:
        for array, head in zip(arrays, (recipe.image, recipe.text), strict=True):
            require_kind(array, head, recipe.name)

    return SweepData(train, dev, require_kinds)


def _identity(store: FeatureStore, space: Space, spec: SweepSpec) -> Fingerprint:
    """What must not change when a sweep goes on."""
    settings = asdict(spec)
    for name in ("keep_going",) if spec.halving else ("keep_going", "n_trials"):
        del settings[name]
    for name in ("device", "overwrite", "save_seconds"):
        del settings["fit"][name]
    dimensions = {
        name: d.model_dump(mode="json", by_alias=True, exclude_none=True) for name, d in space.dimensions.items()
    }
    recipes = {name: space.recipe({"recipe": name}).model_dump(mode="json") for name in space.recipes}
    described = {"data": store.digest, "space": dimensions, "recipes": recipes, **settings}
    return Fingerprint(json.loads(json.dumps(described)))


def _require_same(out: Path, identity: Fingerprint) -> None:
    path = out / DESCRIBED
    if not path.is_file():
        if any(other != scratch_of(path) for other in out.iterdir()):
            raise RunError(f"{out} exists and is no sweep; choose another --out")
        replace_text(path, json.dumps(dict(identity.fields), indent=1))
        return
    differences = identity.difference(Fingerprint(json.loads(path.read_text(encoding="utf-8"))))
    if differences:
        raise MismatchError(
            f"{out} holds another sweep ({differences[0][0]} differs); choose another --out", differences
        )


def _is_run_of(run: Path, recipe: Recipe) -> bool:
    if not (run / DESCRIPTION).is_file():
        return False
    return Recipe.model_validate_json((run / RECIPE).read_text(encoding="utf-8")) == recipe


def _command(store: FeatureStore, best: Trial, fit: FitSpec, run: Path) -> str:
    """`apecache fit-head` with everything that differs from its defaults."""
    words = ["apecache", "fit-head", str(store.path), "--recipe", best.recipe, "--out", f"{run}-again"]
    words += [word for setting in best.settings for word in ("--set", setting)]
    usual, splits = FitSpec(), fit.splits
    options = {
        "--train-split": (splits.train, usual.splits.train),
        "--dev-split": (splits.dev, usual.splits.dev),
        "--dev-images": (splits.dev_images, usual.splits.dev_images),
        "--dev-seed": (splits.seed, usual.splits.seed),
        "--seed": (fit.seed, usual.seed),
        "--image-features": (fit.image_features, None),
        "--text-features": (fit.text_features, None),
    }
    given = [word for name, (value, default) in options.items() if value != default for word in (name, str(value))]
    return shlex.join([*words, *given])
