"""Heads on the pretended device: no error, no wait in a step, and the results of the CPU."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from populations import DEV, TRAIN, make, pairs, solo, with_tokens
from pretended_device.register import DEVICE, Counts, Graph, largest_distance
from recipes import SMALL
from torch import Tensor, nn

from apecache.device import generator_states, seeded_generators
from apecache.heads.head import embed
from apecache.recipes.recipe import Recipe, load_recipe, zoo_names
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import Population, train_together
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.initial import initial_model
from apecache.train.loop import draw_epoch, take_step, take_steps
from apecache.train.model import evaluate_model
from apecache.train.recorded_steps import recorded_steps

CPU = torch.device("cpu")
TOLERANCE = 1e-5
N_STEPS = 4
ZOO = [name for name in zoo_names() if load_recipe(name).trains_heads_alone]
TRAINED = [name for name in ZOO if load_recipe(name).schedule.epochs]
CLOSED = sorted(set(ZOO) - set(TRAINED))


def on_device(on_host: FeaturePairs) -> FeaturePairs:
    """The same pairs, with features and token counts on the device."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(DEVICE)

    return replace(
        on_host,
        image=on_host.image.to(DEVICE),
        text=on_host.text.to(DEVICE),
        image_lengths=moved(on_host.image_lengths),
        text_lengths=moved(on_host.text_lengths),
        device=DEVICE,
    )


def short_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    short = ["schedule.batch_size=16", *settings]
    if load_recipe(name).image.cut == "tokens":
        short += ["image.n_heads=2", "text.n_heads=2"]
    return load_recipe(name, short)


def begin(recipe: Recipe, train: FeaturePairs) -> HeadFit:
    model, _ = initial_model(recipe, train=train, dev=train, seed=0)
    for module in model.modules():
        # Devices draw other numbers than the CPU.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    return HeadFit(model, recipe, 0)


def steps(training: HeadFit, train: FeaturePairs, n_warm: int = 0) -> Counts:
    """Take steps, and count what those after the first `n_warm` do."""
    plan = StepCount.of(training.recipe, train)
    drawn = draw_epoch(training, train, plan)
    losses = []
    with seeded(1, train.place):
        for _ in range(n_warm):
            losses.append(take_step(training, islice(drawn, plan.accumulate), plan))
        with Counts() as counts:
            for _ in range(N_STEPS - n_warm):
                losses.append(take_step(training, islice(drawn, plan.accumulate), plan))
    assert torch.isfinite(torch.stack(losses)).all()
    return counts


@pytest.mark.parametrize("content", [False, True], ids=["different images", "equal images"])
def test_a_fit_replays_steps_that_never_wait(content: bool) -> None:
    """Steps are recorded and replayed where no two images of a batch are equal."""
    recipe = short_recipe("projection", ["schedule.epochs=3"])
    train = pairs(160, 0, content)
    fits = []
    for features in (on_device(train), train):
        fit = begin(recipe, features)
        plan = StepCount.of(recipe, features)
        recorded = recorded_steps(fit, features, plan)
        replays = Graph.replays
        with seeded(1, features.place):
            for _ in range(3):
                if recorded is None:
                    take_steps(fit, draw_epoch(fit, features, plan), plan)
                else:
                    with Counts() as counts:
                        recorded.take_steps(lambda _: None)
                fit.in_epoch = 0
        if recorded is not None:
            # The rows of an epoch are sent without a wait too, and nothing is recorded any more.
            assert counts.waits == {}
            assert counts.races == []
            assert (Graph.replays - replays == 3 * plan.per_epoch - 1) == (not content)
        fits.append(fit)
    there, here = fits
    assert (
        largest_distance(embeddings(there, on_device(train)), embeddings(here, train)) < TOLERANCE
    )


def weights(training: HeadFit) -> list[Tensor]:
    return list(training.model.state_dict().values())


def embeddings(training: HeadFit, train: FeaturePairs) -> list[Tensor]:
    """What the heads make of all pairs.

    Compared instead of weights: a weight whose gradient is rounding alone, as that of a bias before
    a batch norm, may go anywhere, but changes no embedding.
    """
    model = training.model
    return [
        embed(model.image, train.image, train.image_lengths),
        embed(model.text, train.text, train.text_lengths),
    ]


