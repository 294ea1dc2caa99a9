"""Sweeps: many settings of recipes on one store, small heads of one structure trained together.

Everything is chosen on the dev split. A trial is one point of the space, with several seeds if asked for; its value is
the mean over seeds of the best mean recall on dev. A sweep that was broken off goes on: finished trials stand in
`trials.jsonl`, and only the population that was under way is trained again.
"""

import json
import math
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from scipy.special import stdtrit

from apecache.errors import MismatchError, MissingExtraError, OptionError, RecipeError, RunError
from apecache.fingerprint import Fingerprint, Json
from apecache.heads.checkpoint import DESCRIPTION
from apecache.heads.stacked import Streams
from apecache.recipes.recipe import Recipe
from apecache.space import Dimension, Space, Value, Values
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs
from apecache.train.checkpoint import load_checkpoint, save_checkpoint
from apecache.train.fit_head import FitSpec, choose_device, fit_head, load_splits, require_kind
from apecache.train.initial import initial_model
from apecache.train.loop import Plan, Training
from apecache.train.population import split_members, train_together
from apecache.train.run_folder import RECIPE, locked

TRIALS, DESCRIBED, WORK, JOURNAL, COMMAND = "trials.jsonl", "sweep.json", "work", "optuna.journal", "command.txt"
ETA = 3
WAVE = 64
"""Trials that are planned at once; the tree-structured sampler plans as many as train together."""


@dataclass(frozen=True)
class SweepSpec:
    """`seeds`: fits of each trial, with seeds from `fit.seed` on. `seed`: of the sampler. `halving`: trials run to a
    ninth of their epochs, the best third of them to a third, the best third of those to the end (successive halving,
    Jamieson and Talwalkar 2016, algorithm 1), in groups of up to `WAVE`. `keep_going`: a trial that fails is a line
    with its error, not the end of the sweep. `population`: heads that train together at most, within `memory_bytes`.
    Without halving `n_trials` may grow when a sweep goes on."""

    n_trials: int = 20
    sampler: Literal["random", "grid", "tpe"] = "random"
    seeds: int = 1
    seed: int = 0
    halving: bool = False
    keep_going: bool = False
    population: int = 16
    memory_bytes: int = 2 * 2**30
    fit: FitSpec = field(default_factory=FitSpec)


@dataclass(frozen=True)
class Trial:
    """`recalls`: best mean recall on dev of each seed; `low`, `high`: 95 % interval of their mean (Student; None for
    one seed). `state`: `done`, `stopped` by halving, or `failed` with its `error`."""

    number: int
    recipe: str
    settings: tuple[str, ...]
    values: dict[str, Json]
    state: str
    epochs: int = 0
    recalls: tuple[float, ...] = ()
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    error: str = ""


@dataclass(frozen=True)
class SweepReport:
    """`trials`: the best on dev first. `command` makes `run`, the best trial with the first seed, again."""

    folder: Path
    run: Path
    best: Trial
    command: str
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class _Data:
    train: FeaturePairs
    dev: FeaturePairs
    require_kinds: Callable[[Recipe], None]


@dataclass(frozen=True)
class _Planned:
    number: int
    values: Values
    recipe: Recipe


