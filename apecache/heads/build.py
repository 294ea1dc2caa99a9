"""Build heads from their descriptions."""

from torch import nn

from apecache.heads.head import EnsembleHead, Head, HeadSpec
from apecache.heads.join import joined_dim
from apecache.heads.pooled import PooledHead
from apecache.heads.tokens import TokenHead


def build_heads(
    image: HeadSpec,
    text: HeadSpec,
    image_dim: int,
    text_dim: int,
) -> tuple[Head, Head]:
    """Build the heads of both sides with one output width.

    Args:
        image: description of the image head.
        text: description of the text head.
        image_dim: width of the image features.
        text_dim: width of the text features.

    Raises:
        ValueError: the widths cannot be made equal, or a width does not suit its kind.
    """
    if image.parts or text.parts:
        return _build_ensemble(image, text=text, image_dim=image_dim, text_dim=text_dim)
    image_width = _fixed_dim(image, image_dim)
    text_width = _fixed_dim(text, text_dim)
    fixed_widths = {image_width, text_width} - {None}
    if len(fixed_widths) > 1:
        raise ValueError(
            f"the heads end in different widths: image {image_width}, text {text_width}"
        )
    # A head without a width of its own takes the width of the other side.
    out_dim = image_width if image_width is not None else text_width
    if out_dim is None:
        raise ValueError("neither head has a width; give dim to one of them")
    # The image head is built first: seeded runs depend on the order of the random draws.
    image_head = build_head(image, image_dim, out_dim)
    text_head = build_head(text, text_dim, out_dim)
    return image_head, text_head


def build_head(spec: HeadSpec, in_dim: int, out_dim: int) -> Head:
    """Build one head that maps `in_dim` to `out_dim`.

    Raises:
        ValueError: a width does not suit the kind of the head.
    """
    head: Head
    if spec.cut == "tokens":
        head = TokenHead(spec, in_dim, out_dim)
    else:
        head = PooledHead(spec, in_dim, out_dim)
    if spec.initialization == "xavier":
        _draw_xavier(head)
    return head


def _draw_xavier(head: Head) -> None:
    """Draw all linear layers anew, uniform in +-sqrt(6 / (in + out)), with biases 0."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _build_ensemble(
    image: HeadSpec,
    text: HeadSpec,
    image_dim: int,
    text_dim: int,
) -> tuple[Head, Head]:
    if len(image.parts) != len(text.parts):
        raise ValueError(
            f"both sides need as many parts: image {len(image.parts)}, text {len(text.parts)}"
        )
    image_heads = []
    text_heads = []
    for image_spec, text_spec in zip(image.parts, text.parts, strict=True):
        # Each pair has an output width of its own.
        image_head, text_head = build_heads(
            image_spec,
            text=text_spec,
            image_dim=image_dim,
            text_dim=text_dim,
        )
        image_heads.append(image_head)
        text_heads.append(text_head)
    return EnsembleHead(image, image_heads), EnsembleHead(text, text_heads)


def _fixed_dim(spec: HeadSpec, in_dim: int) -> int | None:
    """Return the output width that the description fixes, or None if it fixes none."""
    return joined_dim(spec, in_dim) if spec.kind == "identity" else spec.dim