def train_for(recipe: Recipe) -> FeaturePairs:
    train = pairs(80, 0)
    return with_tokens(train) if recipe.image.cut == "tokens" else train


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_trains_as_on_the_cpu_and_never_waits(name: str) -> None:
    recipe = short_recipe(name)
    train = train_for(recipe)
    there = begin(recipe, on_device(train))
    here = begin(recipe, train)
    counts = steps(there, on_device(train), n_warm=1)
    steps(here, train)
    ours = embeddings(there, on_device(train))
    assert largest_distance(ours, embeddings(here, train)) < TOLERANCE
    # A mixture's positives are counted on the device, where a batch has an image several times.
    mixes_groups = bool(recipe.augmentation.mixup) and recipe.schedule.epoch == "pairs"
    assert counts.n_waits <= (2 * (N_STEPS - 1) if mixes_groups else 0)
    assert counts.races == []


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_form_is_that_of_the_cpu(name: str) -> None:
    recipe = load_recipe(name)
    splits = [TRAIN, DEV]
    if name == "identity":
        # It needs features of one width on both sides.
        splits = [replace(split, image=split.image[:, :10].contiguous()) for split in splits]
    train, dev = splits
    there, _ = initial_model(recipe, train=on_device(train), dev=on_device(dev), seed=0)
    here, _ = initial_model(recipe, train=train, dev=dev, seed=0)
    report = evaluate_model(there, on_device(dev))
    assert report == evaluate_model(here, dev)


SETTINGS = {
    "captions": ["loss.captions=2"],
    "noise": ["augmentation.noise=0.1"],
    "mixup": ["augmentation.mixup=0.5"],
    "sigmoid": ["loss.kind=sigmoid"],
    "clipped": ["optimizer.clip=1.0"],
    "averaged": ["optimizer.ema=0.9"],
    "structure": ["loss.structure=0.5"],
    "lion": ["optimizer.kind=lion"],
    "accumulated": ["schedule.accumulate=2", "schedule.batch_size=8"],
}


@pytest.mark.parametrize("content", [False, True], ids=["different images", "equal images"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_no_setting_waits_in_a_step(settings: list[str], content: bool) -> None:
    recipe = short_recipe(SMALL, settings)
    train = on_device(pairs(160, 0, content))
    counts = steps(begin(recipe, train), train, n_warm=1)
    # A mixture's positives are counted on the device, where groups are mixed.
    allowed = 2 * (N_STEPS - 1) if "augmentation.mixup=0.5" in settings and content else 0
    assert counts.n_waits <= allowed
    assert counts.races == []


@pytest.mark.parametrize("sides", ["image", "text", "both"])
def test_features_on_the_host_are_streamed_without_a_wait(sides: str) -> None:
    recipe = short_recipe(SMALL)
    train = pairs(160, 0)
    streamed = on_device(train)
    if sides in ("image", "both"):
        streamed = replace(streamed, image=train.image)
    if sides in ("text", "both"):
        streamed = replace(streamed, text=train.text)
    there = begin(recipe, streamed)
    here = begin(recipe, train)
    counts = steps(there, streamed, n_warm=1)
    steps(here, train)
    assert largest_distance(weights(there), weights(here)) < TOLERANCE
    assert counts.waits == {}
    assert counts.races == []


def test_an_evaluation_is_that_of_the_cpu() -> None:
    train = pairs(80, 0, content=True)
    recipe = short_recipe(SMALL)
    there = begin(recipe, on_device(train))
    here = begin(recipe, train)
    assert evaluate_model(there.model, on_device(train)) == evaluate_model(here.model, train)


def test_a_seed_reaches_the_device_and_the_caller_keeps_its_numbers() -> None:
    before = generator_states(DEVICE)
    with seeded_generators(7, DEVICE):
        first = torch.rand(3, device=DEVICE).cpu()
    with seeded_generators(7, DEVICE):
        second = torch.rand(3, device=DEVICE).cpu()
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, generator_states(DEVICE)))


def test_work_on_the_cpu_leaves_the_device_alone() -> None:
    before = generator_states(DEVICE)[1]
    solo(["schedule.epochs=1"], 0)
    assert torch.equal(before, generator_states(DEVICE)[1])


