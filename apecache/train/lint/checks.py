"""Checks for the traps of published training code: what is wrong with a fit although it runs.

An error stops a fit. A warning stands in its ledger. Models are checked on real features: two steps
of the recipe's own optimiser, on a copy of the model and a part of one batch.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from apecache.errors import DataError
from apecache.heads.pooled import GatedUnit
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable
from apecache.train.augment import mixed_groups
from apecache.train.batches import Batch, FeaturePairs, SplitSpec, batches, choose_splits
from apecache.train.loop import Fit, Trainable, Training, seeded
from apecache.train.model import AlignmentModel

PROBE_IMAGES = 256
PROBE_PAIRS = 16
"""Images that are run through towers, twice."""
LEAST_DEV_IMAGES = 100
"""A recall of 50 % among so many has a standard error of 5 points: more than recipes differ by."""
EQUAL_SHARE = 0.1
"""Share of the negatives that equal captions and images may take away before lint says so."""
BLOCK_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`check` is a short fixed word; `message` says what was found and what mends it."""

    check: str
    level: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def require_sound(findings: Sequence[Finding]) -> None:
    """Raises DataError that names every error among the findings."""
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if errors:
        failed = "1 check fails" if len(errors) == 1 else f"{len(errors)} checks fail"
        raise DataError(f"{failed}: {'; '.join(errors)}")


def lint_fit(
    store: FeatureStore,
    arrays: tuple[FeatureArray, FeatureArray],
    recipe: Recipe,
    splits: SplitSpec,
    report_split: str,
    train: FeaturePairs,
    model: AlignmentModel,
    optimiser: torch.optim.Optimizer | None,
) -> list[Finding]:
    """Every check on what a fit is about to do. `report_split`: where results will be reported, if
    the store has it.

    Raises:
        RecipeError: the splits do not work.
    """
    return [
        *lint_recipe(recipe, len(train), train),
        *lint_splits(store, arrays=arrays, spec=splits, report_split=report_split),
        *lint_positives(train, recipe),
        *(
            lint_model(model, optimiser=optimiser, recipe=recipe, train=train)
            if optimiser is not None
            else ()
        ),
    ]


def lint_encoder_data(
    store: FeatureStore,
    recipe: Recipe,
    splits: SplitSpec,
    report_split: str,
    train: FeaturePairs,
) -> list[Finding]:
    """The same of a fit within towers, as far as no step is needed: recipe, splits, positives.
    `train`: rows of the store's table. Splits are compared by any features that the store has of
    both sides."""
    found = [*lint_recipe(recipe, len(train), train), *lint_groups_of_captions(train, recipe)]
    images = store.arrays("image")
    texts = store.arrays("text")
    if images and texts:
        found += lint_splits(
            store,
            arrays=(images[0], texts[0]),
            spec=splits,
            report_split=report_split,
        )
    return found


# --- the recipe -----------------------------------------------------------------------------------


def n_negatives(recipe: Recipe, n_images: int, train: FeaturePairs | None = None) -> int:
    """Wrong candidates of each query in a batch: accumulation adds none, mixing halves them, and
    where nothing trains there are none. Of `train` with equal captions or images: their mean over
    one batch, rounded."""
    if recipe.schedule.epochs == 0 and recipe.schedule.steps == 0:
        return 0
    most = min(recipe.schedule.batch_size, n_images) // (2 if recipe.augmentation.mixup else 1) - 1
    if train is None or (train.content is None and train.caption_ids is None):
        return most
    generator = torch.Generator().manual_seed(0)
    groups = next(
        batches(
            _rows_alone(train),
            batch_size=recipe.schedule.batch_size,
            generator=generator,
            captions=recipe.loss.captions,
        )
    ).groups
    if groups is None:
        return most
    own = groups.image.cpu()
    if recipe.augmentation.mixup:
        own = mixed_groups(own)
    _, sizes = own.unique(return_counts=True)
    return round(float((sizes * (len(own) - sizes)).sum()) / len(own))


