"""Heads from their descriptions."""

from apecache.heads.head import EnsembleHead, Head, HeadSpec
from apecache.heads.pooled import PooledHead
from apecache.heads.tokens import TokenHead


def build_heads(image: HeadSpec, text: HeadSpec, image_dim: int, text_dim: int) -> tuple[Head, Head]:
    """Both sides' heads with one output width.

    Raises:
        ValueError: the widths cannot be made equal, or a width does not suit its kind.
    """
    if image.members != text.members:
        raise ValueError(f"both heads need as many members: image {image.members}, text {text.members}")
    widths = {"image": _fixed_dim(image, image_dim), "text": _fixed_dim(text, text_dim)}
    fixed = {width for width in widths.values() if width is not None}
    if len(fixed) > 1:
        raise ValueError(f"the heads end in different widths: image {widths['image']}, text {widths['text']}")
    if not fixed:
        raise ValueError("neither head has a width; give dim to one of them")
    out = fixed.pop()
    return build_head(image, image_dim, out), build_head(text, text_dim, out)


def build_head(spec: HeadSpec, in_dim: int, out_dim: int) -> Head:
    """`out_dim`: of one member. Raises ValueError as `build_heads` does."""
    if spec.members > 1:
        single = spec.model_copy(update={"members": 1})
        return EnsembleHead(spec, [build_head(single, in_dim, out_dim) for _ in range(spec.members)])
    return TokenHead(spec, in_dim, out_dim) if spec.cut == "tokens" else PooledHead(spec, in_dim, out_dim)


def _fixed_dim(spec: HeadSpec, in_dim: int) -> int | None:
    return in_dim if spec.kind == "identity" else spec.dim