def populations_of(
    content: bool,
    settings: Sequence[str] = (),
) -> tuple[list[HeadFit], FeaturePairs, StepCount, Any]:
    train = on_device(pairs(160, 0, content))
    made = [make([*settings, f"optimizer.lr={0.01 * (i + 1)}"], i, train) for i in range(3)]
    streams = MemberGenerators.seeded([1, 2, 3], DEVICE)
    return [training for training, _ in made], train, made[0][1], streams


@pytest.mark.parametrize("content", [False, True], ids=["different images", "equal images"])
def test_a_population_ends_where_fits_alone_end(content: bool) -> None:
    members, train, plan, streams = populations_of(content)
    replays = Graph.replays
    failures = train_together(
        members,
        streams=streams,
        train=train,
        dev=on_device(DEV),
        plan=plan,
        n_epochs=1000,
    )
    assert failures == {}
    # Steps are recorded and replayed where no two images of a batch are equal.
    assert (Graph.replays > replays) == (not content)
    for i, member in enumerate(members):
        alone = solo([f"optimizer.lr={0.01 * (i + 1)}"], i, pairs(160, 0, content))
        assert largest_distance(weights(member), weights(alone)) < TOLERANCE


@pytest.mark.parametrize("content", [False, True], ids=["different images", "equal images"])
def test_a_population_never_waits_in_a_step(content: bool) -> None:
    members, train, plan, streams = populations_of(content)
    population = Population(members, streams, plan)
    # The first epoch makes optimizer states and graphs.
    population.take_steps(train)
    for member in members:
        member.in_epoch = 0
    with Counts() as counts:
        population.take_steps(train)
    assert plan.per_epoch >= 5
    assert counts.waits == {}
    assert counts.races == []


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.kind=sigmoid", "loss.temperature=0.1"],
        ["loss.kind=sigmoid", "loss.temperature=0.1", "loss.captions=2"],
        ["loss.structure=1.0", "loss.structure_warmup=3"],
    ],
    ids=["sigmoid", "sigmoid of two captions", "structure"],
)
def test_other_losses_of_a_population_never_wait_and_end_where_fits_alone_end(
    settings: list[str],
) -> None:
    members, train, plan, streams = populations_of(False, settings)
    population = Population(members, streams, plan)
    population.take_steps(train)
    for member in members:
        member.in_epoch = 0
    with Counts() as counts:
        population.take_steps(train)
    assert counts.waits == {}
    assert counts.races == []
    members, train, plan, streams = populations_of(False, settings)
    train_together(
        members, streams=streams, train=train, dev=on_device(DEV), plan=plan, n_epochs=1000
    )
    for i, member in enumerate(members):
        alone = solo([*settings, f"optimizer.lr={0.01 * (i + 1)}"], i, pairs(160, 0, False))
        assert largest_distance(weights(member), weights(alone)) < 10 * TOLERANCE


@pytest.mark.parametrize("kind", ["freeze-align", "anchors", "transformer"])
def test_a_population_on_tokens_never_waits_and_ends_where_fits_alone_end(kind: str) -> None:
    settings = ["schedule.epochs=3"]
    for side in ("image", "text"):
        settings += [f"{side}.kind={kind}", f"{side}.n_heads=2"]
    on_host = with_tokens(pairs(160, 0))
    train = on_device(on_host)
    cases = [[*settings, f"optimizer.lr={0.002 * (i + 1)}"] for i in range(3)]
    made = [make(case, i, train) for i, case in enumerate(cases)]
    members = [training for training, _ in made]
    plan = made[0][1]
    population = Population(members, MemberGenerators.seeded([1, 2, 3], DEVICE), plan)
    replays = Graph.replays
    population.take_steps(train)
    for member in members:
        member.epoch = 1
        member.in_epoch = 0
    with Counts() as counts:
        population.take_steps(train)
    assert counts.waits == {}
    assert counts.races == []
    assert Graph.replays > replays
    for i, member in enumerate(members):
        alone, _ = make(cases[i], i, on_host)
        for _ in range(2):
            alone.in_epoch = 0
            take_steps(alone, draw_epoch(alone, on_host, plan), plan)
        found = embeddings(member, train)
        assert largest_distance(found, embeddings(alone, on_host)) < 10 * TOLERANCE
