"""Find wrong captions, near copies across splits, undescribed images and gaps in a store."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.auto.fit_features import features_of_recipe, features_of_run
from apecache.auto.near_pairs import (
    Cluster,
    NearPair,
    cluster_images,
    near_pairs_across_splits,
)
from apecache.auto.pair_scores import PairScores, score_pairs
from apecache.auto.split_pairs import SplitPairs, load_pairs
from apecache.device import resolve_device
from apecache.errors import OptionError, RecipeError
from apecache.fingerprint import Json
from apecache.recipes.recipe import Recipe
from apecache.storage.replace import replace_text
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable
from apecache.train.batches import SplitSpec, choose_splits
from apecache.train.keep_list import write_keep_list

KEEP = "keep.tsv"
FINDINGS = "curate.json"
CLOSED_FORM = "cca"
"""Recipe of the heads where neither a run nor a recipe is given: it takes seconds."""


@dataclass(frozen=True, kw_only=True)
class CurateSpec:
    """Say what is examined, and how."""

    run: AnyPath | None = None
    """Run of fit-head: its recipe, features and training split are used."""
    recipe: str | None = None
    """Recipe of the heads that score, without a run; trained ones are fitted in each fold. None:
    the closed form `cca`."""
    image_features: str | None = None
    """Name of the image features; needed without a run if the store has several."""
    text_features: str | None = None
    """As `image_features`."""
    train_split: str | None = None
    """Training split; None: that of the run, or `train`, or the only one."""
    n_folds: int = 5
    """Number of folds: each caption is scored by heads that were fitted on the other folds."""
    seed: int = 0
    """Seed of folds and fits."""
    least_probability: float = 0.5
    """Captions that are wrong with at least this probability are left out of the keep list."""
    near: float = 0.95
    """Cosine of centered features from which items of different splits are near copies."""
    limit: int = 200
    """Largest number of findings of a kind."""
    device: str = "auto"
    """Device of the fits."""


@dataclass(frozen=True, kw_only=True)
class WrongCaption:
    """Report a caption that is likely wrong."""

    row: int
    """Row of the caption in the store's table."""
    key: str
    """Key of its image."""
    caption: str
    probability: float
    """Estimated probability that it is wrong."""
    image_share: float
    """Share of images that are closer to it than its own."""
    sibling_share: float | None
    """Share of images whose captions are closer to it than its own image's; None: an only one."""
    nearest_key: str
    """Key of the image that is closest to it."""


@dataclass(frozen=True, kw_only=True)
class NearCopy:
    """Report two items of different splits that are nearly equal."""

    first: str
    """Key of an image, or a caption."""
    second: str
    first_split: str
    second_split: str
    similarity: float
    first_key: str
    """Key of the image, or of the caption's image."""
    second_key: str


@dataclass(frozen=True, kw_only=True)
class UndescribedImage:
    """Report an image whose captions all fit other images better."""

    key: str
    captions: tuple[str, ...]
    best_share: float
    """Share of images that are closer to its best caption."""


@dataclass(frozen=True, kw_only=True)
class ImageGroup:
    """Report a cluster of similar images."""

    n_train: int
    n_other: int
    found: float | None
    """Per cent of its training captions that find their image first, out of fold."""
    examples: tuple[str, ...]
    """Keys of its most typical images."""


@dataclass(frozen=True, kw_only=True)
class CurateReport:
    """Report what is wrong with the pairs of a store."""

    out: Path
    n_images: int
    """Images that were examined, those of the training split."""
    n_captions: int
    share_wrong: float
    """Estimated share of wrong captions; hard ones count in part."""
    n_dropped: int
    """Captions that the keep list leaves out."""
    found: float
    """Per cent of captions that find their image first within their fold."""
    wrong_captions: tuple[WrongCaption, ...]
    near_images: tuple[NearCopy, ...]
    near_captions: tuple[NearCopy, ...]
    undescribed: tuple[UndescribedImage, ...]
    groups: tuple[ImageGroup, ...]
    scores: PairScores = field(repr=False)
    """Scores of all captions that were examined."""
    text_rows: NDArray[np.int64] = field(repr=False)
    """Rows of these captions in the store's table."""

    def to_json(self) -> dict[str, Json]:
        """Return the findings as JSON, without the scores of all captions."""
        values = {
            name: getattr(self, name)
            for name in ("n_images", "n_captions", "share_wrong", "n_dropped", "found")
        }
        for name in ("wrong_captions", "near_images", "near_captions", "undescribed", "groups"):
            values[name] = [asdict(finding) for finding in getattr(self, name)]
        return values


