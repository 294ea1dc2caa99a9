"""What the encoder trainer works on: of each side the store's features, an encoder, or cached
tokens and an encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.arguments import AnyPath
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.layers import resolve_layer
from apecache.encoders.load import load_classifier, load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, Pooling
from apecache.encoders.tower import tower_of
from apecache.errors import MismatchError, OptionError, RecipeError
from apecache.fingerprint import Fingerprint, Modality
from apecache.recipes.recipe import Recipe
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.train.batches import (
    FeaturePairs,
    Features,
    SplitSpec,
    choose_splits,
    require_images,
    select_pairs,
)
from apecache.train.live import (
    CachedInputs,
    ImageInputs,
    Inputs,
    OpenImage,
    TextInputs,
    TokenInputs,
)


@dataclass(frozen=True)
class FitEncoderSpec:
    """`image`, `text`: encoders of live sides; None: those of the store's features. `slice_size`:
    images, with their captions, that are in memory at once; gradients stay those of the whole
    batch. `autocast`: of the towers; parameters stay float32. `cache` False: frozen sides run from
    their inputs too, to the same result: only to measure what the cache saves. `init_from`: a
    finished run of fit-head, whose heads and temperature the fit begins with (see
    `apecache.train.warm_start`). `save_seconds`, `report_split`, `price_per_hour`: as of
    `FitSpec`."""

    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    image_features: str | None = None
    text_features: str | None = None
    splits: SplitSpec = field(default_factory=SplitSpec)
    seed: int = 0
    slice_size: int | None = None
    autocast: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    overwrite: bool = False
    cache: bool = True
    save_seconds: float = 30.0
    report_split: str = "test"
    price_per_hour: float | None = None
    init_from: AnyPath | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """One side: its cached features, its encoder, or both, features being the tokens after `cut`
    blocks then. `array`: whence the features were read."""

    side: Modality
    features: Tensor | None
    encoder: ImageEncoder | TextEncoder | None
    encoder_spec: EncoderSpec
    fingerprint: Fingerprint
    ok: NDArray[np.bool_] | None
    cut: int | None = None
    lengths: Tensor | None = None
    array: FeatureArray | None = None

    @property
    def dim(self) -> int:
        """Width of what the head takes."""
        if self.encoder is not None:
            return tower_of(self.encoder).output_dim
        assert self.features is not None
        return self.features.shape[1]


def open_source(
    store: FeatureStore,
    recipe: Recipe,
    side: Modality,
    spec: FitEncoderSpec,
    device: torch.device,
) -> Source:
    named, name = (
        (spec.image, spec.image_features) if side == "image" else (spec.text, spec.text_features)
    )
    live = recipe.towers.may_train(side) or not spec.cache
    array = None if live and named else store.array(side, name)
    ok = array.load_ok() if array else None
    if not live:
        assert array is not None
        if array.tokens is not None or array.views is not None:
            raise RecipeError(
                f"{side} features {array.name} are no pooled features of one view; choose others"
            )
        features = torch.from_numpy(array.load()).to(device)
        return Source(
            side=side,
            features=features,
            encoder=None,
            encoder_spec=array.record.spec,
            fingerprint=array.record.encoder,
            ok=ok,
            array=array,
        )
    chosen = named or (array.record.spec if array else None)
    assert chosen is not None
    pooling = recipe.towers.image_pooling if side == "image" else recipe.towers.text_pooling
    tokens = (
        array is not None
        and named is None
        and chosen.pooling == "tokens"
        and chosen.layer is not None
    )
    own: Pooling = "default" if tokens else chosen.pooling
    wanted = replace(
        chosen,
        dtype="float32",
        layer=None,
        pooling=own if pooling == "default" else pooling,
    )
    load: Any = load_image_encoder if side == "image" else load_text_encoder
    encoder = load(wanted, str(device))
    source = Source(
        side=side,
        features=None,
        encoder=encoder,
        encoder_spec=wanted,
        fingerprint=encoder.fingerprint,
        ok=ok,
    )
    return (
        _with_tokens(source, array, encoder)
        if tokens and array is not None and spec.cache
        else source
    )


def _with_tokens(
    source: Source,
    array: FeatureArray,
    encoder: ImageEncoder | TextEncoder,
) -> Source:
    """Raises MismatchError if the tokens are of other weights than the encoder's."""
    weights = [
        Fingerprint(fields={"weights": of.fields["weights"]})
        for of in (encoder.fingerprint, array.record.encoder)
    ]
    if weights[0] != weights[1]:
        raise MismatchError(
            f"{encoder.spec} is not what {source.side} features {array.name} were made with; "
            "extract again"
        )
    cut = resolve_layer(encoder.module, array.record.spec)
    if not isinstance(cut, int) or array.views is not None:
        raise RecipeError(
            f"{source.side} features {array.name} are no tokens of a layer and one view; "
            "choose others"
        )
    lengths = array.load_lengths()
    counts = None if lengths is None else torch.from_numpy(lengths.astype(np.int64))
    return replace(
        source,
        features=torch.from_numpy(array.load()),
        cut=cut,
        lengths=counts,
        array=array,
    )


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """Cached features of the teacher, or the class distributions that they mean: `taught`
    [n_images, dim]."""

    array: FeatureArray
    taught: Tensor
    ok: NDArray[np.bool_]

    @property
    def fingerprint(self) -> Fingerprint:
        return self.array.record.encoder


