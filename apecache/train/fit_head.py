"""The head trainer: features stay on the device, the encoders are never opened.

Epochs are chosen on the dev split only (mean of R@1, 5, 10 both ways); the split that will be reported is never read.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apecache.errors import DataError, RecipeError, require_new
from apecache.evaluate.retrieval import RetrievalReport, retrieval_report
from apecache.fingerprint import Json
from apecache.heads.checkpoint import DESCRIPTION, WEIGHTS, TrainedHeads, TrainedSide, save_heads
from apecache.heads.pooled import PooledHead, build_heads
from apecache.losses.contrastive import Temperature, info_nce
from apecache.recipes.recipe import Recipe
from apecache.store.reader import FeatureArray, FeatureStore
from apecache.train.batches import FeaturePairs, SplitSpec, batches, choose_splits, load_on, select_pairs
from apecache.train.optim import build_adamw, learning_rate_factor

HISTORY, RECIPE = "history.jsonl", "recipe.json"
Progress = Callable[[dict[str, Any]], None]
"""Called with one line of the history after every epoch; epoch 0 is the untrained head."""


@dataclass(frozen=True)
class FitSpec:
    """Which features, which splits, where. Names of features are needed only if the store has several."""

    image_features: str | None = None
    text_features: str | None = None
    splits: SplitSpec = field(default_factory=SplitSpec)
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False


@dataclass(frozen=True)
class FitReport:
    """`dev` and `untrained` are reports on the dev split: of the best epoch, and of the head before training."""

    run: Path
    best_epoch: int
    n_epochs: int
    dev: RetrievalReport
    untrained: RetrievalReport
    n_trained_parameters: int
    n_train_images: int
    n_dev_images: int
    seconds: float


class AlignmentModel(nn.Module):
    """Two heads and a temperature."""

    def __init__(self, image: PooledHead, text: PooledHead, temperature: Temperature) -> None:
        super().__init__()
        self.image, self.text, self.temperature = image, text, temperature

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Loss of a batch of pairs: features [n, image_dim], [n, text_dim] -> scalar."""
        return info_nce(self.image(image), self.text(text), self.temperature.scale())


def fit_head(
    store: FeatureStore, recipe: Recipe, out: Path, spec: FitSpec | None = None, progress: Progress = lambda _: None
) -> FitReport:
    """Fit the recipe's heads on a store's features and write a run folder: head, history, recipe.

    Raises:
        RunError: `out` holds a finished run. IncompleteError, DamagedError: the store. RecipeError: the splits or
        widths do not work. DataError: the loss is not finite.
    """
    spec = spec or FitSpec()
    _require_usable(out, spec.overwrite)
    arrays = (store.array("image", spec.image_features), store.array("text", spec.text_features))
    device = _device(spec.device)
    train, dev = load_splits(store, *arrays, spec.splits, device)
    model = _build_model(recipe, train, spec.seed, device)
    _clear_folder(out)
    begin = time.perf_counter()
    best = _train(model, train, dev, recipe, spec.seed, _logger(out, recipe, progress))
    model.load_state_dict(best.state)
    report = FitReport(
        out,
        best.epoch,
        recipe.schedule.epochs,
        best.dev,
        best.untrained,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        len(train),
        len(dev),
        time.perf_counter() - begin,
    )
    save_heads(_trained(model, arrays, recipe, spec, store, report), out)
    return report


def load_splits(
    store: FeatureStore, image: FeatureArray, text: FeatureArray, spec: SplitSpec, device: torch.device
) -> tuple[FeaturePairs, FeaturePairs]:
    """Training and dev pairs on the device. Raises as `fit_head` does."""
    pairs = store.pairs
    masks = choose_splits(pairs, spec)
    features = load_on(image, device), load_on(text, device)
    ok_images, ok_texts = image.load_ok(), text.load_ok()
    train, dev = (select_pairs(*features, pairs.image_rows, mask & ok_images, ok_texts) for mask in masks)
    for what, chosen in (("training", train), ("dev", dev)):
        if len(chosen) < 2:
            raise RecipeError(f"only {len(chosen)} {what} images with a caption; a contrastive loss needs at least 2")
    return train, dev


def untrained_heads(store: FeatureStore, recipe: Recipe, spec: FitSpec | None = None) -> TrainedHeads:
    """The recipe's heads as they are before training, standardisation fitted: the baseline of a result table."""
    spec = spec or FitSpec()
    arrays = (store.array("image", spec.image_features), store.array("text", spec.text_features))
    device = _device(spec.device)
    train, _ = load_splits(store, *arrays, spec.splits, device)
    model = _build_model(recipe, train, spec.seed, device)
    sides = (_side(model.image, arrays[0]), _side(model.text, arrays[1]))
    return TrainedHeads(*sides, float(model.temperature.scale().detach()))


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class _Best:
    epoch: int
    dev: RetrievalReport
    untrained: RetrievalReport
    state: dict[str, Tensor]


