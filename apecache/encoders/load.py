"""Load the encoders that specs name.

A library is imported only when one of its encoders is asked for. To add a library: name it in
`LIBRARIES` of `encoders.spec`, write its module `from_LIBRARY`, and give it a case in each `match`
below. For towers that train, see `encoders.module_map` too.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from apecache.device import resolve_device
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.frozen_tower import FrozenTower
from apecache.encoders.joined import join_image_encoders, join_text_encoders
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.module_map import read_module_map
from apecache.encoders.preprocess import Preprocess
from apecache.encoders.spec import EncoderSpec, frozen_only
from apecache.encoders.tower import Tower, build_tower
from apecache.errors import EncoderError

logger = logging.getLogger(__name__)


def load_image_encoder(spec: EncoderSpec, device: str = "auto") -> ImageEncoder:
    """Load one image encoder; joined ones are loaded together and look like one.

    Raises:
        EncoderError: the encoder cannot be loaded.
        OptionError: the device cannot be used.
    """
    encoders = load_image_encoders(spec.singles, device)
    return encoders[0] if len(encoders) == 1 else join_image_encoders(encoders)


def load_text_encoder(spec: EncoderSpec, device: str = "auto") -> TextEncoder:
    """Load one text encoder; joined ones are loaded together and look like one.

    Raises:
        EncoderError: the encoder cannot be loaded.
        OptionError: the device cannot be used.
    """
    encoders = load_text_encoders(spec.singles, device)
    return encoders[0] if len(encoders) == 1 else join_text_encoders(encoders)


def load_image_encoders(specs: Sequence[EncoderSpec], device: str = "auto") -> list[ImageEncoder]:
    """Load several image encoders, in the order of the specs.

    Cuts of one model share it, so that one forward pass serves all of them. Raises EncoderError as
    `load_image_encoder` does.
    """
    _require_encoders(specs)
    for spec in specs:
        if spec.pooling == "last":
            raise EncoderError(
                f"encoder {spec}: the last token is for texts only; give --image-cut cls or mean"
            )
    torch_device = resolve_device(device)
    loaded: dict[EncoderSpec, ImageEncoder] = {}
    for cuts in _by_model(specs):
        logger.info("loading %s on %s", ", ".join(map(str, cuts)), torch_device)
        match cuts[0].library:
            case "timm":
                from apecache.encoders.from_timm import load_timm

                encoders = load_timm(cuts, torch_device)
            case "open_clip":
                from apecache.encoders.from_open_clip import load_open_clip_image

                encoders = load_open_clip_image(cuts, torch_device)
            case "st":
                from apecache.encoders.from_sentence_transformers import (
                    load_sentence_transformers_image,
                )

                encoders = load_sentence_transformers_image(cuts, torch_device)
            case _:
                from apecache.encoders.from_transformers import load_transformers_image

                encoders = load_transformers_image(cuts, torch_device)
        loaded |= zip(cuts, encoders, strict=True)
    return [loaded[spec] for spec in specs]


def load_text_encoders(specs: Sequence[EncoderSpec], device: str = "auto") -> list[TextEncoder]:
    """Load several text encoders, as `load_image_encoders` does."""
    _require_encoders(specs)
    torch_device = resolve_device(device)
    loaded: dict[EncoderSpec, TextEncoder] = {}
    for cuts in _by_model(specs):
        logger.info("loading %s on %s", ", ".join(map(str, cuts)), torch_device)
        match cuts[0].library:
            case "open_clip":
                from apecache.encoders.from_open_clip import load_open_clip_text

                encoders = load_open_clip_text(cuts, torch_device)
            case "st":
                from apecache.encoders.from_sentence_transformers import load_sentence_transformers

                encoders = load_sentence_transformers(cuts, torch_device)
            case _:
                from apecache.encoders.from_transformers import load_transformers_text

                encoders = load_transformers_text(cuts, torch_device)
        loaded |= zip(cuts, encoders, strict=True)
    return [loaded[spec] for spec in specs]


NO_ENCODER = (
    "were imported without their encoder, so new {side}s cannot be encoded; what is in a store can "
    "be evaluated, indexed and searched by --key, and for live queries import the features again "
    "with --{side}-encoder and fit on them"
)


def _require_encoders(specs: Sequence[EncoderSpec]) -> None:
    """Refuse features that were imported without naming their encoder."""
    for spec in specs:
        if spec.is_imported:
            raise EncoderError(
                f"{spec.modality} features {spec.name} {NO_ENCODER.format(side=spec.modality)}"
            )


def load_classifier(spec: EncoderSpec) -> nn.Module:
    """Load the encoder's own classifier, in float32 on the CPU.

    Returns:
        A module from the encoder's pooled features [n, dim] to logits [n, n_classes].

    Raises:
        EncoderError: not a timm encoder; another pooling than the encoder's own, whose features no
            classifier takes; or weights without classes.
    """
    if spec.library != "timm" or spec.pooling != "default" or spec.layer is not None:
        raise EncoderError(
            f"encoder {spec}: a classifier is known of timm: encoders with their own pooling only"
        )
    from apecache.encoders.from_timm import timm_classifier

    return timm_classifier(spec)


def shape_tower(spec: EncoderSpec, device: str = "meta", is_frozen: bool = False) -> Tower:
    """Build a tower with the encoder's shapes, without its weights.

    On the meta device it has no weights at all and serves to count parameters. On another device it
    has random weights, in float32, and serves to time.

    Args:
        is_frozen: nothing within the tower trains, so it may be any encoder, and its parts need no
            names.

    Raises:
        EncoderError: the encoder's description cannot be read, or it is not frozen and cannot be
            seen as a tower.
    """
    _require_encoders([spec])
    if spec.library == "st" and not is_frozen:
        raise frozen_only(spec)
    module = _shape_module(spec, device)
    if is_frozen and not _is_mapped(module):
        return _shape_frozen(spec, module)
    # Any id will do: only the number of parameters in the CLS row counts here.
    tower = build_tower(module, spec.modality, spec.pooling, cls_id=0)
    if spec.modality == "image" and spec.library != "timm":
        # The model's config may name another size than the preprocessing gives.
        tower.pixels = _pixels(spec)
    return tower


def _pixels(spec: EncoderSpec) -> tuple[int, int]:
    """Return (height, width) of the pixels that preprocessing gives."""
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import shape_size
        case "hf":
            from apecache.encoders.from_transformers import image_size as shape_size
        case "st":
            from apecache.encoders.from_sentence_transformers import shape_size
        case _:
            from apecache.encoders.from_open_clip import shape_size
    return shape_size(spec)


def _shape_module(spec: EncoderSpec, device: str) -> Any:
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import shape_timm

            return shape_timm(spec, device).eval()
        case "hf":
            from apecache.encoders.from_transformers import shape_transformers

            return shape_transformers(spec, device).eval()
        case "open_clip":
            from apecache.encoders.from_open_clip import shape_open_clip

            return shape_open_clip(spec, device).eval()
        case _:
            from apecache.encoders.from_sentence_transformers import shape_sentence_transformers

            return shape_sentence_transformers(spec, device).eval()


def _is_mapped(module: LibraryModel) -> bool:
    try:
        read_module_map(module)
    except EncoderError:
        return False
    return True


def _shape_frozen(spec: EncoderSpec, module: LibraryModel) -> Tower:
    """View a shape as a tower that runs as a whole."""
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import shape_features
        case "hf":
            from apecache.encoders.from_transformers import shape_features
        case "st":
            from apecache.encoders.from_sentence_transformers import shape_features
        case _:
            from apecache.encoders.from_open_clip import shape_features
    size = _pixels(spec) if spec.modality == "image" else None
    tokens = None
    if spec.library != "open_clip":
        tokens = shape_features(replace(spec, pooling="tokens"), module)
    return FrozenTower(
        module,
        modality=spec.modality,
        pooling=spec.pooling,
        features=shape_features(spec, module),
        tokens=tokens,
        image_size=size,
    )


def load_preprocess(spec: EncoderSpec) -> Preprocess:
    """Load the encoder's preprocessing of RGB images, without its weights.

    Raises EncoderError as `shape_tower` does.
    """
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import timm_preprocess

            return timm_preprocess(spec)
        case "hf":
            from apecache.encoders.from_transformers import transformers_preprocess

            return transformers_preprocess(spec)
        case "open_clip":
            from apecache.encoders.from_open_clip import open_clip_preprocess

            return open_clip_preprocess(spec)
        case "st":
            from apecache.encoders.from_sentence_transformers import (
                sentence_transformers_preprocess,
            )

            return sentence_transformers_preprocess(spec)
        case _:
            raise EncoderError(f"encoder {spec}: library {spec.library!r} has no images")


def count_classes(spec: EncoderSpec) -> int:
    """Count the classes of the encoder's own classifier, without its weights.

    Raises EncoderError as `load_classifier` does.
    """
    if spec.library != "timm":
        raise EncoderError(f"encoder {spec}: a classifier is known of timm: encoders only")
    from apecache.encoders.from_timm import count_timm_classes

    return count_timm_classes(spec)


def _by_model(specs: Sequence[EncoderSpec]) -> list[list[EncoderSpec]]:
    """Group specs that differ in pooling and layer only; each spec once."""
    groups: dict[EncoderSpec, list[EncoderSpec]] = {}
    for spec in dict.fromkeys(specs):
        model_spec = replace(spec, pooling="default", layer=None)
        groups.setdefault(model_spec, []).append(spec)
    return list(groups.values())
