"""Launches and waits of one step of each trained recipe of heads.

    python -m benchmarks.speed.launches
    python -m benchmarks.speed.launches --quick             # two recipes, K = 1 and 8
    python -m benchmarks.speed.launches --device cuda       # on a card

On an accelerator each operation is one launch or more, and for small heads launches take longer
than what they compute. `launches` counts the operations of a step that compute or move numbers,
views left out, as torch dispatches them: a lower bound of the kernels. `waits` counts those whose
result the host reads; on a CPU these may be numbers of the host itself, such as the coefficient of
mixtures. `solo` is a step of fit-head, `recorded` the same as accelerators replay it. `K = n` is one step of n members together, not
recorded as a graph, in the way of accelerators on whichever device this runs.
"""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apecache.device import resolve_device
from apecache.recipes.recipe import load_recipe, zoo_names
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import Population, stack_key
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.initial import initial_model
from apecache.train.loop import draw_epoch, take_step
from apecache.train.recorded_steps import RecordedSteps, can_be_recorded
from benchmarks.record import Goal, print_goals, print_table, write_result

N_IMAGES = 512
BATCH = 64
DIMS = (96, 64)
MEMBERS = (1, 8, 32)
FEW_STEPS = 2
MANY_STEPS = 6
MOST_WEIGHTS = 2**24
"""Larger populations are left out: launches do not depend on their number of members."""
"""What an epoch does once is in both counts, and not in their difference."""
WAITING = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
)
ALLOCATING = (
    "_efficientzerotensor",
    "_record_function_enter_new",
    "_record_function_exit",
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
)
TARGETS = {("projection", "recorded"): 4.0, ("projection", "K = 32"): 70.0}


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    device = resolve_device(options.device)
    rows = [recipe_row(name, options.members, device) for name in options.recipes]
    print_table(rows)
    goals = reached_goals(rows)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("speed-launches", goals=goals, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Launches and waits of one step.")
    parser.add_argument("--recipes", nargs="+", default=trained_recipes())
    parser.add_argument("--members", type=int, nargs="+", default=list(MEMBERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.quick:
        options.recipes = ["projection", "gated"]
        options.members = [1, 8]
    return options


def trained_recipes() -> list[str]:
    """Return the packaged recipes of heads that take steps."""
    recipes = [load_recipe(name) for name in zoo_names()]
    return [r.name for r in recipes if r.trains_heads_alone and r.schedule.epochs]


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the operations that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_launches = 0
        self.n_waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in WAITING:
            self.n_waits += 1
        if not func.is_view and name not in ALLOCATING:
            self.n_launches += 1
        return func(*args, **(kwargs or {}))


def recipe_row(name: str, members: list[int], device: torch.device) -> dict[str, Any]:
    """Count a step of one recipe, alone and in populations."""
    row: dict[str, Any] = {"recipe": name}
    row |= per_step("solo", lambda n_steps: solo_steps(name, device, n_steps))
    recorded = None
    if can_be_recorded(training(name, 0, device)[0], features(device, False)):
        recorded = per_step("recorded", lambda n: launches_beside_a_graph(name, device, n))
    if recorded is not None:
        # The graph itself is one launch more.
        row["recorded launches"] = recorded["recorded launches"] + 1
    for count in members:
        fit, plan = training(name, 0, device)
        if stack_key(fit, plan) is None:
            row["stacks"] = "no"
            break
        row["stacks"] = "yes"
        if count * sum(parameter.numel() for parameter in fit.model.parameters()) > MOST_WEIGHTS:
            continue
        together = partial(population_steps, name, device, count)
        row |= per_step(f"K = {count}", together)
    return row


def per_step(case: str, prepare: Callable[[int], Callable[[], None]]) -> dict[str, float]:
    """Count a step of what `prepare` returns for a number of steps."""
    counts: list[LaunchCounter] = []
    for n_steps in (FEW_STEPS, MANY_STEPS):
        action = prepare(n_steps)
        with LaunchCounter() as counter:
            action()
        counts.append(counter)
    few, many = counts
    n_steps = MANY_STEPS - FEW_STEPS
    return {
        f"{case} launches": (many.n_launches - few.n_launches) / n_steps,
        f"{case} waits": (many.n_waits - few.n_waits) / n_steps,
    }


def training(name: str, seed: int, device: torch.device) -> tuple[HeadFit, StepCount]:
    recipe = load_recipe(name, [f"schedule.batch_size={BATCH}"])
    if recipe.image.cut == "tokens":
        recipe = load_recipe(
            name,
            [f"schedule.batch_size={BATCH}", "image.n_heads=2", "text.n_heads=2"],
        )
    train = features(device, recipe.image.cut == "tokens")
    model, _ = initial_model(recipe, train=train, dev=train, seed=seed)
    return HeadFit(model, recipe, seed), StepCount.of(recipe, train)


def features(device: torch.device, tokens: bool) -> FeaturePairs:
    """Make features of both sides, a caption for each image."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(N_IMAGES, 4, dim) if tokens else (N_IMAGES, dim) for dim in DIMS]
    image, text = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return FeaturePairs(
        image=image,
        text=text,
        first_text=torch.arange(N_IMAGES + 1),
        device=device,
    )


def solo_steps(name: str, device: torch.device, n_steps: int) -> Callable[[], None]:
    """Return some steps of fit-head, without the first one."""
    fit, plan = training(name, 0, device)
    drawn = draw_epoch(fit, features(device, fit.recipe.image.cut == "tokens"), plan)
    fit.model.train()
    take_step(fit, islice(drawn, plan.accumulate), plan)
    batches = [list(islice(drawn, plan.accumulate)) for _ in range(n_steps)]

    def steps() -> None:
        with seeded(1, device):
            for step_batches in batches:
                take_step(fit, iter(step_batches), plan)

    return steps


def launches_beside_a_graph(name: str, device: torch.device, n_steps: int) -> Callable[[], None]:
    """Return some steps of a recorded fit, whose graph does nothing when it is replayed."""
    fit, _ = training(name, 0, device)
    plan = StepCount(n_steps=4 * n_steps, per_epoch=n_steps, accumulate=1)
    train = features(device, fit.recipe.image.cut == "tokens")
    steps = RecordedSteps(fit, train, plan, recorder=_without_effect)
    steps.take_steps(lambda _: None)
    fit.in_epoch = 0
    return lambda: steps.take_steps(lambda _: None)


def _without_effect(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    result = run()
    return lambda: result


def population_steps(
    name: str,
    device: torch.device,
    count: int,
    n_steps: int,
) -> Callable[[], None]:
    """Return some steps of a population, without the first ones; gathering is counted."""
    fits = [training(name, seed, device) for seed in range(count)]
    members = [fit for fit, _ in fits]
    plan = StepCount(n_steps=2 * n_steps, per_epoch=n_steps, accumulate=fits[0][1].accumulate)
    streams = MemberGenerators.seeded(list(range(len(members))), device)
    population = Population(members, streams, plan, few_launches=True)
    for group in population.groups:
        group.recorder = None
    train = features(device, members[0].recipe.image.cut == "tokens")
    population.take_steps(train)
    for member in members:
        member.in_epoch = 0
    return lambda: population.take_steps(train)


def reached_goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Compare launches with their targets; no step of any recipe may wait."""
    goals: list[Goal] = []
    for row in rows:
        for (name, case), target in TARGETS.items():
            if row["recipe"] == name and f"{case} launches" in row:
                goals.append(
                    Goal(
                        name=f"launches of a step, {name}, {case}",
                        value=row[f"{case} launches"],
                        target=target,
                        better="lower",
                    )
                )
    waits = [
        value
        for row in rows
        if row["recipe"] == "projection"
        for key, value in row.items()
        if key.endswith("waits")
    ]
    goals.append(Goal(name="waits of projection", value=max(waits), target=0.0, better="lower"))
    return goals


if __name__ == "__main__":
    main()