def _train(
    model: AlignmentModel, train: FeaturePairs, dev: FeaturePairs, recipe: Recipe, seed: int, log: Progress
) -> _Best:
    """All epochs; returns the weights of the epoch that is best on dev (the untrained head is not a candidate)."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = build_adamw(model.parameters(), recipe.optimiser)
    steps_per_epoch = max(1, len(train) // min(recipe.schedule.batch_size, len(train)))
    n_steps = steps_per_epoch * recipe.schedule.epochs
    untrained = evaluate_model(model, dev)
    log(_line(0, 0, math.nan, 0.0, model, untrained, 0.0))
    best: _Best | None = None
    with torch.random.fork_rng(devices=[train.image.device] if train.image.is_cuda else []):
        torch.manual_seed(seed + 1)
        for epoch in range(1, recipe.schedule.epochs + 1):
            begin = time.perf_counter()
            first_step = (epoch - 1) * steps_per_epoch
            loss = _epoch(model, train, recipe, optimiser, generator, range(first_step, n_steps))
            report = evaluate_model(model, dev)
            lr = optimiser.param_groups[0]["lr"]
            seconds = time.perf_counter() - begin
            log(_line(epoch, first_step + steps_per_epoch, loss, lr, model, report, seconds))
            if best is None or report.mean_recall > best.dev.mean_recall:
                state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                best = _Best(epoch, report, untrained, state)
    assert best is not None
    return best


def _epoch(
    model: AlignmentModel,
    train: FeaturePairs,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    steps: range,
) -> float:
    """One pass; returns the mean loss. The loss is read from the device once, at the end."""
    model.train()
    losses = []
    for step, (image, text) in zip(steps, batches(train, recipe.schedule.batch_size, generator), strict=False):
        factor = learning_rate_factor(step, steps.stop, recipe.schedule)
        for group in optimiser.param_groups:
            group["lr"] = recipe.optimiser.lr * factor
        loss = model(*_augment(model, image, text, recipe.augmentation.noise))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.optimiser.clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.optimiser.clip)
        optimiser.step()
        model.temperature.clamp()
        losses.append(loss.detach())
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise DataError(f"the loss is not finite before step {steps.start + len(losses)}; lower optimiser.lr")
    return mean


def _augment(model: AlignmentModel, image: Tensor, text: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    if not noise:
        return image, text
    sides = ((image, model.image), (text, model.text))
    first, second = (x.float() + noise * head.deviation * torch.randn_like(x, dtype=torch.float32) for x, head in sides)
    return first, second


@torch.inference_mode()
def evaluate_model(model: AlignmentModel, pairs: FeaturePairs) -> RetrievalReport:
    """Retrieval among `pairs`, dropout off."""
    model.eval()
    return retrieval_report(model.image(pairs.image), model.text(pairs.text), pairs.image_of_text)


def _build_model(recipe: Recipe, train: FeaturePairs, seed: int, device: torch.device) -> AlignmentModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            image, text = build_heads(recipe.image, recipe.text, train.image.shape[1], train.text.shape[1])
        except ValueError as error:
            raise RecipeError(f"recipe {recipe.name}: {error}") from None
    image, text = image.to(device), text.to(device)
    image.fit_statistics(train.image)
    text.fit_statistics(train.text)
    bounds = (recipe.loss.min_temperature, recipe.loss.max_temperature)
    return AlignmentModel(image, text, Temperature(recipe.loss.temperature, *bounds, recipe.loss.learnable).to(device))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try auto or cpu") from None


# --- the run folder --------------------------------------------------------------------------------------------------


def _require_usable(out: Path, overwrite: bool) -> None:
    """An unfinished run (no head yet) is begun anew; a finished one only with `overwrite`, a foreign folder never."""
    ours = {HISTORY, RECIPE, WEIGHTS, f".{WEIGHTS}.tmp", f".{DESCRIPTION}.tmp"}
    unfinished = out.is_dir() and {path.name for path in out.iterdir()} <= ours
    finished = (out / DESCRIPTION).is_file() and (out / RECIPE).is_file()  # an index has a head, but no recipe
    if not unfinished and not (overwrite and finished):
        require_new(out, "run folder", overwrite)


def _clear_folder(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True)


def _logger(out: Path, recipe: Recipe, progress: Progress) -> Progress:
    (out / RECIPE).write_text(json.dumps(recipe.model_dump(), indent=1, ensure_ascii=False), encoding="utf-8")

    def log(line: dict[str, Any]) -> None:
        with (out / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        progress(line)

    return log


def read_history(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's history, epoch 0 (untrained) first; `loss` is None there."""
    for text in (run / HISTORY).read_text(encoding="utf-8").splitlines():
        yield json.loads(text)


def _line(
    epoch: int, step: int, loss: float, lr: float, model: AlignmentModel, dev: RetrievalReport, seconds: float
) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": step,
        "loss": loss if math.isfinite(loss) else None,
        "lr": lr,
        "temperature": 1 / float(model.temperature.scale().detach()),
        "dev": {
            "image_to_text": {str(k): value for k, value in dev.image_to_text.items()},
            "text_to_image": {str(k): value for k, value in dev.text_to_image.items()},
            "mean_recall": dev.mean_recall,
        },
        "seconds": seconds,
    }


def _side(head: PooledHead, array: FeatureArray) -> TrainedSide:
    return TrainedSide(head, asdict(array.record.spec), array.record.encoder)


def _trained(
    model: AlignmentModel,
    arrays: tuple[FeatureArray, FeatureArray],
    recipe: Recipe,
    spec: FitSpec,
    store: FeatureStore,
    report: FitReport,
) -> TrainedHeads:
    training: dict[str, Json] = {
        "recipe": recipe.model_dump(mode="json"),
        "seed": spec.seed,
        "splits": asdict(spec.splits),
        "data": store.digest,
        "best_epoch": report.best_epoch,
        "dev": asdict(report.dev),
        "n_trained_parameters": report.n_trained_parameters,
        "n_train_images": report.n_train_images,
        "n_dev_images": report.n_dev_images,
        "seconds": report.seconds,
    }
    sides = (_side(model.image, arrays[0]), _side(model.text, arrays[1]))
    return TrainedHeads(*sides, float(model.temperature.scale().detach()), training)
