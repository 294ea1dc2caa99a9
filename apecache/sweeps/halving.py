"""Running trials that were planned at once: populations of heads, rung after rung."""

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
from apecache.storage.atomic import replace_text
from apecache.sweeps.population.population import (
    members_state,
    restore_members,
    split_members,
    train_together,
)
from apecache.sweeps.population.stacked_heads import Streams
from apecache.sweeps.samplers import ask_optuna
from apecache.sweeps.space import Space, Values
from apecache.sweeps.trials import Trial, interval, write_trials
from apecache.train.batches import FeaturePairs
from apecache.train.head_data import FitSpec
from apecache.train.initial import initial_model
from apecache.train.loop import Plan, Training

WORK = "work"
ETA = 3
WAVE = 64
"""Trials that are planned at once; the tree-structured sampler plans as many as train together."""


@dataclass(frozen=True)
class SweepSpec:
    """`seeds`: fits of each trial, with seeds from `fit.seed` on. `seed`: of the sampler.
    `halving`: trials run to a share of their epochs, the best third of them to three times that,
    and so on to the end (successive halving, Jamieson and Talwalkar 2016, algorithm 1), in `rungs`
    (3: a ninth, a third, all) and in groups of up to `WAVE`. `keep_going`: a trial that fails is a
    line with its error, not the end of the sweep. `population`: heads that train together at most,
    within `memory_bytes`. Without halving `n_trials` may grow when a sweep goes on."""

    n_trials: int = 20
    sampler: Literal["random", "grid", "tpe"] = "random"
    seeds: int = 1
    seed: int = 0
    halving: bool = False
    keep_going: bool = False
    population: int = 16
    memory_bytes: int = 2 * 2**30
    rungs: int = 3
    fit: FitSpec = field(default_factory=FitSpec)


@dataclass(frozen=True, kw_only=True)
class SweepData:
    train: FeaturePairs
    dev: FeaturePairs
    require_kinds: Callable[[Recipe], None]


@dataclass(frozen=True, kw_only=True)
class Planned:
    number: int
    values: Values
    recipe: Recipe


Name = tuple[int, int]
"""A trial's number, and which of its seeds."""
Results = dict[Name, tuple[float, int, str]]
"""Best recall, epochs, and why it failed, if it did."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Fits that train together up to a share of their epochs. `values`: JSON of each one's
    point."""

    names: tuple[Name, ...]
    values: tuple[str, ...]
    rung: int
    share: int

    @staticmethod
    def of(fits: Sequence[tuple[Planned, int]], rung: int, share: int) -> "Group":
        values = tuple(json.dumps(one.values) for one, _ in fits)
        return Group(
            names=tuple((one.number, seed) for one, seed in fits),
            values=values,
            rung=rung,
            share=share,
        )

    def __str__(self) -> str:
        return (
            f"a population of {len(self.names)} heads, of which the first is trial "
            f"{self.names[0][0]},"
        )


