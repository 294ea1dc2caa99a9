"""Train a batch of planned trials in populations of heads, with successive halving."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Literal

from apecache.errors import RecipeError
from apecache.metrics.retrieval import chance_recalls
from apecache.recipes.recipe import Recipe
from apecache.runs.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from apecache.storage.replace import replace_text
from apecache.sweeps.population.population import (
    members_state,
    restore_members,
    split_members,
    train_together,
)
from apecache.sweeps.population.stacked_heads import MemberGenerators
from apecache.sweeps.samplers import ask_optuna
from apecache.sweeps.space import Space, Values
from apecache.sweeps.trials import Trial, interval, write_trials
from apecache.train.batches import FeaturePairs
from apecache.train.fit import StepCount, Training
from apecache.train.head_data import FitSpec
from apecache.train.initial import initial_model

WORK = "work"
ETA = 3
WAVE = 64
"""Trials that are planned at once; the tree-structured sampler plans as many as train together."""


@dataclass(frozen=True)
class SweepSpec:
    """Hold the settings of a sweep. Without `halving`, a later call may raise `n_trials`."""

    n_trials: int = 20
    """Points of the space to try; of a grid, at most this many."""
    sampler: Literal["random", "grid", "tpe"] = "random"
    seeds: int = 1
    """Fits of each trial, with the seeds `fit.seed`, `fit.seed` + 1, …."""
    seed: int = 0
    """Seed of the sampler."""
    halving: bool = False
    """Stop trials early by successive halving (Jamieson and Talwalkar 2016, algorithm 1): all
    trials run to a share of their epochs, the best third of them to three times that share, and so
    on to the last epoch. Trials are compared in groups of up to `WAVE`."""
    keep_going: bool = False
    """Record a failed trial with its error, and continue with the others."""
    population: int = 16
    """The largest number of heads that train together."""
    memory_bytes: int = 2 * 2**30
    """The memory that heads which train together may take."""
    rungs: int = 3
    """Shares of the epochs at which `halving` compares; 3: a ninth, a third, all."""
    fit: FitSpec = field(default_factory=FitSpec)


@dataclass(frozen=True, kw_only=True)
class SweepData:
    """Hold the features of a sweep's splits, in memory."""

    train: FeaturePairs
    dev: FeaturePairs
    require_kinds: Callable[[Recipe], None]
    """Raises RecipeError if a head of the recipe does not take the kind of these features."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """Name a trial before it is fitted: its number, its point of the space and its recipe."""

    number: int
    values: Values
    recipe: Recipe


Name = tuple[int, int]
"""The trial's number, and the position of the seed among the trial's seeds."""
Results = dict[Name, tuple[float, int, str]]
"""For each fit: best mean recall on dev, epochs trained, and the error ("" without one)."""


@dataclass(frozen=True, kw_only=True)
class FitGroup:
    """Name the fits that train together up to a share of their epochs."""

    names: tuple[Name, ...]
    values: tuple[str, ...]
    """The point of each fit's trial, as JSON."""
    rung: int
    share: int
    """The fits train to one `share`-th of their epochs."""

    @staticmethod
    def of(fits: Sequence[tuple[TrialPlan, int]], rung: int, share: int) -> "FitGroup":
        """Build the group of these (trial, seed) fits."""
        names = []
        values = []
        for trial, seed in fits:
            names.append((trial.number, seed))
            values.append(json.dumps(trial.values))
        return FitGroup(names=tuple(names), values=tuple(values), rung=rung, share=share)

    def __str__(self) -> str:
        return (
            f"a population of {len(self.names)} heads, of which the first is trial "
            f"{self.names[0][0]},"
        )


