"""Small populations of heads, and fits of each member alone."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from recipes import SMALL
from torch import Tensor

from apecache.recipes.recipe import load_recipe
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import stack_key, train_together
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.initial import initial_model
from apecache.train.loop import run_training

CPU = torch.device("cpu")


def pairs(n_images: int, seed: int, content: bool = False) -> FeaturePairs:
    """Two noisy linear views of 6 hidden numbers per image; one to three captions each."""
    maps = torch.Generator().manual_seed(99)
    to_image = torch.randn(6, 12, generator=maps)
    to_text = torch.randn(6, 10, generator=maps)
    own = torch.Generator().manual_seed(seed)
    counts = 1 + torch.arange(n_images) % 3
    hidden = torch.randn(n_images, 6, generator=own)
    image = hidden @ to_image + 0.1 * torch.randn(n_images, 12, generator=own)
    owners = hidden.repeat_interleave(counts, 0)
    text = owners @ to_text + 0.1 * torch.randn(len(owners), 10, generator=own)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    equal = torch.arange(n_images) // 2 if content else None
    return FeaturePairs(image=image, text=text, first_text=first, content=equal)


TRAIN = pairs(160, 0)
DEV = pairs(32, 1)


def make(
    settings: Sequence[str],
    seed: int,
    train: FeaturePairs = TRAIN,
) -> tuple[HeadFit, StepCount]:
    recipe = load_recipe(SMALL, settings)
    return HeadFit(
        initial_model(recipe, train=train, dev=DEV, seed=seed)[0],
        recipe,
        seed,
    ), StepCount.of(recipe, train)


def solo(
    settings: Sequence[str],
    seed: int,
    train: FeaturePairs = TRAIN,
    dev: FeaturePairs = DEV,
) -> HeadFit:
    training, plan = make(settings, seed, train)
    with seeded(seed + 1, CPU):
        run_training(
            training,
            train=train,
            dev=dev,
            plan=plan,
            log=lambda _: None,
            save=lambda _: None,
        )
    return training


def with_tokens(pooled: FeaturePairs) -> FeaturePairs:
    """Each feature as up to four tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(features: Tensor) -> Tensor:
        noise = torch.randn(len(features), 4, features.shape[1], generator=generator)
        return noise + features.unsqueeze(1)

    return replace(
        pooled,
        image=tokens(pooled.image),
        text=tokens(pooled.text),
        image_lengths=torch.randint(2, 5, (len(pooled.image),), generator=generator),
        text_lengths=torch.randint(2, 5, (len(pooled.text),), generator=generator),
    )


def together(
    cases: Sequence[Sequence[str]],
    n_epochs: int = 1000,
    train: FeaturePairs = TRAIN,
    dev: FeaturePairs = DEV,
) -> list[HeadFit]:
    """The cases as one population; the place of each is its seed."""
    made = [make(settings, seed, train) for seed, settings in enumerate(cases)]
    assert len({stack_key(*member) for member in made}) == 1
    assert stack_key(*made[0]) is not None
    members = [training for training, _ in made]
    streams = MemberGenerators.seeded([s + 1 for s in range(len(made))], CPU)
    assert (
        train_together(
            members,
            streams=streams,
            train=train,
            dev=dev,
            plan=made[0][1],
            n_epochs=n_epochs,
        )
        == {}
    )
    return members


def weights(training: HeadFit) -> dict[str, Tensor]:
    return {name: value.double() for name, value in training.model.state_dict().items()}


def distance(one: HeadFit, other: HeadFit, ignored: tuple[str, ...] = ()) -> float:
    """Largest relative distance of a tensor of weights; names that end so are left out."""
    ours = weights(one)
    theirs = weights(other)
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-12))
        for n in ours
        if not n.endswith(ignored)
    )


def losses(training: HeadFit) -> list[float]:
    return [line["loss"] for line in training.history[1:]]
