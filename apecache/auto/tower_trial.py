"""Measure in one short fit what training the text tower adds to heads.

The trial is recipe `lit-warm` with the given heads: the last two blocks of the text tower train
against cached image features. It starts from cached tokens of the text encoder where the store has
some, else from the captions. It runs in memory: no run folder is written.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from tempfile import TemporaryDirectory

import torch

from apecache.device import float32_products, resolve_device
from apecache.encoders.load import load_text_encoder
from apecache.encoders.tower import tower_of
from apecache.errors import ApecacheError, RecipeError, counted, naming
from apecache.heads.fold import folded
from apecache.heads.head import Head, HeadSpec
from apecache.metrics.protocols import retrieval_hits
from apecache.metrics.statistics import RetrievalHits
from apecache.recipes.recipe import Recipe, load_recipe, parse_recipe
from apecache.runs.heads import TrainedHeads, TrainedSide, save_heads
from apecache.store.array import FeatureArray
from apecache.store.joined import JoinedArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.encoder_setup import PreparedFit, set_up
from apecache.train.fit import StepCount, cloned_tensors, seeded
from apecache.train.loop import draw_epoch, require_finite, take_step, take_steps
from apecache.train.model import AlignmentModel
from apecache.train.ranks import Ranks
from apecache.train.tower_fit import EncoderFit

RECIPE = "lit-warm"
MOST_BLOCKS = 2
"""Blocks that train, unless the cached tokens are those of a higher layer."""
LEAST_STEPS = 50
"""Steps below which a shortened trial says nothing."""
TIMED_STEPS = 2
"""Steps that are timed before the trial; the last one counts, the others warm up."""

Announce = Callable[[str], None]
"""Take a line that says what begins, and what it will cost."""


@dataclass(frozen=True, kw_only=True)
class TowerTrial:
    """Report a trial."""

    before: RetrievalHits
    """Answers on dev of the heads, before the tower trains."""
    after: RetrievalHits
    """Answers of the last step's weights to the same queries."""
    n_blocks: int
    """Blocks of the text tower that trained."""
    n_steps: int
    """Steps that were taken."""
    n_epoch_steps: int
    """Steps of an epoch of all captions."""
    seconds: float
    """Time of all: loading, timing, training and evaluation."""


class _TimeIsUpError(Exception):
    """End the steps of a trial."""


def try_tower(
    store: FeatureStore,
    model: AlignmentModel,
    recipe: Recipe,
    spec: FitEncoderSpec,
    n_epochs: int,
    limit_seconds: float,
    announce: Announce = lambda _: None,
) -> TowerTrial:
    """Train the last blocks of the text tower, beginning with trained heads.

    The last weights are measured, so dev chooses nothing.

    Args:
        store: Store of the features.
        model: Heads on the features that `spec` names.
        recipe: Recipe of the heads, whose loss the trial takes.
        spec: Features of the heads, splits, seed and device.
        n_epochs: Epochs of all captions.
        limit_seconds: Most time of the steps. A longer plan is shortened before it begins.
        announce: Called with the cost, before the steps begin.

    Raises:
        ApecacheError: The store's text tower cannot be trained from these heads, in this time. The
            message is the reason, in one line.
    """
    begin = time.perf_counter()
    device = resolve_device(spec.device)
    heads = _as_trained(store, model, spec)
    with TemporaryDirectory(prefix="apecache-trial-") as folder:
        save_heads(heads, folder)
        with naming("these heads", folder):
            setup, n_blocks = _open(
                store,
                heads=heads,
                recipe=recipe,
                spec=replace(spec, init_from=folder),
                n_epochs=n_epochs,
                device=device,
            )
    plan = StepCount.of(setup.opened.recipe, setup.train)
    training = _begin(setup)
    before = _answers(training, setup.dev)
    with seeded(spec.seed, device):
        step_seconds = _seconds_of_step(setup, plan)
    shortened = _within(plan, step_seconds, limit_seconds)
    announce(_cost_line(setup, shortened, plan, step_seconds))
    # As in fit_encoder, so that the same fit gives the same weights.
    with seeded(spec.seed + 1, device):
        _train(training, setup.train, shortened, limit_seconds)
    after = _answers(training, setup.dev)
    return TowerTrial(
        before=before,
        after=after,
        n_blocks=n_blocks,
        n_steps=training.step,
        n_epoch_steps=plan.per_epoch,
        seconds=time.perf_counter() - begin,
    )


