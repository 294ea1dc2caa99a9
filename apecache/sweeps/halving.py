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
from typing import Literal, NamedTuple

from apecache.errors import RecipeError
from apecache.metrics.retrieval import chance_recalls
from apecache.recipes.recipe import Recipe
from apecache.runs.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from apecache.storage.replace import replace_text
from apecache.sweeps.data import SweepData, SweepSplits
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import (
    members_state,
    restore_members,
    split_members,
    train_together,
)
from apecache.sweeps.samplers import ask_optuna
from apecache.sweeps.space import Space, Values
from apecache.sweeps.trials import Trial, interval, log_trial, write_trials
from apecache.train.fit import HeadFit, StepCount
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
class TrialPlan:
    """Hold a trial before it is fitted: its number, its point of the space and its recipe."""

    number: int
    values: Values
    recipe: Recipe


FitKey = tuple[int, int]
"""The trial's number, and the position of the seed among the trial's seeds."""


class FitResult(NamedTuple):
    """Hold what a fit reached at the end of a rung."""

    recall: float
    """Best mean recall on dev, in percent; minus infinity if the fit failed."""
    epochs: int
    """Epochs trained."""
    error: str
    """Why the fit failed; empty if it did not."""


Results = dict[FitKey, FitResult]


@dataclass(frozen=True, kw_only=True)
class FitGroup:
    """Name the fits that train together up to a fraction of their epochs."""

    keys: tuple[FitKey, ...]
    values: tuple[str, ...]
    """The point of each fit's trial, as JSON."""
    rung: int
    divisor: int
    """The fits train up to their number of epochs divided by this."""

    @staticmethod
    def of(fits: Sequence[tuple[TrialPlan, int]], rung: int, divisor: int) -> "FitGroup":
        """Build the group of these fits: (trial, position of the seed)."""
        keys = []
        values = []
        for trial, seed_position in fits:
            keys.append((trial.number, seed_position))
            values.append(json.dumps(trial.values))
        return FitGroup(keys=tuple(keys), values=tuple(values), rung=rung, divisor=divisor)

    def __str__(self) -> str:
        first_trial, _ = self.keys[0]
        return f"a population of {len(self.keys)} heads, of which the first is trial {first_trial},"


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
        divisors = [1]
        if self.spec.halving:
            divisors = [ETA**power for power in reversed(range(self.spec.rungs))]
        remaining = list(planned)
        for rung, divisor in enumerate(divisors):
            self._train_rung(remaining, rung=rung, divisor=divisor)
            if divisor > 1:
                remaining = self._promoted(remaining)
        # Checkpoints and results of rungs are read again after an interruption: keep them until
        # every trial has its line.
        shutil.rmtree(self.out / WORK)

    def _train_rung(self, planned: Sequence[TrialPlan], rung: int, divisor: int) -> None:
        """Train all trials of a rung; read what an earlier process trained.

        Args:
            planned: The trials that reached the rung.
            rung: Number of the rung, from 0.
            divisor: The fits train up to their number of epochs divided by this. 1 on the last
                rung, where a trial ends as soon as all its fits have results.
        """
        members: dict[FitKey, HeadFit] = {}
        fits = []
        for trial in planned:
            for seed_position in range(self.spec.seeds):
                member = self._member(trial, seed_position)
                if member is not None:
                    fits.append((trial, seed_position))
                    members[trial.number, seed_position] = member
        groups = self._groups(fits, members=members, rung=rung, divisor=divisor)
        finished = []
        missing = []
        for group in groups:
            if self._result_file(group).is_file():
                finished.append((group, self._read_results(group)))
            else:
                missing.append(group)
        ended: set[FitKey] = set()
        for group, results in chain(finished, self.train_groups(missing, members)):
            self.results |= results
            ended |= results.keys()
            rows = [(key, results[key]) for key in group.keys]
            # Results before the checkpoint goes: an interruption in between loses nothing.
            replace_text(self._result_file(group), json.dumps(rows))
            shutil.rmtree(self._population_folder(group), ignore_errors=True)
            if divisor == 1:
                for trial in planned:
                    # Fits of later groups still have the results of the rung before.
                    if ended.issuperset(self._keys(trial)):
                        self.finish(trial, "done")
        for trial in planned:
            if self._failures(trial):
                self.finish(trial, "failed")

    def _groups(
        self,
        fits: Sequence[tuple[TrialPlan, int]],
        members: Mapping[FitKey, HeadFit],
        rung: int,
        divisor: int,
    ) -> list[FitGroup]:
        """Divide the fits of a rung into populations.

        An interrupted sweep divides them in the same way, since its settings are fixed. So the
        first fit of a group is enough to name the group's files.
        """
        fits_of_splits: dict[SweepSplits, list[tuple[TrialPlan, int]]] = {}
        for trial, seed_position in fits:
            splits = self.data.splits(trial.recipe)
            fits_of_splits.setdefault(splits, []).append((trial, seed_position))
        groups = []
        # Heads that train together read the same features.
        for splits, alike in fits_of_splits.items():
            fits_to_train = [members[trial.number, seed_position] for trial, seed_position in alike]
            positions_of_groups = split_members(
                fits_to_train,
                plans=[StepCount.of(member.recipe, splits.train) for member in fits_to_train],
                train=splits.train,
                most=self.spec.population,
                max_bytes=self.spec.memory_bytes,
            )
            for positions in positions_of_groups:
                group_fits = [alike[position] for position in positions]
                groups.append(FitGroup.of(group_fits, rung, divisor))
        return groups

    def train_groups(
        self,
        groups: Sequence[FitGroup],
        members: Mapping[FitKey, HeadFit],
    ) -> Iterator[tuple[FitGroup, Results]]:
        """Train groups one after the other.

        Args:
            groups: The groups that have no results yet.
            members: The fits of all groups, as they stand at the beginning of the rung.

        Yields:
            Each group with its results, as soon as it is trained.
        """
        for group in groups:
            group_members = [members[key] for key in group.keys]
            yield group, self._train(group, group_members)

    def train_group(self, group: FitGroup) -> Results:
        """Train one group in a process that has not planned it."""
        members = []
        points = map(json.loads, group.values)
        for (number, seed_position), values in zip(group.keys, points, strict=True):
            recipe = self.data.completed(self.space.recipe(values))
            trial = TrialPlan(number=number, values=values, recipe=recipe)
            member = self._member(trial, seed_position)
            # The process that planned the group has built each of its fits once.
            assert member is not None
            members.append(member)
        return self._train(group, members)

    def _result_file(self, group: FitGroup) -> Path:
        """Return the file of a group's results at the end of its rung."""
        number, seed_position = group.keys[0]
        return self.out / WORK / f"{group.rung}-{number}-{seed_position}.json"

    def _read_results(self, group: FitGroup) -> Results:
        rows = json.loads(self._result_file(group).read_text("utf-8"))
        return {tuple(key): FitResult(*result) for key, result in rows}

    def _member(self, trial: TrialPlan, seed_position: int) -> HeadFit | None:
        """Build a fit before its first step; None for one that failed."""
        key = (trial.number, seed_position)
        fit_seed = self.spec.fit.seed + seed_position
        if key in self.results and self.results[key].error:
            return None
        try:
            self.data.require_kinds(trial.recipe)
            splits = self.data.splits(trial.recipe)
            model, _ = initial_model(
                trial.recipe,
                train=splits.train,
                dev=splits.dev,
                seed=fit_seed,
            )
            member = HeadFit(model, trial.recipe, fit_seed)
            if member.optimizer is None and StepCount.of(trial.recipe, splits.train).n_steps:
                raise RecipeError(f"recipe {trial.recipe.name}: nothing would be trained")
        except RecipeError as error:
            self.results[key] = FitResult(recall=-math.inf, epochs=0, error=str(error))
            return None
        return member

    def _train(self, group: FitGroup, members: Sequence[HeadFit]) -> Results:
        # `fit_head` seeds torch's generators with one more than the seed of the weights.
        seeds = [self.spec.fit.seed + seed_position + 1 for _, seed_position in group.keys]
        splits = self.data.splits(members[0].recipe)
        streams = MemberGenerators.seeded(seeds, splits.train.place)
        population_folder = self._population_folder(group)
        plan = StepCount.of(members[0].recipe, splits.train)
        # An interrupted population resumes, a later rung begins where the last one ended, and the
        # first rung begins with new weights.
        if (population_folder / CHECKPOINT).is_file():
            restore_members(members, streams, *load_checkpoint(population_folder))
        elif group.rung:
            for i, member in enumerate(members):
                with streams.alone(i):
                    folder = self._fit_folder(group.keys[i], group.rung - 1)
                    member.restore(*load_checkpoint(folder))
        # Rounded up: the first rung trains at least one epoch.
        n_epochs = -(-plan.n_epochs // group.divisor)
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            if time.monotonic() - saved >= self.spec.fit.save_seconds:
                population_folder.mkdir(exist_ok=True)
                tensors, state = members_state(members, streams)
                save_checkpoint(population_folder, tensors, state)
                saved = time.monotonic()

        failures = train_together(
            members,
            streams=streams,
            train=splits.train,
            dev=splits.dev,
            plan=plan,
            n_epochs=n_epochs,
            save=save,
        )
        results: Results = {}
        for i, (key, member) in enumerate(zip(group.keys, members, strict=True)):
            # Not -inf, which `write_trials` refuses: a fit without a finite recall ranks last.
            recall = member.best.recall if math.isfinite(member.best.recall) else -1.0
            results[key] = FitResult(
                recall=recall,
                epochs=member.epoch,
                error=failures.get(i, ""),
            )
            if group.divisor > 1 and i not in failures:
                folder = self._fit_folder(key, group.rung)
                folder.mkdir(exist_ok=True)
                with streams.alone(i):
                    save_checkpoint(folder, member.tensors(), member.state())
        return results

    def _fit_folder(self, key: FitKey, rung: int) -> Path:
        """Return where a fit's checkpoint at the end of a rung is."""
        number, seed_position = key
        return self.out / WORK / f"{rung}-member-{number}-{seed_position}"

    def _population_folder(self, group: FitGroup) -> Path:
        """Return where the checkpoint of a population is while it trains."""
        number, seed_position = group.keys[0]
        return self.out / WORK / f"{group.rung}-population-{number}-{seed_position}"

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
        keys = self._keys(trial)
        return [self.results[key].recall for key in keys]

    def _keys(self, trial: TrialPlan) -> list[FitKey]:
        """Return the keys of a trial's fits, in the order of their seeds."""
        return [(trial.number, seed_position) for seed_position in range(self.spec.seeds)]

    def _failures(self, trial: TrialPlan) -> list[str]:
        """Return the errors of a trial's fits, in the order of their seeds."""
        errors = []
        for key in self._keys(trial):
            if key in self.results and self.results[key].error:
                errors.append(self.results[key].error)
        return errors

    def _is_done(self, trial: TrialPlan) -> bool:
        """Return whether all fits of a trial have results, and none failed."""
        return not self._failures(trial) and self.results.keys() >= set(self._keys(trial))

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
        log_trial(trial)
        self.trials[one.number] = trial
        write_trials(self.out, self.trials)
        self.progress(trial)

    def _measured(self, trial: Trial, planned: TrialPlan) -> Trial:
        """Add the epochs, recalls, interval and chance of a trial's fits."""
        recalls = self._recalls(planned)
        epochs = max(self.results[key].epochs for key in self._keys(planned))
        dev = self.data.splits(planned.recipe).dev
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
                raise RecipeError(
                    f"recipe {recipe.name} trains within the towers, or freezes a head; use "
                    "fit-encoder"
                )
            completed = trial_batch.data.completed(recipe)
            planned.append(TrialPlan(number=number, values=values, recipe=completed))
        except RecipeError as error:
            for seed_position in range(spec.seeds):
                failure = FitResult(recall=-math.inf, epochs=0, error=str(error))
                trial_batch.results[number, seed_position] = failure
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
