"""From a spec to a loaded encoder. Libraries are imported only when one of their encoders is asked for."""

from apecache.encoders.encoder import ImageEncoder, TextEncoder, parse_device
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.towers import Tower, build_tower


def load_image_encoder(spec: EncoderSpec, device: str = "auto") -> ImageEncoder:
    """Raises EncoderError when the encoder or the device cannot be had."""
    where = parse_device(device)
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import load_timm

            return load_timm(spec, where)
        case _:
            from apecache.encoders.from_transformers import load_transformers_image

            return load_transformers_image(spec, where)


def load_text_encoder(spec: EncoderSpec, device: str = "auto") -> TextEncoder:
    """Raises EncoderError when the encoder or the device cannot be had."""
    from apecache.encoders.from_transformers import load_transformers_text

    return load_transformers_text(spec, parse_device(device))


def shape_tower(spec: EncoderSpec) -> Tower:
    """A tower with the encoder's shapes and no weights, on the meta device: to count with.

    Raises:
        EncoderError: the encoder's description cannot be had, or it cannot be seen as a tower.
    """
    match spec.library:
        case "timm":
            from apecache.encoders.from_timm import shape_timm

            module = shape_timm(spec)
        case _:
            from apecache.encoders.from_transformers import shape_transformers

            module = shape_transformers(spec)
    return build_tower(module.eval(), spec.modality, spec.pooling, cls_id=0)
