"""Set up a fit within towers: what it reads, what it trains, and its identity."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from apecache.arguments import as_path
from apecache.device import seeded_generators
from apecache.errors import OptionError, RecipeError
from apecache.fingerprint import Fingerprint, Json
from apecache.heads.head import HeadSpec
from apecache.models.dual_encoder import EncoderModel, Side, Teacher, build_model
from apecache.recipes.recipe import Recipe
from apecache.runs.heads import TrainedHeads
from apecache.store.array import FeatureArray
from apecache.store.joined import widths_of
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs
from apecache.train.encoder_data import (
    FitEncoderSpec,
    SideSource,
    TeacherSource,
    open_inputs,
    open_source,
    open_teacher,
    split_rows,
)
from apecache.train.live import Inputs, OpenImage
from apecache.train.pretrained import with_own_scale
from apecache.train.ranks import Ranks
from apecache.train.tower_fit import image_views
from apecache.train.warm_start import begin_from, open_start


@dataclass(frozen=True, kw_only=True)
class FitInputs:
    """Hold what a fit reads."""

    store: FeatureStore
    recipe: Recipe
    spec: FitEncoderSpec
    sources: tuple[SideSource, SideSource]
    """Both sides, image before text."""
    teacher: TeacherSource | None
    """Teacher of the recipe's distillation."""
    start: TrainedHeads | None
    """Trained heads that the fit begins with."""

    @property
    def arrays(self) -> list[FeatureArray]:
        """Arrays of the store that are read."""
        sides = [source.array for source in self.sources if source.array is not None]
        return sides if self.teacher is None else [*sides, self.teacher.array]

    def settings(self) -> dict[str, Json]:
        """Return what identifies the fit, besides the encoders."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.spec.seed,
            "splits": asdict(self.spec.splits),
            "autocast": self.spec.autocast,
            "data": self.store.digest,
            "init_from": None if self.start is None else self.start.digest,
        }

    def identity(self) -> Fingerprint:
        """Return the identity of the fit, which its checkpoints carry."""
        fields = self.settings()
        for source in self.sources:
            encoder = dict(source.fingerprint.fields)
            fields[source.side] = {"encoder": encoder, "cut": source.cut}
        fields["teacher"] = None
        if self.teacher is not None:
            fields["teacher"] = dict(self.teacher.fingerprint.fields)
        return Fingerprint(fields=fields)

    def describe(self, trained: Mapping[str, int]) -> dict[str, Json]:
        """Return the identity for the description of a finished run.

        Args:
            trained: Number of trained parameters of each side.
        """
        sides: dict[str, Json] = {
            source.side: {
                "encoder": asdict(source.encoder_spec),
                "fingerprint": source.fingerprint.fields,
                "dim": source.dim,
                "cached": source.encoder is None,
                "cut": source.cut,
                "features": None if source.array is None else source.array.name,
                "n_trained_parameters": trained[source.side],
            }
            for source in self.sources
        }
        taught: Json = None
        if self.teacher is not None:
            taught = {"name": self.teacher.array.name, "dim": self.teacher.taught.shape[1]}
        return {**sides, "teacher": taught, **self.settings()}


@dataclass(frozen=True, kw_only=True)
class PreparedFit:
    """Hold a fit that is ready to begin."""

    opened: FitInputs
    model: EncoderModel
    inputs: tuple[Inputs, Inputs]
    """Inputs of both sides, image before text."""
    train: FeaturePairs
    """Training pairs: rows of the store's table, which `inputs` read."""
    dev: FeaturePairs
    """Dev pairs, as `train`."""


def set_up(
    store: FeatureStore,
    recipe: Recipe,
    spec: FitEncoderSpec,
    open_image: OpenImage | None,
    device: torch.device,
) -> PreparedFit:
    """Open everything that a fit reads and build its model.

    Raises as `fit_encoder` does before it trains.
    """
    image = open_source(store, recipe=recipe, side="image", spec=spec, device=device)
    text = open_source(store, recipe=recipe, side="text", spec=spec, device=device)
    recipe = with_own_scale(recipe, image.encoder_spec, text.encoder_spec)
    teacher = open_teacher(store, recipe, device)
    start = None
    if spec.init_from is not None:
        start = open_start(as_path(spec.init_from, "init_from"), recipe, (image, text))
    opened = FitInputs(
        store=store,
        recipe=_with_widths(recipe, image, text),
        spec=spec,
        sources=(image, text),
        teacher=teacher,
        start=start,
    )
    train, dev = split_rows(store, sources=opened.sources, spec=spec, teacher=teacher)
    image_inputs = open_inputs(image, store=store, open_image=open_image, device=device)
    text_inputs = open_inputs(text, store=store, open_image=open_image, device=device)
    # Called for its error alone, before the model is built.
    image_views(recipe, spec, (image_inputs, text_inputs))
    return PreparedFit(
        opened=opened,
        model=_model(opened, train, device),
        inputs=(image_inputs, text_inputs),
        train=train,
        dev=dev,
    )


