"""The encoder trainer: what a recipe unlocks within the towers trains, a side that is frozen comes from the cache.

A side of which nothing but the head can train is read as the store's pooled features, and its encoder is never opened.
A side whose features are the tokens of a layer (`tokens@8`) runs from there; any other side from pixels or token ids.
Epochs are chosen on the dev split only. Every epoch ends with a checkpoint, from which the same command goes on, to
the same result bit by bit on the same machine.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apecache.data.augment import Views
from apecache.encoders.encoder import parse_device
from apecache.errors import DataError, OptionError, RecipeError
from apecache.evaluate.retrieval import RetrievalReport, retrieval_report
from apecache.fingerprint import Fingerprint, Json, Modality
from apecache.recipes.encoder_model import EncoderModel, Side, Teacher, build_model
from apecache.recipes.recipe import Recipe
from apecache.store.reader import FeatureStore
from apecache.train.encoder_data import (
    FitEncoderSpec,
    Source,
    TeacherSource,
    open_inputs,
    open_source,
    open_teacher,
    split_rows,
)
from apecache.train.encoder_run import Checkpoint, Progress, begin_run, finish_run, save_checkpoint
from apecache.train.grad_cache import backward_in_slices, forked_generators
from apecache.train.live import (
    ImageInputs,
    Inputs,
    OpenImage,
    PairRows,
)
from apecache.train.optim import learning_rate_factor


@dataclass(frozen=True)
class FitEncoderReport:
    """`dev` and `untrained`: on the dev split, of the best epoch and of what training began with. `cached`: sides whose
    encoder was not opened."""

    run: Path
    best_epoch: int
    n_epochs: int
    dev: RetrievalReport
    untrained: RetrievalReport
    n_trained_parameters: int
    n_train_images: int
    n_dev_images: int
    cached: tuple[Modality, ...]
    seconds: float


def fit_encoder(
    store: FeatureStore,
    recipe: Recipe,
    out: Path,
    spec: FitEncoderSpec | None = None,
    open_image: OpenImage | None = None,
    progress: Progress = lambda _: None,
) -> FitEncoderReport:
    """Train the recipe's towers and heads on a store's pairs and write a run folder.

    `open_image`: reads the image of a key; needed where the image side is live.

    Raises:
        RunError: `out` holds a finished run. MismatchError: `out` holds another one that was broken off.
        IncompleteError, DamagedError: the store. EncoderError: a live encoder. RecipeError: rules, splits or widths do
        not work. OptionError: settings that make no sense. DataError: an unreadable image, a loss that is not finite.
    """
    spec = spec or FitEncoderSpec()
    device = parse_device(spec.device)
    _require_sensible(recipe, spec)
    begin = time.perf_counter()
    sources = [open_source(store, recipe, side, spec, device) for side in ("image", "text")]
    teacher = open_teacher(store, recipe, device)
    train, dev = split_rows(store, sources, spec, teacher)
    model, inputs = _build(store, recipe, spec, sources, train, open_image, device, teacher)
    identity = Fingerprint(
        {
            **_identity(store, recipe, spec),
            "sides": [[s.fingerprint.fields, s.cut] for s in sources],
            "teacher": None if teacher is None else teacher.fingerprint.fields,
        }
    )
    _augmented(inputs, recipe, spec, 0)
    saved = begin_run(out, recipe, identity, spec.overwrite)
    best = _train(model, inputs, (train, dev), recipe, spec, out, saved, progress)
    model.load_kept(best.tensors)
    cached = tuple(source.side for source in sources if source.encoder is None)
    report = FitEncoderReport(
        out,
        best.epoch,
        recipe.schedule.epochs,
        best.dev,
        best.untrained,
        model.n_trained,
        len(train),
        len(dev),
        cached,
        time.perf_counter() - begin,
    )
    finish_run(out, model.final_state(), _describe(recipe, spec, sources, store, report, teacher))
    return report


# --- what is trained -------------------------------------------------------------------------------------------------


def _require_sensible(recipe: Recipe, spec: FitEncoderSpec) -> None:
    if spec.slice_size is not None and spec.slice_size < 1:
        raise OptionError(f"slices of {spec.slice_size} pairs; expected at least 1")
    if recipe.trains_heads_alone:
        raise RecipeError(f"recipe {recipe.name} trains heads alone; use fit-head, which is faster")
    _require_known(recipe)
    sliced = spec.slice_size is not None and spec.slice_size < recipe.schedule.batch_size
    if sliced and "batch" in (recipe.image.norm, recipe.text.norm):
        raise RecipeError(f"recipe {recipe.name}: batch norm needs the whole batch at once; leave slices out")


ONLY: dict[str, object] = {
    "init": "random",
    "loss.kind": "infonce",
    "loss.captions": 1,
    "loss.structure": 0.0,
    "optimiser.kind": "adamw",
    "optimiser.ema": 0.0,
    "schedule.steps": 0,
    "schedule.accumulate": 1,
    "schedule.patience": 0,
    "schedule.evaluate_every": 1,
    "augmentation.noise": 0.0,
    "augmentation.mixup": 0.0,
    "augmentation.token_dropout": 0.0,
}
"""What a recipe may say of these: the head trainer knows more."""


def _require_known(recipe: Recipe) -> None:
    """Refuse what this trainer would pass over in silence."""
    values = recipe.model_dump()
    for path, only in ONLY.items():
        found: Any = values
        for key in path.split("."):
            found = found[key]
        if found != only:
            raise RecipeError(f"recipe {recipe.name}: {path} is {found}; fit-encoder knows {only} only")
    if recipe.schedule.epochs < 1 or "tokens" in recipe.cut:
        what = "at least one epoch" if recipe.schedule.epochs < 1 else "heads on pooled outputs"
        raise RecipeError(f"recipe {recipe.name}: fit-encoder needs {what}")


def _build(
    store: FeatureStore,
    recipe: Recipe,
    spec: FitEncoderSpec,
    sources: Sequence[Source],
    train: PairRows,
    open_image: OpenImage | None,
    device: torch.device,
    teacher: TeacherSource | None,
) -> tuple[EncoderModel, tuple[Inputs, Inputs]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        encoders, cuts = [source.encoder for source in sources], [source.cut for source in sources]
        taught = None if teacher is None else Teacher(teacher.taught.shape[1], teacher.taught)
        model = build_model(recipe, encoders, [source.dim for source in sources], device, cuts, taught)
    rows = (train.images, [row for texts in train.texts for row in texts])
    for side, source, used in zip((model.image, model.text), sources, rows, strict=True):
        if isinstance(side, Side) and side.tower is None and source.features is not None:
            side.head.fit_statistics(source.features[torch.tensor(used, device=device)])
    return model, (
        open_inputs(sources[0], store, open_image, device),
        open_inputs(sources[1], store, open_image, device),
    )


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class _Best:
    epoch: int
    dev: RetrievalReport
    untrained: RetrievalReport
    tensors: dict[str, Tensor]


def _train(
    model: EncoderModel,
    inputs: tuple[Inputs, Inputs],
    splits: tuple[PairRows, PairRows],
    recipe: Recipe,
    spec: FitEncoderSpec,
    out: Path,
    saved: Checkpoint | None,
    progress: Progress,
) -> _Best:
    train, dev = splits
    settings = recipe.optimiser
    optimiser = torch.optim.AdamW(model.groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    if saved is None:
        untrained = evaluate(model, inputs, dev, spec)
        checkpoint = Checkpoint.begin(model.kept_state(), untrained)
        line = _line(0, None, model, untrained, 0.0)
        save_checkpoint(out, checkpoint.add(line), optimiser)
        progress(line)
    else:
        checkpoint = saved
        model.load_kept(saved.tensors)
        saved.restore(optimiser)
    for epoch in range(checkpoint.epoch + 1, recipe.schedule.epochs + 1):
        begin = time.perf_counter()
        loss = _epoch(model, inputs, train, recipe, spec, optimiser, epoch)
        trained = time.perf_counter() - begin
        report = evaluate(model, inputs, dev, spec)
        line = _line(epoch, loss, model, report, time.perf_counter() - begin)
        line["training_seconds"] = trained
        checkpoint.advance(epoch, model.kept_state(), report)
        save_checkpoint(out, checkpoint.add(line), optimiser)
        progress(line)
    return _Best(checkpoint.best_epoch, checkpoint.best_dev, checkpoint.untrained, checkpoint.best)


def _epoch(
    model: EncoderModel,
    inputs: tuple[Inputs, Inputs],
    train: PairRows,
    recipe: Recipe,
    spec: FitEncoderSpec,
    optimiser: torch.optim.Optimizer,
    epoch: int,
) -> float:
    """One pass; the mean loss. What is drawn depends on seed and epoch only."""
    model.train()
    inputs = _augmented(inputs, recipe, spec, epoch)
    batches = train.epoch(recipe.schedule.batch_size, torch.Generator().manual_seed(spec.seed * 1_000_003 + epoch))
    n_steps, first = recipe.schedule.epochs * len(batches), (epoch - 1) * len(batches)
    losses = []
    with forked_generators():
        torch.manual_seed(spec.seed * 1_000_003 + epoch)
        for step, batch in enumerate(batches, first):
            rate = recipe.optimiser.lr * learning_rate_factor(step, n_steps, recipe.schedule)
            for group in optimiser.param_groups:
                group["lr"] = rate * group["factor"]
            losses.append(_step(model, inputs, batch, recipe, spec, optimiser))
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise DataError(f"the loss is not finite in epoch {epoch}; lower optimiser.lr")
    return mean


def _augmented(
    inputs: tuple[Inputs, Inputs], recipe: Recipe, spec: FitEncoderSpec, epoch: int
) -> tuple[Inputs, Inputs]:
    """As training sees them in this epoch; evaluation sees the images as they are.

    Raises RecipeError where the image side runs from cached tokens, which cannot be distorted.
    """
    wanted = recipe.augmentation.image
    if wanted is None:
        return inputs
    if not isinstance(inputs[0], ImageInputs):
        raise RecipeError(f"recipe {recipe.name}: augmentation.image needs images, not cached tokens of theirs")
    views = Views(1, spec.seed, wanted.scale, wanted.ratio, wanted.flip, wanted.operations, wanted.magnitude)
    return inputs[0].augmented(views, epoch), inputs[1]


def _step(
    model: EncoderModel,
    inputs: tuple[Inputs, Inputs],
    batch: Sequence[tuple[int, int]],
    recipe: Recipe,
    spec: FitEncoderSpec,
    optimiser: torch.optim.Optimizer,
) -> Tensor:
    def encode(part: range) -> tuple[Tensor, Tensor]:
        rows = batch[part.start : part.stop]
        with _autocast(spec, model):
            image = model.image.outputs(*inputs[0].take([row for row, _ in rows]))
            return image.float(), model.text.outputs(*inputs[1].take([row for _, row in rows])).float()

    def loss_of(image: Tensor, text: Tensor) -> Tensor:
        return model.loss(image, text, [row for row, _ in batch])

    optimiser.zero_grad(set_to_none=True)
    loss = backward_in_slices(encode, loss_of, len(batch), spec.slice_size)
    if recipe.optimiser.clip:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimiser.clip)
    optimiser.step()
    model.clamp()
    return loss


def _autocast(spec: FitEncoderSpec, model: nn.Module) -> Any:
    if spec.autocast == "float32":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16)


@torch.no_grad()
def evaluate(
    model: EncoderModel, inputs: tuple[Inputs, Inputs], pairs: PairRows, spec: FitEncoderSpec, batch: int = 64
) -> RetrievalReport:
    """Retrieval among these pairs with all their captions, dropout off."""
    model.eval()
    texts = [row for rows in pairs.texts for row in rows]
    owner = torch.tensor([i for i, rows in enumerate(pairs.texts) for _ in rows])
    embedded = []
    for side, source, rows in ((model.image, inputs[0], pairs.images), (model.text, inputs[1], texts)):
        with _autocast(spec, model):
            parts = [side(*source.take(rows[i : i + batch])).float() for i in range(0, len(rows), batch)]
        embedded.append(torch.cat(parts))
    return retrieval_report(embedded[0], embedded[1], owner.to(embedded[0].device))


def _line(epoch: int, loss: float | None, model: EncoderModel, dev: RetrievalReport, seconds: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "loss": loss,
        "temperature": 1 / float(model.temperature.scale().detach()),
        "dev": {
            "image_to_text": {str(k): value for k, value in dev.image_to_text.items()},
            "text_to_image": {str(k): value for k, value in dev.text_to_image.items()},
            "mean_recall": dev.mean_recall,
        },
        "seconds": seconds,
    }


# --- what is written down --------------------------------------------------------------------------------------------


def _identity(store: FeatureStore, recipe: Recipe, spec: FitEncoderSpec) -> dict[str, Json]:
    return {
        "recipe": recipe.model_dump(mode="json"),
        "seed": spec.seed,
        "splits": asdict(spec.splits),
        "autocast": spec.autocast,
        "data": store.digest,
    }


def _describe(
    recipe: Recipe,
    spec: FitEncoderSpec,
    sources: Sequence[Source],
    store: FeatureStore,
    report: FitEncoderReport,
    teacher: TeacherSource | None,
) -> dict[str, Json]:
    sides: dict[str, Json] = {
        source.side: {
            "encoder": asdict(source.encoder_spec),
            "fingerprint": source.fingerprint.fields,
            "dim": source.dim,
            "cached": source.encoder is None,
            "cut": source.cut,
        }
        for source in sources
    }
    taught: Json = None if teacher is None else {"name": teacher.name, "dim": teacher.taught.shape[1]}
    return {
        **sides,
        "teacher": taught,
        **_identity(store, recipe, spec),
        "best_epoch": report.best_epoch,
        "dev": asdict(report.dev),
        "n_trained_parameters": report.n_trained_parameters,
        "n_train_images": report.n_train_images,
        "n_dev_images": report.n_dev_images,
        "seconds": report.seconds,
    }