# --- what trains ----------------------------------------------------------------------------------


def _as_trained(store: FeatureStore, model: AlignmentModel, spec: FitEncoderSpec) -> TrainedHeads:
    """Return the heads with the encoders of their features, as a run of fit-head has them."""
    image = store.array("image", spec.image_features)
    text = store.array("text", spec.text_features)
    return TrainedHeads(
        image=_side(model.image, image),
        text=_side(model.text, text),
        scale=float(model.temperature.scale().detach()),
        bias=model.temperature.bias_value(),
    )


def _side(head: Head, array: FeatureArray) -> TrainedSide:
    return TrainedSide(
        head=head,
        encoder=asdict(array.record.spec),
        fingerprint=array.record.encoder,
    )


def _open(
    store: FeatureStore,
    heads: TrainedHeads,
    recipe: Recipe,
    spec: FitEncoderSpec,
    n_epochs: int,
    device: torch.device,
) -> tuple[PreparedFit, int]:
    """Set up the trial on cached tokens, or else on the captions.

    Returns:
        The trial, and how many blocks train.
    """
    text = store.array("text", spec.text_features)
    n_tower_blocks = _count_blocks(text, device)
    for tokens, n_above in _cached_tokens(store, text, n_tower_blocks):
        n_blocks = min(MOST_BLOCKS, n_above)
        # Tokens of other inputs than the heads', such as longer captions, are refused.
        with suppress(ApecacheError):
            setup = set_up(
                store,
                recipe=_trial_recipe(recipe, heads, text, n_blocks, n_epochs),
                spec=replace(spec, text_features=tokens.name),
                open_image=None,
                device=device,
            )
            return setup, n_blocks
    n_blocks = min(MOST_BLOCKS, n_tower_blocks)
    setup = set_up(
        store,
        recipe=_trial_recipe(recipe, heads, text, n_blocks, n_epochs),
        spec=spec,
        open_image=None,
        device=device,
    )
    return setup, n_blocks


def _count_blocks(text: FeatureArray, device: torch.device) -> int:
    """Return the blocks of the encoder that made the text features.

    Raises:
        RecipeError: The features do not come from the end of one encoder.
        EncoderError: The encoder cannot be loaded, or is no tower whose blocks can be trained.
    """
    record = text.record
    if isinstance(text, JoinedArray):
        raise RecipeError(f"{text.name} joins several text encoders, and a trial trains one tower")
    if record.spec.is_imported:
        raise RecipeError(f"text features {text.name} were imported without their encoder")
    if record.spec.layer is not None or text.tokens is not None:
        raise RecipeError(f"text features {text.name} are no pooled output of their encoder")
    encoder = load_text_encoder(replace(record.spec, dtype="float32"), str(device))
    return tower_of(encoder).n_blocks


def _cached_tokens(
    store: FeatureStore,
    text: FeatureArray,
    n_tower_blocks: int,
) -> Iterator[tuple[FeatureArray, int]]:
    """Yield token features of the encoder with the blocks above each.

    Those with enough blocks to train come first, and of these the ones with the fewest.
    """
    weights = text.record.encoder.fields.get("weights")
    candidates: list[tuple[FeatureArray, int]] = []
    for array in store.arrays("text"):
        spec = array.record.spec
        is_usable = array.tokens is not None and array.views is None and array.complete
        if not is_usable or array.record.encoder.fields.get("weights") != weights:
            continue
        if spec.layer is None:
            continue
        # As `apecache.encoders.layers.resolve_layer` counts: -1 is the cut after the last block.
        n_above = -1 - spec.layer if spec.layer < 0 else n_tower_blocks - spec.layer
        if n_above > 0:
            candidates.append((array, n_above))
    yield from sorted(candidates, key=lambda entry: (entry[1] < MOST_BLOCKS, entry[1]))


def _trial_recipe(
    recipe: Recipe,
    heads: TrainedHeads,
    text: FeatureArray,
    n_blocks: int,
    n_epochs: int,
) -> Recipe:
    """Return recipe `lit-warm` with these heads, their loss and their pooling."""
    trial = load_recipe(RECIPE)
    try:
        text_head = folded(heads.text.head)
    except ValueError as error:
        raise RecipeError(
            f"recipe {recipe.name} standardizes text features, which change when the tower trains, "
            f"and {error}; choose a recipe with linear heads, such as projection"
        ) from None
    values = trial.model_dump()
    values["image"] = _fitted_spec(heads.image.head)
    # Without input dropout: on a folded head it would set features to 0 instead of their mean.
    values["text"] = {**_fitted_spec(text_head), "input_dropout": 0.0}
    values["loss"] = {**recipe.loss.model_dump(), "captions": 1}
    values["towers"]["rules"] = [
        *(rule.model_dump() for rule in trial.towers.rules if rule.part == "head"),
        {"part": f"text.blocks[-{n_blocks}:]"},
    ]
    values["towers"]["text_pooling"] = text.record.spec.pooling
    values["schedule"]["epochs"] = n_epochs
    return parse_recipe(values, RECIPE)