def _rows_alone(train: FeaturePairs) -> FeaturePairs:
    """The same pairs with numbers of rows for features, which cost nothing to draw."""
    return FeaturePairs(
        image=torch.arange(len(train.image)),
        text=torch.arange(len(train.text)),
        first_text=train.first_text.cpu(),
        content=train.content,
        caption_ids=train.caption_ids,
    )


def lint_recipe(
    recipe: Recipe,
    n_images: int | None = None,
    train: FeaturePairs | None = None,
) -> Iterator[Finding]:
    """What the recipe alone shows; `n_images`, `train`: training images and pairs, where they are
    known."""
    schedule = recipe.schedule
    size = schedule.batch_size if n_images is None else min(schedule.batch_size, n_images)
    found = n_negatives(recipe, size, train)
    nominal = size * schedule.accumulate
    plain = n_negatives(recipe, size)
    equal = found < (1 - EQUAL_SHARE) * plain
    if equal or 0 < plain < nominal - 1:
        why = [f"accumulate {schedule.accumulate} adds none"] if schedule.accumulate > 1 else []
        why += ["mixup halves them"] if recipe.augmentation.mixup else []
        why += ["equal captions and images are none"] if equal else []
        text = (
            f"the nominal batch is {nominal}, but each query has {found} negatives "
            f"({', '.join(why)})"
        )
        yield Finding(
            check="negatives",
            level="warning",
            message=f"{text}; for more raise schedule.batch_size",
        )


# --- the splits -----------------------------------------------------------------------------------


def lint_splits(
    store: FeatureStore,
    arrays: tuple[FeatureArray, FeatureArray],
    spec: SplitSpec,
    report_split: str,
) -> Iterator[Finding]:
    """What is chosen on must not be reported, what is trained on must be in no other split."""
    pairs = store.pairs
    train, dev = choose_splits(pairs, spec, equal_images(arrays[0]))
    if (pairs.splits[dev] == report_split).any():
        text = (
            f"the dev split is {report_split!r}, which is to be reported: what is chosen on it is "
            "no measure of it"
        )
        yield Finding(
            check="selection",
            level="error",
            message=f"{text}; give another --dev-split, or another --report-split",
        )
    elif (pairs.splits[train] == report_split).any():
        text = f"training images are of {report_split!r}, which is to be reported"
        yield Finding(
            check="selection",
            level="error",
            message=f"{text}; give another --train-split, or another --report-split",
        )
    if dev.sum() < LEAST_DEV_IMAGES:
        error = 50 / max(1, int(dev.sum())) ** 0.5
        text = (
            f"the dev split has {int(dev.sum())} images: a recall of 50 % is known to {error:.0f} "
            "points"
        )
        yield Finding(
            check="dev-size",
            level="warning",
            message=f"{text}; choose on at least {LEAST_DEV_IMAGES}",
        )
    yield from _few_captions(pairs, dev)
    yield from _overlaps(store, arrays=arrays, train=train, dev=dev)


def _few_captions(pairs: PairTable, dev: NDArray[np.bool_]) -> Iterator[Finding]:
    """A dev split with fewer different captions than images, and fewer than `LEAST_DEV_IMAGES` of
    them."""
    texts = np.flatnonzero(dev[pairs.image_rows])
    usable = [row for row in texts.tolist() if str(pairs.captions[row]).strip()]
    n_captions = len(np.unique(pairs.caption_ids[usable]))
    n_images = len(np.unique(pairs.image_rows[usable]))
    if n_captions < min(LEAST_DEV_IMAGES, n_images):
        text = (
            f"the dev split has {n_captions} different captions for {n_images} images: recall "
            "cannot rank well on it"
        )
        remedy = "compare runs with apecache evaluate --task zeroshot, or give captions that differ"
        yield Finding(check="dev-captions", level="warning", message=f"{text}; {remedy}")


def lint_named(splits: SplitSpec, n_dev: int, report_split: str) -> list[Finding]:
    """What names and counts of a run show without its data."""
    found = []
    if report_split in (splits.dev, splits.train):
        text = f"trained or chosen on {report_split!r}, which is to be reported"
        found.append(
            Finding(
                check="selection",
                level="error",
                message=f"{text}; fit again with another split",
            )
        )
    if n_dev < LEAST_DEV_IMAGES:
        text = f"the dev split had {n_dev} images"
        found.append(
            Finding(
                check="dev-size",
                level="warning",
                message=f"{text}; choose on at least {LEAST_DEV_IMAGES}",
            )
        )
    return found