class Wave:
    """Trials that are planned at once. `results`: those of each (trial, seed) so far."""

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

    def run(self, planned: Sequence[Planned]) -> None:
        (self.out / WORK).mkdir(exist_ok=True)
        rungs = (
            [ETA**power for power in reversed(range(self.spec.rungs))] if self.spec.halving else [1]
        )
        present = list(planned)
        for rung, share in enumerate(rungs):
            last = share == 1
            self._climb(present, rung=rung, share=share, last=last)
            if not last:
                present = self._promoted(present)
        shutil.rmtree(self.out / WORK)

    def _climb(self, planned: Sequence[Planned], rung: int, share: int, last: bool) -> None:
        """Train everyone up to a share of their epochs; what a killed process had done is read."""
        keys = [(one, seed) for one in planned for seed in range(self.spec.seeds)]
        ready = [(key, member) for key in keys if (member := self._member(*key, rung)) is not None]
        members = [m for _, m in ready]
        plans = [Plan.of(m.recipe, self.data.train) for _, m in ready]
        parts = split_members(
            members,
            plans=plans,
            most=self.spec.population,
            max_bytes=self.spec.memory_bytes,
        )
        groups = [Group.of([ready[i][0] for i in part], rung, share) for part in parts]
        missing = [group for group in groups if not self._file(group).is_file()]
        done = [(group, self._read(group)) for group in groups if group not in missing]
        by_name = {(one.number, seed): member for (one, seed), member in ready}
        for group, results in chain(done, self.train_groups(missing, by_name)):
            self.results |= results
            replace_text(
                self._file(group),
                json.dumps([(name, results[name]) for name in group.names]),
            )
            shutil.rmtree(self._under_way(group), ignore_errors=True)
            for one in planned if last else ():
                self.finish(one, "done")
        for one in planned:
            if any(
                self.results.get((one.number, seed), (0, 0, ""))[2]
                for seed in range(self.spec.seeds)
            ):
                self.finish(one, "failed")

    def train_groups(
        self,
        groups: Sequence[Group],
        members: Mapping[Name, Training],
    ) -> Iterator[tuple[Group, Results]]:
        """Each group with its results; `members` as they stand at the beginning of the rung."""
        for group in groups:
            yield group, self._train(group, [members[name] for name in group.names])

    def train_group(self, group: Group) -> Results:
        """One group by itself, in a process that has not planned it."""
        members = [
            self._member(
                Planned(number=number, values=values, recipe=self.space.recipe(values)),
                seed,
                group.rung,
            )
            for (number, seed), values in zip(
                group.names,
                map(json.loads, group.values),
                strict=True,
            )
        ]
        return self._train(group, [member for member in members if member is not None])

    def _file(self, group: Group) -> Path:
        return self.out / WORK / f"{group.rung}-{group.names[0][0]}-{group.names[0][1]}.json"

    def _read(self, group: Group) -> Results:
        return {
            tuple(name): tuple(result)
            for name, result in json.loads(self._file(group).read_text("utf-8"))
        }

    def _member(self, one: Planned, seed: int, rung: int) -> Training | None:
        """As it stands at the beginning of a rung; None for one that failed."""
        key = (one.number, seed)
        number = self.spec.fit.seed + seed
        if self.results.get(key, (0, 0, ""))[2]:
            return None
        try:
            self.data.require_kinds(one.recipe)
            model, _ = initial_model(
                one.recipe,
                train=self.data.train,
                dev=self.data.dev,
                seed=number,
            )
            member = Training(model, one.recipe, number)
            if member.optimiser is None and Plan.of(one.recipe, self.data.train).n_steps:
                raise RecipeError(f"recipe {one.recipe.name}: nothing would be trained")
        except RecipeError as error:
            self.results[key] = (-math.inf, 0, str(error))
            return None
        return member

    def _train(self, group: Group, members: Sequence[Training]) -> Results:
        streams = Streams.seeded(
            [self.spec.fit.seed + seed + 1 for _, seed in group.names],
            self.data.train.place,
        )
        under_way = self._under_way(group)
        plan = Plan.of(members[0].recipe, self.data.train)
        if (under_way / CHECKPOINT).is_file():
            restore_members(members, streams, *load_checkpoint(under_way))
        elif group.rung:
            for i, member in enumerate(members):
                with streams.alone(i):
                    member.restore(*load_checkpoint(self._folder(group.names[i], group.rung - 1)))
        until = -(-plan.n_epochs // group.share)
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            if time.monotonic() - saved >= self.spec.fit.save_seconds:
                under_way.mkdir(exist_ok=True)
                save_checkpoint(under_way, *members_state(members, streams))
                saved = time.monotonic()

        failures = train_together(
            members,
            streams,
            self.data.train,
            self.data.dev,
            plan,
            until,
            save,
        )
        results: Results = {}
        for i, (name, member) in enumerate(zip(group.names, members, strict=True)):
            recall = member.best.recall if math.isfinite(member.best.recall) else -1.0
            results[name] = (recall, member.epoch, failures.get(i, ""))
            if group.share > 1 and i not in failures:
                self._folder(name, group.rung).mkdir(exist_ok=True)
                with streams.alone(i):
                    save_checkpoint(
                        self._folder(name, group.rung),
                        member.tensors(),
                        member.state(),
                    )
        return results

    def _folder(self, name: Name, rung: int) -> Path:
        return self.out / WORK / f"{rung}-member-{name[0]}-{name[1]}"

    def _under_way(self, group: Group) -> Path:
        """Where the checkpoint of a population stands while it trains."""
        return self.out / WORK / f"{group.rung}-population-{group.names[0][0]}-{group.names[0][1]}"

    def _promoted(self, planned: Sequence[Planned]) -> list[Planned]:
        """The best third of those that did not fail; the others end here."""
        alive = [one for one in planned if not self._failures(one)]
        order = sorted(alive, key=lambda one: (-fmean(self._recalls(one)), one.number))
        count = -(-len(alive) // ETA)
        for one in order[count:]:
            self.finish(one, "stopped")
        return sorted(order[:count], key=lambda one: one.number)

    def _recalls(self, one: Planned) -> list[float]:
        return [self.results[one.number, seed][0] for seed in range(self.spec.seeds)]

    def _failures(self, one: Planned) -> list[str]:
        found = (self.results.get((one.number, seed)) for seed in range(self.spec.seeds))
        return [result[2] for result in found if result and result[2]]

    def finish(self, one: Planned, state: str) -> None:
        """Write a trial's line, once the results of all its seeds are there."""
        keys = [(one.number, seed) for seed in range(self.spec.seeds)]
        if one.number in self.trials or (
            state == "done" and (self._failures(one) or not set(keys) <= set(self.results))
        ):
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
            recalls = self._recalls(one)
            epochs = max(self.results[key][1] for key in keys)
            dev = self.data.dev
            to_text, to_image = chance_recalls(dev.image_of_text, len(dev), relevance=dev.relevance)
            chance = fmean([*to_text.values(), *to_image.values()])
            trial = replace(
                trial,
                epochs=epochs,
                recalls=tuple(recalls),
                chance=chance,
                **interval(recalls, len(dev)),
            )
        self.trials[one.number] = trial
        write_trials(self.out, self.trials)
        self.progress(trial)


def plan_trials(wave: Wave, numbers: range, points: list[Values] | None) -> list[Planned]:
    """Points of these trials; those that make no recipe fail at once."""
    space = wave.space
    spec = wave.spec
    if points is not None:
        chosen = [points[number] for number in numbers]
    elif spec.sampler == "tpe":
        chosen = ask_optuna(
            wave.out,
            space=space,
            seed=spec.seed,
            trials=wave.trials,
            numbers=numbers,
        )
    else:
        chosen = [space.draw(spec.seed, number) for number in numbers]
    planned = []
    for number, values in zip(numbers, chosen, strict=True):
        try:
            recipe = space.recipe(values)
            if not recipe.trains_heads_alone:
                raise RecipeError(f"recipe {recipe.name} trains within the towers; use fit-encoder")
            planned.append(Planned(number=number, values=values, recipe=recipe))
        except RecipeError as error:
            wave.results.update(
                {(number, seed): (-math.inf, 0, str(error)) for seed in range(spec.seeds)}
            )
            wave.finish(
                Planned(number=number, values=values, recipe=Recipe.model_construct(name="")),
                "failed",
            )
    return planned