def open_teacher(store: FeatureStore, recipe: Recipe, device: torch.device) -> TeacherSource | None:
    """None for a recipe that has none.

    Raises:
        RecipeError: the store has no such features, or they are not pooled ones of one view.
            EncoderError: the
        teacher's classifier cannot be had.
    """
    spec = recipe.distillation
    if spec is None:
        return None
    there = [array.record.name for array in store.arrays("image")]
    if (spec.teacher or len(there) != 1) and spec.teacher not in there:
        found = f"{store.path} has the image features {', '.join(there) or 'none'}"
        wanted = (
            f"but not the teacher {spec.teacher!r}"
            if spec.teacher
            else "and distillation.teacher names none"
        )
        raise RecipeError(
            f"recipe {recipe.name}: {found}, {wanted}; set distillation.teacher, or add it with: "
            "apecache extract "
            "--add --image ENCODER --image-cut cls@-1"
        )
    array = store.array("image", spec.teacher or None)
    if array.tokens is not None or array.views is not None:
        raise RecipeError(
            f"image features {array.name} are no pooled features of one view, which a teacher's are"
        )
    taught = torch.from_numpy(array.load()).to(device)
    if spec.kind == "classes":
        taught = _distributions(taught, array.record.spec)
    return TeacherSource(array=array, taught=taught, ok=array.load_ok())


@torch.no_grad()
def _distributions(features: Tensor, spec: EncoderSpec) -> Tensor:
    """Of the teacher's classes [n, n_classes], rows of sum 1."""
    classifier = load_classifier(spec).to(features.device)
    return torch.cat([classifier(part.float()).softmax(-1) for part in features.split(8192)])


def split_rows(
    store: FeatureStore,
    sources: Sequence[Source],
    spec: FitEncoderSpec,
    teacher: TeacherSource | None = None,
) -> tuple[FeaturePairs, FeaturePairs]:
    """Training and dev pairs whose features are rows of the store's table, int64 [n] and [m], on
    the CPU."""
    pairs = store.pairs
    captions = np.array([bool(caption.strip()) for caption in pairs.captions], dtype=bool)
    images = np.ones(len(pairs.keys), dtype=bool) if sources[0].ok is None else sources[0].ok
    images = images if teacher is None else images & teacher.ok
    texts = captions if sources[1].ok is None else captions & sources[1].ok
    rows = Features(torch.arange(len(pairs.keys))), Features(torch.arange(len(pairs.captions)))
    content = next((equal_images(array) for array in store.arrays("image")), None)
    masks = choose_splits(pairs, spec.splits, content)
    equal = content, pairs.caption_ids
    train, dev = (
        select_pairs(*rows, pairs.image_rows, mask & images, texts, *equal) for mask in masks
    )
    require_images(train, dev)
    return train, dev


def open_inputs(
    source: Source,
    store: FeatureStore,
    open_image: OpenImage | None,
    device: torch.device,
) -> Inputs:
    encoder = source.encoder
    if source.features is not None:
        cached = CachedInputs(features=source.features) if encoder is None else None
        return cached or TokenInputs(
            features=source.features,
            lengths=source.lengths,
            device=device,
        )
    if isinstance(encoder, TextEncoder):
        return TextInputs.of(encoder, [str(caption) for caption in store.pairs.captions])
    assert encoder is not None
    if open_image is None:
        raise OptionError(
            "the image tower runs from pixels, so it needs the images; give their folder (--root)"
        )
    return ImageInputs(
        keys=list(store.pairs.keys),
        open_image=open_image,
        preprocess=encoder.preprocess,
        device=encoder.device,
    )