def _overlaps(
    store: FeatureStore,
    arrays: tuple[FeatureArray, FeatureArray],
    train: NDArray[np.bool_],
    dev: NDArray[np.bool_],
) -> Iterator[Finding]:
    """By hashes of files and captions. Equal captions of different images are common, so they are
    no error."""
    pairs = store.pairs
    rest = {name: (pairs.splits == name) & ~train & ~dev for name in pairs.split_counts()}
    others = {"dev": dev, **{name or "(none)": mask for name, mask in rest.items() if mask.any()}}
    contents = [np.array(array.content(), object) for array in arrays]
    for name, mask in others.items():
        images = _in_both(contents[0], train, mask)
        if images:
            text = f"{images} images of {name} have the content of a training image"
            level: Literal["error", "warning"] = "warning" if name == "dev" else "error"
            yield Finding(
                check="overlap",
                level=level,
                message=f"{text}; take one of each out of the table",
            )
        texts = _in_both(contents[1], train[pairs.image_rows], mask[pairs.image_rows])
        if texts:
            yield Finding(
                check="overlap",
                level="warning",
                message=f"{texts} captions of {name} are word for word training captions",
            )


def _in_both(
    content: NDArray[np.object_],
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
) -> int:
    known = set(content[first].tolist()) - {""}
    return sum(digest in known for digest in content[second].tolist())


# --- the batches ----------------------------------------------------------------------------------


def lint_positives(train: FeaturePairs, recipe: Recipe) -> Iterator[Finding]:
    """Captions of one image as each other's negatives: in a batch, or because the image stands in
    several rows."""
    yield from lint_groups_of_captions(train, recipe)
    count = _rows_of_equal_features(train)
    if count:
        text = (
            f"{count} training images have the features of another one, and their captions are "
            "negatives of it"
        )
        yield Finding(
            check="captions",
            level="warning",
            message=f"{text}; give all captions of an image one key",
        )


def lint_groups_of_captions(train: FeaturePairs, recipe: Recipe) -> Iterator[Finding]:
    """Captions of one image as each other's negatives in a batch."""
    batch = next(
        batches(
            train,
            batch_size=PROBE_IMAGES,
            generator=torch.Generator().manual_seed(0),
            captions=recipe.loss.captions,
        )
    )
    if wrong_negatives(batch):
        text = (
            f"{recipe.loss.captions} captions of each image stand in a batch, and they are each "
            "other's negatives"
        )
        yield Finding(check="captions", level="error", message=f"{text}; give the batch groups")


def wrong_negatives(batch: Batch) -> bool:
    """Whether captions of one image, which stand one after another, are not all its positives."""
    captions = len(batch.text) // len(batch.image)
    if captions == 1:
        return False
    if batch.groups is None:
        return True
    return not torch.equal(batch.groups.text, batch.groups.image.repeat_interleave(captions))