def sweep(
    store: FeatureStore,
    space: Space,
    out: Path,
    spec: SweepSpec | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
) -> SweepReport:
    """Run, or go on with, a sweep; then fit the best trial into `out`/best.

    Raises:
        OptionError: settings that make no sense. MismatchError: `out` holds another sweep. RunError: `out` holds
        something else, or no trial succeeded. RecipeError: a trial failed, without `keep_going`. Others as `fit_head`.
    """
    spec = spec or SweepSpec()
    if min(spec.n_trials, spec.seeds, spec.population) < 1:
        raise OptionError("n_trials, seeds and population must be at least 1")
    data = _load(store, spec.fit)
    with locked(out):
        _require_same(out, _identity(store, space, spec))
        trials = read_trials(out)
        points = list(space.grid())[: spec.n_trials] if spec.sampler == "grid" else None
        total = len(points) if points is not None else spec.n_trials
        size = WAVE if spec.sampler != "tpe" else max(1, spec.population // spec.seeds)
        for begin in range(0, total, size):
            numbers = range(begin, min(begin + size, total))
            if not set(numbers) <= set(trials):
                wave = _Wave(out, spec, space, data, trials, progress)
                wave.run(_plan(wave, numbers, points))
        ranked = _ranked(trials)
    best = ranked[0]
    if best.mean is None:
        raise RunError(f"none of {len(ranked)} trials succeeded; the first failed with: {best.error}")
    run, recipe = out / "best", space.recipe(best.values)
    if not _is_run_of(run, recipe):
        fit_head(store, recipe, run, replace(spec.fit, overwrite=(run / DESCRIPTION).is_file()))
    command = _command(store, best, spec.fit, run)
    _replace(out / COMMAND, f"{command}\n")
    return SweepReport(out, run, best, command, tuple(ranked))


def read_trials(out: Path) -> dict[int, Trial]:
    """The finished trials of a sweep's folder, by number."""
    path = out / TRIALS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [Trial(**json.loads(line)) for line in lines]
    return {t.number: replace(t, settings=tuple(t.settings), recalls=tuple(t.recalls)) for t in found}


def _load(store: FeatureStore, fit: FitSpec) -> _Data:
    arrays = store.array("image", fit.image_features), store.array("text", fit.text_features)
    train, dev = load_splits(store, *arrays, fit.splits, choose_device(fit.device))

    def require_kinds(recipe: Recipe) -> None:
        for array, head in zip(arrays, (recipe.image, recipe.text), strict=True):
            require_kind(array, head, recipe.name)

    return _Data(train, dev, require_kinds)


def _identity(store: FeatureStore, space: Space, spec: SweepSpec) -> Fingerprint:
    """What must not change when a sweep goes on."""
    settings = asdict(spec)
    for name in ("keep_going",) if spec.halving else ("keep_going", "n_trials"):
        del settings[name]
    for name in ("device", "overwrite", "save_seconds"):
        del settings["fit"][name]
    dimensions = {name: d.model_dump(mode="json") for name, d in space.dimensions.items()}
    recipes = {name: space.recipe({"recipe": name}).model_dump(mode="json") for name in space.recipes}
    described = {"data": store.digest, "space": dimensions, "recipes": recipes, **settings}
    return Fingerprint(json.loads(json.dumps(described)))


def _require_same(out: Path, identity: Fingerprint) -> None:
    path = out / DESCRIBED
    if not path.is_file():
        if any(out.iterdir()):
            raise RunError(f"{out} exists and is no sweep; choose another --out")
        _replace(path, json.dumps(dict(identity.fields), indent=1))
        return
    differences = identity.difference(Fingerprint(json.loads(path.read_text(encoding="utf-8"))))
    if differences:
        raise MismatchError(
            f"{out} holds another sweep ({differences[0][0]} differs); choose another --out", differences
        )


def _replace(path: Path, text: str) -> None:
    """The whole file at once: after a kill the old or the new one is there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _Wave:
    """Trials that are planned at once. `results`: (best recall, epochs, failure) of each (trial, seed)."""

    def __init__(
        self,
        out: Path,
        spec: SweepSpec,
        space: Space,
        data: _Data,
        trials: dict[int, Trial],
        progress: Callable[[Trial], None],
    ) -> None:
        self.out, self.spec, self.space, self.data = out, spec, space, data
        self.trials, self.progress = trials, progress
        self.results: dict[tuple[int, int], tuple[float, int, str]] = {}

    def run(self, planned: Sequence[_Planned]) -> None:
        (self.out / WORK).mkdir(exist_ok=True)
        rungs = [ETA**2, ETA, 1] if self.spec.halving else [1]
        present = list(planned)
        for rung, share in enumerate(rungs):
            last = share == 1
            self._climb(present, rung, share, last)
            if not last:
                present = self._promoted(present)
        shutil.rmtree(self.out / WORK)

    def _climb(self, planned: Sequence[_Planned], rung: int, share: int, last: bool) -> None:
        """Train everyone up to a share of their epochs; what a killed process had done is read."""
        keys = [(one, seed) for one in planned for seed in range(self.spec.seeds)]
        ready = [(key, member) for key in keys if (member := self._member(*key, rung)) is not None]
        members, plans = [m for _, m in ready], [Plan.of(m.recipe, self.data.train) for _, m in ready]
        for part in split_members(members, plans, self.spec.population, self.spec.memory_bytes):
            names = [(ready[i][0][0].number, ready[i][0][1]) for i in part]
            path = self.out / WORK / f"{rung}-{names[0][0]}-{names[0][1]}.json"
            if not path.is_file():
                self._train(names, [members[i] for i in part], plans[part[0]], rung, share)
                _replace(path, json.dumps([(name, self.results[name]) for name in names]))
            for name, result in json.loads(path.read_text(encoding="utf-8")):
                self.results[tuple(name)] = tuple(result)
            for one in planned if last else ():
                self.finish(one, "done")
        for one in planned:
            if any(self.results.get((one.number, seed), (0, 0, ""))[2] for seed in range(self.spec.seeds)):
                self.finish(one, "failed")

    def _member(self, one: _Planned, seed: int, rung: int) -> Training | None:
        """As it stands at the beginning of a rung; None for one that failed."""
        key, number = (one.number, seed), self.spec.fit.seed + seed
        if self.results.get(key, (0, 0, ""))[2]:
            return None
        try:
            self.data.require_kinds(one.recipe)
            model, _ = initial_model(one.recipe, self.data.train, self.data.dev, number)
            member = Training(model, one.recipe, number)
            if member.optimiser is None and Plan.of(one.recipe, self.data.train).n_steps:
                raise RecipeError(f"recipe {one.recipe.name}: nothing would be trained")
        except RecipeError as error:
            self.results[key] = (-math.inf, 0, str(error))
            return None
        return member

    def _train(self, names: list[tuple[int, int]], members: list[Training], plan: Plan, rung: int, share: int) -> None:
        streams = Streams.seeded([self.spec.fit.seed + seed + 1 for _, seed in names], self.data.train.place)
        if rung:
            for i, member in enumerate(members):
                with torch.random.fork_rng(devices=_cuda(streams.device)), streams.use(i):
                    member.restore(*load_checkpoint(self._folder(names[i], rung - 1)))
        until = -(-plan.n_epochs // share)
        failures = train_together(members, streams, self.data.train, self.data.dev, plan, until)
        for i, (name, member) in enumerate(zip(names, members, strict=True)):
            recall = member.best.recall if math.isfinite(member.best.recall) else -1.0
            self.results[name] = (recall, member.epoch, failures.get(i, ""))
            if share > 1 and i not in failures:
                self._folder(name, rung).mkdir(exist_ok=True)
                with torch.random.fork_rng(devices=_cuda(streams.device)), streams.use(i):
                    save_checkpoint(self._folder(name, rung), member.tensors(), member.state())

    def _folder(self, name: tuple[int, int], rung: int) -> Path:
        return self.out / WORK / f"{rung}-member-{name[0]}-{name[1]}"

    def _promoted(self, planned: Sequence[_Planned]) -> list[_Planned]:
        """The best third of those that did not fail; the others end here."""
        alive = [one for one in planned if not self._failures(one)]
        order = sorted(alive, key=lambda one: (-fmean(self._recalls(one)), one.number))
        count = -(-len(alive) // ETA)
        for one in order[count:]:
            self.finish(one, "stopped")
        return sorted(order[:count], key=lambda one: one.number)

    def _recalls(self, one: _Planned) -> list[float]:
        return [self.results[one.number, seed][0] for seed in range(self.spec.seeds)]

    def _failures(self, one: _Planned) -> list[str]:
        found = (self.results.get((one.number, seed)) for seed in range(self.spec.seeds))
        return [result[2] for result in found if result and result[2]]

    def finish(self, one: _Planned, state: str) -> None:
        """Write a trial's line, once the results of all its seeds are there."""
        keys = [(one.number, seed) for seed in range(self.spec.seeds)]
        if one.number in self.trials or (
            state == "done" and (self._failures(one) or not set(keys) <= set(self.results))
        ):
            return
        trial = Trial(
            one.number, self.space.recipe_name(one.values), self.space.settings(one.values), one.values, state
        )
        if state == "failed":
            trial = replace(trial, error=self._failures(one)[0])
            if not self.spec.keep_going:
                raise RecipeError(
                    f"trial {one.number} ({' '.join(trial.settings)}): {trial.error}; or add --keep-going"
                )
        else:
            recalls = self._recalls(one)
            epochs = max(self.results[key][1] for key in keys)
            trial = replace(trial, epochs=epochs, recalls=tuple(recalls), **_interval(recalls))
        self.trials[one.number] = trial
        lines = (json.dumps(asdict(self.trials[number]), allow_nan=False) for number in sorted(self.trials))
        _replace(self.out / TRIALS, "".join(f"{line}\n" for line in lines))
        self.progress(trial)


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _interval(recalls: Sequence[float]) -> dict[str, Any]:
    mean, n = fmean(recalls), len(recalls)
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(stdtrit(n - 1, 0.975)) * stdev(recalls) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _plan(wave: _Wave, numbers: range, points: list[Values] | None) -> list[_Planned]:
    """Points of these trials; those that make no recipe fail at once."""
    space, spec = wave.space, wave.spec
    if points is not None:
        chosen = [points[number] for number in numbers]
    elif spec.sampler == "tpe":
        chosen = _ask(wave.out, space, spec, wave.trials, numbers)
    else:
        chosen = [space.draw(spec.seed, number) for number in numbers]
    planned = []
    for number, values in zip(numbers, chosen, strict=True):
        try:
            recipe = space.recipe(values)
            if not recipe.trains_heads_alone:
                raise RecipeError(f"recipe {recipe.name} trains within the towers; use fit-encoder")
            planned.append(_Planned(number, values, recipe))
        except RecipeError as error:
            wave.results.update({(number, seed): (-math.inf, 0, str(error)) for seed in range(spec.seeds)})
            wave.finish(_Planned(number, values, Recipe.model_construct(name="")), "failed")
    return planned


def _ask(out: Path, space: Space, spec: SweepSpec, trials: dict[int, Trial], numbers: range) -> list[Values]:
    """Points by Optuna's tree-structured Parzen estimator, from the trials of earlier waves. The journal is made anew
    from them, and each point has a seed of its own, so that a sweep that goes on chooses what it would have chosen."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise MissingExtraError("optuna", "sweep") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (out / JOURNAL).unlink(missing_ok=True)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name="apecache", direction="maximize")
    earlier = [
        trials[number] for number in sorted(trials) if number < numbers.start and trials[number].mean is not None
    ]
    study.add_trials([_told(optuna, space, trial) for trial in earlier])
    chosen = []
    for number in numbers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = optuna.samplers.TPESampler(seed=spec.seed * 1_000_003 + number, constant_liar=True)
        asked = study.ask()
        chosen.append(space.choose(lambda name, dimension, asked=asked: _suggest(asked, name, dimension)))  # type: ignore[misc]
    return chosen


def _told(optuna: Any, space: Space, trial: Trial) -> Any:
    named = {name: space.dimensions[name] for name in trial.values}
    params = {n: json.dumps(v) if named[n].choice is not None else v for n, v in trial.values.items()}
    distributions = {name: _distribution(optuna, dimension) for name, dimension in named.items()}
    return optuna.trial.create_trial(params=params, distributions=distributions, value=trial.mean)


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    kinds = optuna.distributions
    if dimension.choice is not None:
        return kinds.CategoricalDistribution([json.dumps(value) for value in dimension.choice])
    if dimension.int_ is not None:
        return kinds.IntDistribution(*dimension.int_)
    low, high = dimension.log or dimension.float_ or (0.0, 0.0)
    return kinds.FloatDistribution(low, high, log=dimension.log is not None)


def _suggest(asked: Any, name: str, dimension: Dimension) -> Value:
    if dimension.choice is not None:
        return json.loads(asked.suggest_categorical(name, [json.dumps(value) for value in dimension.choice]))
    if dimension.int_ is not None:
        return asked.suggest_int(name, *dimension.int_)
    low, high = dimension.log or dimension.float_ or (0.0, 0.0)
    return asked.suggest_float(name, low, high, log=dimension.log is not None)


def _ranked(trials: dict[int, Trial]) -> list[Trial]:
    """Whole trials before stopped ones before failed ones; then by their mean on dev."""
    states = ("done", "stopped", "failed")
    return sorted(trials.values(), key=lambda t: (states.index(t.state), -(t.mean or 0.0), t.number))


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
