"""Heads from their descriptions."""

from apecache.heads.head import Head, HeadSpec, SeveralHeads
from apecache.heads.pooled import PooledHead
from apecache.heads.tokens import TokenHead


def build_heads(
    image: HeadSpec,
    text: HeadSpec,
    image_dim: int,
    text_dim: int,
) -> tuple[Head, Head]:
    """Both sides' heads with one output width.

    Raises:
        ValueError: the widths cannot be made equal, or a width does not suit its kind.
    """
    if image.parts or text.parts:
        return _build_several(image, text=text, image_dim=image_dim, text_dim=text_dim)
    widths = {"image": _fixed_dim(image, image_dim), "text": _fixed_dim(text, text_dim)}
    fixed = {width for width in widths.values() if width is not None}
    if len(fixed) > 1:
        raise ValueError(
            f"the heads end in different widths: image {widths['image']}, text {widths['text']}"
        )
    if not fixed:
        raise ValueError("neither head has a width; give dim to one of them")
    out = fixed.pop()
    return build_head(image, image_dim, out), build_head(text, text_dim, out)


def build_head(spec: HeadSpec, in_dim: int, out_dim: int) -> Head:
    """A single head. Raises ValueError as `build_heads` does."""
    return (
        TokenHead(spec, in_dim, out_dim)
        if spec.cut == "tokens"
        else PooledHead(spec, in_dim, out_dim)
    )


def _build_several(
    image: HeadSpec,
    text: HeadSpec,
    image_dim: int,
    text_dim: int,
) -> tuple[Head, Head]:
    if len(image.parts) != len(text.parts):
        raise ValueError(
            f"both sides need as many parts: image {len(image.parts)}, text {len(text.parts)}"
        )
    pairs = [
        build_heads(*parts, image_dim, text_dim)
        for parts in zip(image.parts, text.parts, strict=True)
    ]
    return SeveralHeads(image, [pair[0] for pair in pairs]), SeveralHeads(
        text,
        [pair[1] for pair in pairs],
    )


def _fixed_dim(spec: HeadSpec, in_dim: int) -> int | None:
    return in_dim if spec.kind == "identity" else spec.dim
