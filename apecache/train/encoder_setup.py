"""A fit within towers, ready to begin: what it reads, what it trains, and its identity."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from apecache.arguments import as_path
from apecache.errors import OptionError, RecipeError
from apecache.fingerprint import Fingerprint, Json
from apecache.models.dual_encoder import EncoderModel, Side, Teacher, build_model
from apecache.recipes.recipe import Recipe
from apecache.runs.heads import TrainedHeads
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs
from apecache.train.encoder_data import (
    FitEncoderSpec,
    Source,
    TeacherSource,
    open_inputs,
    open_source,
    open_teacher,
    split_rows,
)
from apecache.train.encoder_fit import image_views
from apecache.train.live import Inputs, OpenImage
from apecache.train.ranks import Ranks
from apecache.train.warm_start import begin_from, open_start


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a fit reads: each side (image before text), a teacher, heads to begin with."""

    store: FeatureStore
    recipe: Recipe
    spec: FitEncoderSpec
    sources: tuple[Source, Source]
    teacher: TeacherSource | None
    start: TrainedHeads | None

    @property
    def arrays(self) -> list[FeatureArray]:
        """What is read of the store."""
        sides = [source.array for source in self.sources if source.array is not None]
        return sides if self.teacher is None else [*sides, self.teacher.array]

    def settings(self) -> dict[str, Json]:
        """What makes a fit another one, beside the encoders; `init_from`: digest of heads to begin
        with."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": self.spec.seed,
            "splits": asdict(self.spec.splits),
            "autocast": self.spec.autocast,
            "data": self.store.digest,
            "init_from": None if self.start is None else self.start.digest,
        }

    def identity(self) -> Fingerprint:
        """What a checkpoint belongs to."""
        sides: dict[str, Json] = {
            s.side: {"encoder": dict(s.fingerprint.fields), "cut": s.cut} for s in self.sources
        }
        taught: Json = None if self.teacher is None else dict(self.teacher.fingerprint.fields)
        return Fingerprint(fields={**self.settings(), **sides, "teacher": taught})

    def describe(self, trained: Mapping[str, int]) -> dict[str, Json]:
        """The same for a finished run's description; `trained`: parameters of each side."""
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
        teacher = self.teacher
        taught: Json = (
            None
            if teacher is None
            else {"name": teacher.array.name, "dim": teacher.taught.shape[1]}
        )
        return {**sides, "teacher": taught, **self.settings()}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`train`, `dev` hold rows of the store's table, which `inputs` (image before text) read."""

    opened: Opened
    model: EncoderModel
    inputs: tuple[Inputs, Inputs]
    train: FeaturePairs
    dev: FeaturePairs


def set_up(
    store: FeatureStore,
    recipe: Recipe,
    spec: FitEncoderSpec,
    open_image: OpenImage | None,
    device: torch.device,
) -> Setup:
    """Raises as `fit_encoder` does before it trains."""
    image, text = (
        open_source(store, recipe=recipe, side=side, spec=spec, device=device)
        for side in ("image", "text")
    )
    teacher = open_teacher(store, recipe, device)
    start = (
        None
        if spec.init_from is None
        else open_start(as_path(spec.init_from, "init_from"), recipe, (image, text))
    )
    opened = Opened(
        store=store,
        recipe=recipe,
        spec=spec,
        sources=(image, text),
        teacher=teacher,
        start=start,
    )
    train, dev = split_rows(store, sources=opened.sources, spec=spec, teacher=teacher)
    first, second = (
        open_inputs(source, store=store, open_image=open_image, device=device)
        for source in opened.sources
    )
    image_views(recipe, spec, (first, second))
    return Setup(
        opened=opened,
        model=_model(opened, train, device),
        inputs=(first, second),
        train=train,
        dev=dev,
    )


def _model(opened: Opened, train: FeaturePairs, device: torch.device) -> EncoderModel:
    sources = opened.sources
    spec = opened.spec
    taught = None if opened.teacher is None else opened.teacher.taught
    teacher = None if taught is None else Teacher(dim=taught.shape[1], features=taught)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        encoders = [source.encoder for source in sources]
        cuts = [source.cut for source in sources]
        model = build_model(
            opened.recipe,
            encoders,
            [source.dim for source in sources],
            device,
            cuts,
            teacher,
        )
    for side, source, used in zip(
        (model.image, model.text),
        sources,
        (train.image, train.text),
        strict=True,
    ):
        if isinstance(side, Side) and side.tower is None and source.features is not None:
            side.head.fit_statistics(source.features[used.to(device)])
    if opened.start is not None and spec.init_from is not None:
        begin_from(opened.start, model, Path(spec.init_from))
    return model


# --- what can be trained --------------------------------------------------------------------------


def require_sensible(recipe: Recipe, spec: FitEncoderSpec, ranks: Ranks) -> None:
    """Raises RecipeError for what the encoder trainer cannot do, OptionError for settings that make
    no sense."""
    if spec.slice_size is not None and spec.slice_size < 1:
        raise OptionError(f"slices of {spec.slice_size} pairs; expected at least 1")
    if recipe.trains_heads_alone:
        raise RecipeError(f"recipe {recipe.name} trains heads alone; use fit-head, which is faster")
    _require_known(recipe)
    sliced = spec.slice_size is not None and spec.slice_size < recipe.schedule.batch_size
    if (sliced or ranks.size > 1) and "batch" in (recipe.image.norm, recipe.text.norm):
        raise RecipeError(
            f"recipe {recipe.name}: batch norm needs the whole batch at once; leave slices out"
        )


ONLY: dict[str, tuple[object, str]] = {
    "init": ("random", "a closed form needs the features of both sides"),
    "augmentation.noise": (0.0, "noise is for cached features; see augmentation.image"),
    "augmentation.mixup": (0.0, "mixup is for cached features"),
    "augmentation.token_dropout": (0.0, "it is for heads on cached tokens"),
}
"""What a recipe may say of these here, and why nothing else."""


def _require_known(recipe: Recipe) -> None:
    """Refuse what this trainer would pass over in silence."""
    values = recipe.model_dump()
    for path, (only, why) in ONLY.items():
        found: Any = values
        for key in path.split("."):
            found = found[key]
        if found != only:
            raise RecipeError(
                f"recipe {recipe.name}: {path} is {found}; fit-encoder takes {only} only: {why}"
            )
    if recipe.shared is not None and recipe.loss.structure:
        raise RecipeError(
            f"recipe {recipe.name}: loss.structure compares heads, which a shared encoder has not"
        )
    if not (recipe.schedule.epochs or recipe.schedule.steps) or "tokens" in recipe.cut:
        what = "heads on pooled outputs" if "tokens" in recipe.cut else "at least one epoch"
        raise RecipeError(f"recipe {recipe.name}: fit-encoder needs {what}")