def _fitted_spec(head: Head) -> dict[str, object]:
    """Return a head's description with its fitted width, which a closed form has chosen."""
    spec: HeadSpec = head.spec
    if not spec.parts and spec.kind != "identity":
        spec = spec.model_copy(update={"dim": head.out_dim})
    return spec.model_dump()


# --- steps ----------------------------------------------------------------------------------------


def _begin(setup: PreparedFit) -> EncoderFit:
    opened = setup.opened
    training = EncoderFit(
        setup.model,
        inputs=setup.inputs,
        recipe=opened.recipe,
        spec=opened.spec,
        ranks=Ranks(),
    )
    # No ledger: counting the operations of a step would slow it.
    training.step_flops = 0
    return training


def _answers(training: EncoderFit, dev: FeaturePairs) -> RetrievalHits:
    """Return the answers on dev of the weights that would be kept."""
    with training.with_outcome(), float32_products(training.device, tf32=False):
        image, text = training.embed(dev)
    relevance = None if dev.relevance is None else dev.relevance.to(image.device)
    owners = dev.image_of_text.to(image.device)
    return retrieval_hits(image, text, owners, relevance=relevance)


def _seconds_of_step(setup: PreparedFit, plan: StepCount) -> float:
    """Time a step, and restore the weights."""
    weights = cloned_tensors(setup.model.kept_state())
    training = _begin(setup)
    training.model.train()
    seconds = 0.0
    for _ in range(TIMED_STEPS):
        batches = draw_epoch(training, setup.train, plan)
        begin = time.perf_counter()
        # Reading the loss waits for an accelerator.
        float(take_step(training, islice(batches, plan.accumulate), plan))
        seconds = time.perf_counter() - begin
    setup.model.load_kept(weights)
    return seconds


def _within(plan: StepCount, step_seconds: float, limit_seconds: float) -> StepCount:
    """Return a plan that ends within the limit.

    Raises:
        RecipeError: The limit allows too few steps.
    """
    n_steps = min(plan.n_steps, int(limit_seconds / step_seconds))
    if n_steps < min(plan.n_steps, LEAST_STEPS):
        raise RecipeError(
            f"a step takes {step_seconds:.2g} s, so {limit_seconds:.0f} s allow {n_steps} of "
            f"{counted(plan.n_steps, 'step')}, and at least {LEAST_STEPS} are needed"
        )
    return replace(plan, n_steps=n_steps)


def _cost_line(
    setup: PreparedFit,
    shortened: StepCount,
    plan: StepCount,
    step_seconds: float,
) -> str:
    """Say from where a trial starts, and what it will cost."""
    source = setup.opened.sources[1]
    start = "the captions" if source.cut is None or source.array is None else source.array.name
    steps = counted(shortened.n_steps, "step")
    if shortened.n_steps < plan.n_steps:
        steps = f"{shortened.n_steps:,} of {counted(plan.n_steps, 'step')}"
    seconds = max(1, round(shortened.n_steps * step_seconds))
    return f"text tower: {steps} from {start}, about {seconds} s"


def _train(
    training: EncoderFit,
    train: FeaturePairs,
    plan: StepCount,
    limit_seconds: float,
) -> None:
    """Take the steps of a plan. They end at the limit, also where they are slower than timed."""
    deadline = time.perf_counter() + limit_seconds

    def stop_late(_: bool = False) -> None:
        if time.perf_counter() > deadline:
            raise _TimeIsUpError

    with suppress(_TimeIsUpError):
        while training.step < plan.n_steps:
            # Within an epoch it is called after each step but the last.
            stop_late()
            batches = draw_epoch(training, train, plan)
            take_steps(training, drawn=batches, plan=plan, save=stop_late)
            require_finite(training)
            training.epoch = training.epoch + 1
            training.in_epoch = 0
            training.forget_losses()
    require_finite(training)