@dataclass(frozen=True, kw_only=True)
class Examined:
    """Hold what is examined."""

    store: FeatureStore
    image: FeatureArray
    text: FeatureArray
    recipe: Recipe
    train_images: NDArray[np.bool_]
    """bool [n_images], the training split, with the images of a drawn dev split."""


def curate(store: FeatureStore, out: AnyPath, spec: CurateSpec | None = None) -> CurateReport:
    """Examine a store's pairs, and write `keep.tsv` and `curate.json` into a folder.

    Args:
        store: A complete feature store.
        out: Folder to write to; files of an earlier call are replaced.
        spec: What is examined, and how.

    Raises:
        RunError: `run` is not a finished run of fit-head.
        RecipeError: The split does not exist or is too small, or the recipe takes tokens or trains
            within the towers.
        OptionError: A run and a recipe are both given.
        MismatchError: The features are pooled in another way than the recipe says.
        IncompleteError, DamagedError: The store is incomplete or damaged.
    """
    require_type(store, FeatureStore, "store")
    require_spec(spec, CurateSpec, "spec", optional=True)
    spec = spec or CurateSpec()
    out = as_path(out, "out")
    examined = _open(store, spec)
    loaded = load_pairs(
        store,
        image=examined.image,
        text=examined.text,
        images=examined.train_images,
        device=resolve_device(spec.device),
    )
    scores = score_pairs(loaded.pairs, examined.recipe, spec.n_folds, spec.seed)
    dropped = loaded.rows.texts[scores.posterior >= spec.least_probability]
    # Captions outside of training were not examined, so they are kept.
    keep_mask = np.ones(len(store.pairs.captions), dtype=bool)
    keep_mask[dropped] = False
    report = CurateReport(
        out=out,
        n_images=len(loaded.pairs),
        n_captions=len(loaded.rows.texts),
        share_wrong=scores.share_wrong,
        n_dropped=len(dropped),
        found=100 * float(scores.found.mean()),
        wrong_captions=tuple(_wrong_captions(store.pairs, loaded, scores, spec)),
        near_images=tuple(_near_images(examined, spec)),
        near_captions=tuple(_near_captions(examined, spec)),
        undescribed=tuple(_undescribed(store.pairs, loaded, scores, spec)),
        groups=tuple(_groups(examined, loaded, scores, spec)),
        scores=scores,
        text_rows=loaded.rows.texts,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_keep_list(out / KEEP, store.pairs, keep_mask)
    replace_text(out / FINDINGS, json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    return report


def _open(store: FeatureStore, spec: CurateSpec) -> Examined:
    """Choose recipe, features and training split: those of the run, or of the settings."""
    if spec.run is not None and spec.recipe is not None:
        raise OptionError(
            "--run and --recipe are both given; the run has its own recipe: leave one out"
        )
    if spec.run is None:
        opened = features_of_recipe(
            store,
            recipe_name=spec.recipe or CLOSED_FORM,
            image_features=spec.image_features,
            text_features=spec.text_features,
        )
    else:
        opened = features_of_run(store, spec.run, "curate")
    splits = SplitSpec(train=spec.train_split)
    if opened.splits is not None and spec.train_split is None:
        splits = opened.splits
    if opened.image.tokens is not None or opened.text.tokens is not None:
        raise RecipeError("curate compares pooled features; choose others with --image-features")
    train, dev = choose_splits(store.pairs, splits)
    # A drawn dev split belongs to the training pairs. A named one is a split of its own.
    train_images = train | dev if splits.dev is None else train
    return Examined(
        store=store,
        image=opened.image,
        text=opened.text,
        recipe=opened.recipe,
        train_images=train_images,
    )


def _wrong_captions(
    table: PairTable,
    loaded: SplitPairs,
    scores: PairScores,
    spec: CurateSpec,
) -> Iterator[WrongCaption]:
    """Yield the captions that are most likely wrong, the likeliest first."""
    likely = np.flatnonzero(scores.posterior >= spec.least_probability)
    # Stable, so that equal shares are listed in the order of the store.
    order = likely[np.argsort(-scores.wrong_share[likely], kind="stable")]
    for position in order[: spec.limit].tolist():
        row = int(loaded.rows.texts[position])
        nearest = loaded.rows.images[scores.nearest_image[position]]
        sibling_share = float(scores.sibling_share[position])
        yield WrongCaption(
            row=row,
            key=str(table.keys[table.image_rows[row]]),
            caption=str(table.captions[row]),
            probability=float(scores.posterior[position]),
            image_share=float(scores.image_share[position]),
            sibling_share=None if np.isnan(sibling_share) else sibling_share,
            nearest_key=str(table.keys[nearest]),
        )


def _near_images(examined: Examined, spec: CurateSpec) -> Iterator[NearCopy]:
    """Yield images of different splits that are nearly equal."""
    table = examined.store.pairs
    rows = np.flatnonzero(examined.image.load_ok())
    features = _pooled(examined.image, rows)
    near_pairs = near_pairs_across_splits(
        features,
        splits=table.splits[rows],
        threshold=spec.near,
        limit=spec.limit,
    )
    for pair in near_pairs:
        first = int(rows[pair.first])
        second = int(rows[pair.second])
        yield _near_copy(
            table, pair, (first, second), (str(table.keys[first]), str(table.keys[second]))
        )


def _near_captions(examined: Examined, spec: CurateSpec) -> Iterator[NearCopy]:
    """Yield captions of images in different splits that are nearly equal."""
    table = examined.store.pairs
    # A row that could not be encoded is NaN, and near to nothing.
    rows = np.flatnonzero(examined.text.load_ok())
    owners = table.image_rows[rows]
    near_pairs = near_pairs_across_splits(
        _pooled(examined.text, rows),
        splits=table.splits[owners],
        threshold=spec.near,
        limit=spec.limit,
    )
    for pair in near_pairs:
        words = (str(table.captions[rows[pair.first]]), str(table.captions[rows[pair.second]]))
        yield _near_copy(table, pair, (int(owners[pair.first]), int(owners[pair.second])), words)


def _near_copy(
    table: PairTable,
    pair: NearPair,
    images: tuple[int, int],
    items: tuple[str, str],
) -> NearCopy:
    first, second = images
    return NearCopy(
        first=items[0],
        second=items[1],
        first_split=str(table.splits[first]),
        second_split=str(table.splits[second]),
        similarity=pair.similarity,
        first_key=str(table.keys[first]),
        second_key=str(table.keys[second]),
    )


def _undescribed(
    table: PairTable,
    loaded: SplitPairs,
    scores: PairScores,
    spec: CurateSpec,
) -> Iterator[UndescribedImage]:
    """Yield images of which every caption is likely wrong, the worst first."""
    first_text = loaded.rows.first_text
    # A small share is a good one: the minimum is that of an image's best caption.
    best_shares = np.minimum.reduceat(scores.image_share, first_text[:-1])
    least_posteriors = np.minimum.reduceat(scores.posterior, first_text[:-1])
    images = np.flatnonzero(least_posteriors >= spec.least_probability)
    order = images[np.argsort(-best_shares[images], kind="stable")]
    for position in order[: spec.limit].tolist():
        rows = loaded.rows.texts[first_text[position] : first_text[position + 1]]
        yield UndescribedImage(
            key=str(table.keys[loaded.rows.images[position]]),
            captions=tuple(str(table.captions[row]) for row in rows),
            best_share=float(best_shares[position]),
        )


def _groups(
    examined: Examined,
    loaded: SplitPairs,
    scores: PairScores,
    spec: CurateSpec,
) -> Iterator[ImageGroup]:
    """Yield clusters of similar images, those that are found least first."""
    table = examined.store.pairs
    rows = np.flatnonzero(examined.image.load_ok())
    # Images outside of training have no captions that were scored: NaN, and not 0.
    share_found = np.full(len(table.keys), np.nan)
    first_text = loaded.rows.first_text
    n_captions = np.diff(first_text)
    n_found = np.add.reduceat(scores.found.astype(np.float64), first_text[:-1])
    share_found[loaded.rows.images] = n_found / n_captions
    clusters: list[Cluster] = cluster_images(
        _pooled(examined.image, rows),
        is_train=examined.train_images[rows],
        found=share_found[rows],
        seed=spec.seed,
    )
    for cluster in clusters:
        yield ImageGroup(
            n_train=cluster.n_train,
            n_other=cluster.n_other,
            found=None if np.isnan(cluster.found) else cluster.found,
            examples=tuple(str(table.keys[rows[position]]) for position in cluster.examples),
        )


def _pooled(array: FeatureArray, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return features of some rows, float32 [n, dim]; of several views their mean."""
    features = array.load()[rows].astype(np.float32)
    return features.mean(1) if features.ndim == 3 else features