def _with_widths(recipe: Recipe, image: SideSource, text: SideSource) -> Recipe:
    """Return the recipe with the widths of the encoders whose cached features its heads join."""
    heads: dict[str, HeadSpec] = {}
    for source, spec in ((image, recipe.image), (text, recipe.text)):
        widths = (source.dim,) if source.array is None else widths_of(source.array)
        heads[source.side] = spec.with_widths(widths)
    return recipe.model_copy(update=heads)


def _model(opened: FitInputs, train: FeaturePairs, device: torch.device) -> EncoderModel:
    """Build the model of a fit: weights by seed, statistics of cached features, trained heads."""
    sources = opened.sources
    spec = opened.spec
    teacher = None
    if opened.teacher is not None:
        taught = opened.teacher.taught
        teacher = Teacher(dim=taught.shape[1], features=taught)
    encoders = [source.encoder for source in sources]
    dims = [source.dim for source in sources]
    cuts = [source.cut for source in sources]
    # New weights depend on the seed alone, and the caller's random state stays as it was.
    with seeded_generators(spec.seed):
        model = build_model(
            opened.recipe,
            encoders=encoders,
            dims=dims,
            device=device,
            cuts=cuts,
            teacher=teacher,
        )
    sides = (model.image, model.text)
    train_rows = (train.image, train.text)
    for side, source, rows in zip(sides, sources, train_rows, strict=True):
        # Features of a tower that trains change, so only frozen sides have statistics.
        if isinstance(side, Side) and side.tower is None and source.features is not None:
            used = source.features[rows.to(source.features.device)]
            side.head.fit_statistics(used.to(device))
    if opened.start is not None and spec.init_from is not None:
        begin_from(opened.start, model, Path(spec.init_from))
    return model


# --- what can be trained --------------------------------------------------------------------------


def require_sensible(recipe: Recipe, spec: FitEncoderSpec, ranks: Ranks) -> None:
    """Check that the encoder trainer can do what the recipe and the settings say.

    Raises:
        RecipeError: The encoder trainer cannot train this recipe.
        OptionError: The settings contradict each other.
    """
    if spec.slice_size is not None and spec.slice_size < 1:
        raise OptionError(f"slices of {spec.slice_size} pairs; expected at least 1")
    if spec.compile and recipe.towers.checkpointing:
        # torch traces a checkpointed block past the context in which dropout draws by sample.
        raise OptionError(
            f"recipe {recipe.name}: compile and towers.checkpointing do not go together; leave one "
            "of them out, and save memory by slices (--slice)"
        )
    if recipe.trains_heads_alone:
        raise RecipeError(f"recipe {recipe.name} trains heads alone; use fit-head, which is faster")
    _require_known(recipe)
    # The statistics of batch norm are those of a slice or share, so the gradients would not be
    # those of the whole batch.
    sliced = spec.slice_size is not None and spec.slice_size < recipe.schedule.batch_size
    if (sliced or ranks.size > 1) and "batch" in (recipe.image.norm, recipe.text.norm):
        raise RecipeError(
            f"recipe {recipe.name}: batch norm needs the whole batch at once; leave slices out"
        )


ONLY: dict[str, tuple[object, str]] = {
    "augmentation.noise": (0.0, "noise is for cached features; see augmentation.image"),
    "augmentation.mixup": (0.0, "mixup is for cached features"),
    "augmentation.token_dropout": (0.0, "it is for heads on cached tokens"),
}
"""Settings with only one possible value in this trainer: the value, and why."""
INITS = ("random", "pretrained")


def _require_known(recipe: Recipe) -> None:
    """Refuse settings that this trainer would ignore silently."""
    values = recipe.model_dump()
    if recipe.init not in INITS:
        raise RecipeError(
            f"recipe {recipe.name}: init is {recipe.init}; fit-encoder takes "
            f"{' or '.join(INITS)} only: a closed form needs the features of both sides"
        )
    for path, (only, why) in ONLY.items():
        value: Any = values
        for key in path.split("."):
            value = value[key]
        if value != only:
            raise RecipeError(
                f"recipe {recipe.name}: {path} is {value}; fit-encoder takes {only} only: {why}"
            )
    if recipe.shared is not None and recipe.loss.structure:
        raise RecipeError(
            f"recipe {recipe.name}: loss.structure compares heads, which a shared encoder has not"
        )
    if not (recipe.schedule.epochs or recipe.schedule.steps) or "tokens" in recipe.cut:
        requirement = "heads on pooled outputs" if "tokens" in recipe.cut else "at least one epoch"
        raise RecipeError(f"recipe {recipe.name}: fit-encoder needs {requirement}")