class TrialBatch:
    """Run trials that were planned at once, and write their lines.

    Args:
        out: The folder of the sweep.
        trials: The finished trials of the sweep by number; the batch of trials adds its own.
        progress: Called with each trial that ends.
    """

    def __init__(
        self,
        out: Path,
        spec: SweepSpec,
        space: Space,
        data: SweepData,
        trials: dict[int, Trial],
        progress: Callable[[Trial], None],
    ) -> None:
        self.out = out
        self.spec = spec
        self.space = space
        self.data = data
        self.trials = trials
        self.progress = progress
        self.results: Results = {}

    def run(self, planned: Sequence[TrialPlan]) -> None:
        """Train the trials rung after rung, and drop the worse ones after each rung but the last.

        Raises:
            RecipeError: A trial failed, and the spec has no `keep_going`.
        """
        (self.out / WORK).mkdir(exist_ok=True)
        shares = [1]
        if self.spec.halving:
            shares = [ETA**power for power in reversed(range(self.spec.rungs))]
        present = list(planned)
        for rung, share in enumerate(shares):
            last = share == 1
            self._climb(present, rung=rung, share=share, last=last)
            if not last:
                present = self._promoted(present)
        # Checkpoints and results of rungs are read again after an interruption: keep them until
        # every trial has its line.
        shutil.rmtree(self.out / WORK)

    def _climb(self, planned: Sequence[TrialPlan], rung: int, share: int, last: bool) -> None:
        """Train all trials up to a share of their epochs; read what an earlier process trained."""
        fits = []
        members = []
        plans = []
        for trial in planned:
            for seed in range(self.spec.seeds):
                member = self._member(trial, seed, rung)
                if member is not None:
                    fits.append((trial, seed))
                    members.append(member)
        for member in members:
            plans.append(StepCount.of(member.recipe, self.data.train))
        positions_of_groups = split_members(
            members,
            plans=plans,
            most=self.spec.population,
            max_bytes=self.spec.memory_bytes,
        )
        groups = []
        for positions in positions_of_groups:
            group_fits = [fits[i] for i in positions]
            groups.append(FitGroup.of(group_fits, rung, share))
        missing = [group for group in groups if not self._file(group).is_file()]
        finished = [(group, self._read(group)) for group in groups if group not in missing]
        by_name = {}
        for (trial, seed), member in zip(fits, members, strict=True):
            by_name[trial.number, seed] = member
        for group, results in chain(finished, self.train_groups(missing, by_name)):
            self.results |= results
            rows = [(name, results[name]) for name in group.names]
            # Results before the checkpoint goes: an interruption in between loses nothing.
            replace_text(self._file(group), json.dumps(rows))
            shutil.rmtree(self._under_way(group), ignore_errors=True)
            for trial in planned if last else ():
                self.finish(trial, "done")
        for trial in planned:
            if self._failures(trial):
                self.finish(trial, "failed")

    def train_groups(
        self,
        groups: Sequence[FitGroup],
        members: Mapping[Name, Training],
    ) -> Iterator[tuple[FitGroup, Results]]:
        """Train groups one after the other.

        Args:
            groups: The groups that have no results yet.
            members: The fits of all groups, as they stand at the beginning of the rung.

        Yields:
            Each group with its results, as soon as it is trained.
        """
        for group in groups:
            group_members = [members[name] for name in group.names]
            yield group, self._train(group, group_members)

    def train_group(self, group: FitGroup) -> Results:
        """Train one group in a process that has not planned it."""
        members = []
        points = map(json.loads, group.values)
        for (number, seed), values in zip(group.names, points, strict=True):
            recipe = self.space.recipe(values)
            trial = TrialPlan(number=number, values=values, recipe=recipe)
            member = self._member(trial, seed, group.rung)
            if member is not None:
                members.append(member)
        return self._train(group, members)

    def _file(self, group: FitGroup) -> Path:
        number, seed = group.names[0]
        return self.out / WORK / f"{group.rung}-{number}-{seed}.json"

    def _read(self, group: FitGroup) -> Results:
        rows = json.loads(self._file(group).read_text("utf-8"))
        return {tuple(name): tuple(result) for name, result in rows}

    def _member(self, trial: TrialPlan, seed: int, rung: int) -> Training | None:
        """Build a fit as it stands at the beginning of a rung; None for one that failed."""
        key = (trial.number, seed)
        fit_seed = self.spec.fit.seed + seed
        if self.results.get(key, (0, 0, ""))[2]:
            return None
        try:
            self.data.require_kinds(trial.recipe)
            model, _ = initial_model(
                trial.recipe,
                train=self.data.train,
                dev=self.data.dev,
                seed=fit_seed,
            )
            member = Training(model, trial.recipe, fit_seed)
            if member.optimizer is None and StepCount.of(trial.recipe, self.data.train).n_steps:
                raise RecipeError(f"recipe {trial.recipe.name}: nothing would be trained")
        except RecipeError as error:
            self.results[key] = (-math.inf, 0, str(error))
            return None
        return member

    def _train(self, group: FitGroup, members: Sequence[Training]) -> Results:
        # `fit_head` seeds torch's generators with one more than the seed of the weights.
        seeds = [self.spec.fit.seed + seed + 1 for _, seed in group.names]
        streams = MemberGenerators.seeded(seeds, self.data.train.place)
        under_way = self._under_way(group)
        plan = StepCount.of(members[0].recipe, self.data.train)
        if (under_way / CHECKPOINT).is_file():
            restore_members(members, streams, *load_checkpoint(under_way))
        elif group.rung:
            for i, member in enumerate(members):
                with streams.alone(i):
                    folder = self._folder(group.names[i], group.rung - 1)
                    member.restore(*load_checkpoint(folder))
        # Rounded up: the first rung trains at least one epoch.
        n_epochs = -(-plan.n_epochs // group.share)
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            if time.monotonic() - saved >= self.spec.fit.save_seconds:
                under_way.mkdir(exist_ok=True)
                tensors, state = members_state(members, streams)
                save_checkpoint(under_way, tensors, state)
                saved = time.monotonic()

        failures = train_together(
            members,
            streams,
            self.data.train,
            self.data.dev,
            plan,
            n_epochs,
            save,
        )
        results: Results = {}
        for i, (name, member) in enumerate(zip(group.names, members, strict=True)):
            # Not -inf, which `write_trials` refuses: a fit without a finite recall ranks last.
            recall = member.best.recall if math.isfinite(member.best.recall) else -1.0
            results[name] = (recall, member.epoch, failures.get(i, ""))
            if group.share > 1 and i not in failures:
                folder = self._folder(name, group.rung)
                folder.mkdir(exist_ok=True)
                with streams.alone(i):
                    save_checkpoint(folder, member.tensors(), member.state())
        return results

    def _folder(self, name: Name, rung: int) -> Path:
        """Return where a fit's checkpoint at the end of a rung is."""
        number, seed = name
        return self.out / WORK / f"{rung}-member-{number}-{seed}"

    def _under_way(self, group: FitGroup) -> Path:
        """Return where the checkpoint of a population is while it trains."""
        number, seed = group.names[0]
        return self.out / WORK / f"{group.rung}-population-{number}-{seed}"

    def _promoted(self, planned: Sequence[TrialPlan]) -> list[TrialPlan]:
        """Return the best third of the trials that did not fail; end the others."""
        alive = [trial for trial in planned if not self._failures(trial)]
        # By number where recalls are equal, so that an interrupted sweep chooses the same trials.
        order = sorted(alive, key=lambda trial: (-fmean(self._recalls(trial)), trial.number))
        # Rounded up: at least one trial gets to the next rung.
        n_promoted = -(-len(alive) // ETA)
        for trial in order[n_promoted:]:
            self.finish(trial, "stopped")
        return sorted(order[:n_promoted], key=lambda trial: trial.number)

    def _recalls(self, trial: TrialPlan) -> list[float]:
        return [self.results[trial.number, seed][0] for seed in range(self.spec.seeds)]

    def _failures(self, trial: TrialPlan) -> list[str]:
        """Return the errors of a trial's fits, in the order of their seeds."""
        errors = []
        for seed in range(self.spec.seeds):
            result = self.results.get((trial.number, seed))
            if result and result[2]:
                errors.append(result[2])
        return errors

    def _is_done(self, trial: TrialPlan) -> bool:
        """Return whether all fits of a trial have results, and none failed."""
        keys = {(trial.number, seed) for seed in range(self.spec.seeds)}
        return not self._failures(trial) and keys <= set(self.results)

    def finish(self, one: TrialPlan, state: str) -> None:
        """Record a trial once. Do nothing if it is to be `done` and some fits have no result.

        Args:
            one: The trial as it was planned.
            state: `done`, `stopped` or `failed`.

        Raises:
            RecipeError: The trial failed, and the spec has no `keep_going`.
        """
        if one.number in self.trials:
            return
        if state == "done" and not self._is_done(one):
            return
        trial = Trial(
            number=one.number,
            recipe=self.space.recipe_name(one.values),
            settings=self.space.settings(one.values),
            values=one.values,
            state=state,
        )
        if state == "failed":
            trial = replace(trial, error=self._failures(one)[0])
            if not self.spec.keep_going:
                raise RecipeError(
                    f"trial {one.number} ({' '.join(trial.settings)}): {trial.error}; or add "
                    "--keep-going"
                )
        else:
            trial = self._measured(trial, one)
        self.trials[one.number] = trial
        write_trials(self.out, self.trials)
        self.progress(trial)

    def _measured(self, trial: Trial, planned: TrialPlan) -> Trial:
        """Add the epochs, recalls, interval and chance of a trial's fits."""
        recalls = self._recalls(planned)
        keys = [(planned.number, seed) for seed in range(self.spec.seeds)]
        epochs = max(self.results[key][1] for key in keys)
        dev = self.data.dev
        to_text, to_image = chance_recalls(dev.image_of_text, len(dev), relevance=dev.relevance)
        chance = fmean([*to_text.values(), *to_image.values()])
        return replace(
            trial,
            epochs=epochs,
            recalls=tuple(recalls),
            chance=chance,
            **interval(recalls, len(dev)),
        )


def plan_trials(
    trial_batch: TrialBatch,
    numbers: range,
    points: list[Values] | None,
) -> list[TrialPlan]:
    """Choose the points of trials and make their recipes.

    Args:
        trial_batch: Batch that will run them. A point that makes no recipe fails here at once.
        numbers: The numbers of the trials.
        points: All points of a grid; None for the other samplers.

    Returns:
        The trials to train, in the order of their numbers.
    """
    spec = trial_batch.spec
    planned = []
    for number, values in zip(numbers, _choose_points(trial_batch, numbers, points), strict=True):
        try:
            recipe = trial_batch.space.recipe(values)
            if not recipe.trains_heads_alone:
                raise RecipeError(f"recipe {recipe.name} trains within the towers; use fit-encoder")
            planned.append(TrialPlan(number=number, values=values, recipe=recipe))
        except RecipeError as error:
            for seed in range(spec.seeds):
                trial_batch.results[number, seed] = (-math.inf, 0, str(error))
            no_recipe = Recipe.model_construct(name="")
            trial_batch.finish(TrialPlan(number=number, values=values, recipe=no_recipe), "failed")
    return planned


def _choose_points(
    trial_batch: TrialBatch,
    numbers: range,
    points: list[Values] | None,
) -> list[Values]:
    space = trial_batch.space
    spec = trial_batch.spec
    if points is not None:
        return [points[number] for number in numbers]
    if spec.sampler == "tpe":
        return ask_optuna(
            trial_batch.out,
            space=space,
            seed=spec.seed,
            trials=trial_batch.trials,
            numbers=numbers,
        )
    return [space.draw(spec.seed, number) for number in numbers]