def _rows_of_equal_features(train: FeaturePairs) -> int:
    """Images whose features are those of an earlier one, though their content is not known to be
    equal. Found by a random projection in double precision, of tokens and views that of the
    first."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(train.image.shape[-1], generator=generator, dtype=torch.float64).to(
        train.image.device
    )
    first = train.image if train.image.ndim == 2 else train.image[:, 0]
    parts = (part.double().nan_to_num() @ direction for part in first.split(BLOCK_ROWS))
    _, same = torch.cat(list(parts)).unique(return_inverse=True)
    kinds = (
        torch.arange(len(train), device=same.device)
        if train.content is None
        else train.content.to(same.device)
    )
    return len(torch.stack((same, kinds)).unique(dim=1).T) - len(same.unique())


# --- the model ------------------------------------------------------------------------------------


def lint_model(
    model: AlignmentModel,
    optimiser: torch.optim.Optimizer,
    recipe: Recipe,
    train: FeaturePairs,
) -> Iterator[Finding]:
    """Whether everything that should learn can."""
    yield from lint_groups(model, optimiser, recipe)
    probe = Training(copy.deepcopy(model), recipe, 0)
    tested = [name for name, _ in model.named_parameters()]
    yield from _found_by_probe(*_probe(probe, train=train, n_images=PROBE_IMAGES, tested=tested))


def lint_groups(
    model: Trainable,
    optimiser: torch.optim.Optimizer | None,
    recipe: Recipe,
) -> Iterator[Finding]:
    """Whether the optimiser holds everything that should learn (None: it holds nothing)."""
    held = (
        {id(p) for group in optimiser.param_groups for p in group["params"]} if optimiser else set()
    )
    if recipe.loss.learnable and id(model.temperature.log_scale) not in held:
        text = "the temperature is learnable, but in no group of the optimiser"
        yield Finding(
            check="temperature",
            level="error",
            message=f"{text}; give the optimiser every parameter of the model",
        )
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    left = [name for name in left if not name.startswith("temperature.")]
    if left:
        yield Finding(
            check="optimiser",
            level="error",
            message=f"{_some(left)} in no group of the optimiser; give it every parameter",
        )


def lint_encoder_model(training: Fit[Any], train: FeaturePairs) -> Iterator[Finding]:
    """`lint_model` of a fit within towers, whose trainable parts are looked at. The model is not
    copied, since towers are large: afterwards it has other weights."""
    yield from lint_groups(training.model, training.optimiser, training.recipe)
    tested = [name for name, p in training.model.named_parameters() if p.requires_grad]
    if training.optimiser is not None:
        yield from _found_by_probe(
            *_probe(training, train=train, n_images=PROBE_PAIRS, tested=tested)
        )


def _found_by_probe(silent: Sequence[str], shut: Sequence[str]) -> Iterator[Finding]:
    if shut:
        yield Finding(
            check="gate",
            level="error",
            message=f"{_some(shut)} shut for every training image or text; "
            "begin with other weights",
        )
    behind = tuple(
        prefix
        for gate in shut
        for prefix in (gate.rpartition(".")[0], f"{gate.split('.')[0]}.tower.")
    )
    silent = [name for name in silent if not name.startswith(behind)]
    if silent:
        yield Finding(
            check="gradient",
            level="error",
            message=f"{_some(silent)} without gradient in the first two steps; freeze or use it",
        )


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} {'are' if len(names) > 1 else 'is'}"


def _probe(
    fit: Fit[Any],
    train: FeaturePairs,
    n_images: int,
    tested: Sequence[str],
) -> tuple[list[str], list[str]]:
    """(tested parameters without gradient, gates that never open) in two steps on at most
    `n_images`. Two, because behind a last layer of zeros, with which a body beside a closed form
    begins, gradients come with the second."""
    assert fit.optimiser is not None
    model = fit.model
    recipe = fit.recipe
    parameters = dict(model.named_parameters())
    silent = {name for name in tested if not name.startswith("temperature.")}
    shut = set[str]()
    generator = torch.Generator().manual_seed(0)
    size = min(n_images, recipe.schedule.batch_size)
    with seeded(0, fit.device):
        drawn = [
            next(
                batches(train, batch_size=size, generator=generator, captions=recipe.loss.captions)
            )
            for _ in range(2)
        ]
        model.train()
        for fit.step, batch in enumerate(drawn):
            outputs = _gate_outputs(model)
            fit.optimiser.zero_grad(set_to_none=True)
            fit.add_gradients(batch, 1)
            silent -= {name for name in silent if _has_gradient(parameters[name])}
            now = {
                name
                for name, values in outputs.items()
                if not any(bool((x > 0).any()) for x in values)
            }
            shut = now if fit.step == 0 else shut & now
            fit.optimiser.step()
    return sorted(silent), sorted(shut)


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


def _gate_outputs(model: nn.Module) -> dict[str, list[Tensor]]:
    """What the gates give from now on, by name, before the activation that shuts them below
    zero."""
    outputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, GatedUnit):
            kept = outputs.setdefault(f"{name}.gate", [])
            module.gate.register_forward_hook(
                lambda _, __, out, kept=kept: kept.append(out.detach())
            )
    return outputs
