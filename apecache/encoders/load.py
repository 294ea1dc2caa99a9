"""From specs to loaded encoders. Libraries are imported only when one of their encoders is asked
for."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from apecache.encoders.encoder import ImageEncoder, TextEncoder, parse_device
from apecache.encoders.preprocess import Preprocess
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tower import Tower, build_tower
from apecache.errors import EncoderError


def load_image_encoder(spec: EncoderSpec, device: str = "auto") -> ImageEncoder:
    """Raises EncoderError when the encoder or the device cannot be had."""
    return load_image_encoders([spec], device)[0]


def load_text_encoder(spec: EncoderSpec, device: str = "auto") -> TextEncoder:
    """Raises EncoderError when the encoder or the device cannot be had."""
    return load_text_encoders([spec], device)[0]


def load_image_encoders(specs: Sequence[EncoderSpec], device: str = "auto") -> list[ImageEncoder]:
    """In the order of the specs; cuts of one model share it, so that one forward pass serves all of
    them.

    Raises EncoderError as `load_image_encoder` does.
    """
    where = parse_device(device)
    loaded: dict[EncoderSpec, ImageEncoder] = {}
    for cuts in _by_model(specs):
        match cuts[0].library:
            case "timm":
                from apecache.encoders.from_timm import load_timm

                encoders = load_timm(cuts, where)
            case "open_clip":
                from apecache.encoders.from_open_clip import load_open_clip_image

                encoders = load_open_clip_image(cuts, where)
            case _:
                from apecache.encoders.from_transformers import load_transformers_image

                encoders = load_transformers_image(cuts, where)
        loaded |= zip(cuts, encoders, strict=True)
    return [loaded[spec] for spec in specs]


def load_text_encoders(specs: Sequence[EncoderSpec], device: str = "auto") -> list[TextEncoder]:
    """As `load_image_encoders`."""
    where = parse_device(device)
    loaded: dict[EncoderSpec, TextEncoder] = {}
    for cuts in _by_model(specs):
        match cuts[0].library:
            case "open_clip":
                from apecache.encoders.from_open_clip import load_open_clip_text

                encoders = load_open_clip_text(cuts, where)
            case "st":
                from apecache.encoders.from_sentence_transformers import load_sentence_transformers

                encoders = load_sentence_transformers(cuts, where)
            case _:
                from apecache.encoders.from_transformers import load_transformers_text

                encoders = load_transformers_text(cuts, where)
        loaded |= zip(cuts, encoders, strict=True)
    return [loaded[spec] for spec in specs]


def load_classifier(spec: EncoderSpec) -> nn.Module:
    """The encoder's own classifier, from its pooled features [n, dim] to logits [n, n_classes];
    float32, on the CPU.

    Raises:
        EncoderError: no timm encoder, or another pooling than its own, whose features no classifier
            takes; no classes.
    """
    if spec.library != "timm" or spec.pooling != "default" or spec.layer is not None:
        raise EncoderError(
            f"encoder {spec}: a classifier is known of timm: encoders with their own pooling only"
        )
    from apecache.encoders.from_timm import timm_classifier

    return timm_classifier(spec)


def shape_tower(spec: EncoderSpec, device: str = "meta") -> Tower:
    """A tower with the encoder's shapes and no weights, on the meta device: to count with. On
    another device it has random weights, in float32: to time.

    Raises:
        EncoderError: the encoder's description cannot be had, or it cannot be seen as a tower.
    """
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import shape_timm

            return build_tower(
                shape_timm(spec, device).eval(),
                spec.modality,
                spec.pooling,
                cls_id=0,
            )
        case "hf":
            from apecache.encoders.from_transformers import image_size, shape_transformers

            tower = build_tower(
                shape_transformers(spec, device).eval(),
                spec.modality,
                spec.pooling,
                cls_id=0,
            )
            tower.pixels = image_size(spec) if spec.modality == "image" else None
            return tower
        case _:
            raise EncoderError(f"encoder {spec}: only timm: and hf: encoders can be seen as towers")


def load_preprocess(spec: EncoderSpec) -> Preprocess:
    """What the encoder makes of an RGB image, without its weights. Raises EncoderError as
    `shape_tower` does."""
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import timm_preprocess

            return timm_preprocess(spec)
        case "hf":
            from apecache.encoders.from_transformers import transformers_preprocess

            return transformers_preprocess(spec)
        case _:
            raise EncoderError(f"encoder {spec}: only timm: and hf: encoders can be seen as towers")


def count_classes(spec: EncoderSpec) -> int:
    """Of the encoder's own classifier, without its weights. Raises EncoderError as
    `load_classifier` does."""
    if spec.library != "timm":
        raise EncoderError(f"encoder {spec}: a classifier is known of timm: encoders only")
    from apecache.encoders.from_timm import count_timm_classes

    return count_timm_classes(spec)


def _by_model(specs: Sequence[EncoderSpec]) -> list[list[EncoderSpec]]:
    """Specs that differ in pooling and layer only, together; each once."""
    groups: dict[EncoderSpec, list[EncoderSpec]] = {}
    for spec in dict.fromkeys(specs):
        groups.setdefault(replace(spec, pooling="default", layer=None), []).append(spec)
    return list(groups.values())
