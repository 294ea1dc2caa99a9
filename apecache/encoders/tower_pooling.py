"""Pool the tokens of a tower as its own model does: heads, projections, end-of-text tokens."""

from typing import Any

from torch import Tensor, nn

from apecache.encoders.encoder import pool_tokens
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.module_map import ModuleMap


def pool_own(
    module: LibraryModel,
    module_map: ModuleMap,
    tokens: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Pool tokens after the final norm as the model itself does -> [n, own_dim].

    Args:
        tokens: [n, length, dim].
        mask: int64 [n, length], 0 for padding, which stands on the right; None: no padding, or an
            image.
    """
    root = module.get_submodule(module_map.root)
    if module_map.wrapper == "open_clip-timm":
        return module.head(root.forward_head(tokens))  # type: ignore[no-any-return]
    if module_map.wrapper == "open_clip-hf":
        return _pool_wrapped_text(module, root, tokens, mask)
    match module_map.family:
        case "hf-beit":
            return root.pooler(tokens)  # type: ignore[no-any-return]
        case "hf-siglip":
            return root.head(tokens)  # type: ignore[no-any-return]
        case "hf-clip":
            pooled: Tensor = root.post_layernorm(tokens[:, 0])
            projection = getattr(module, "visual_projection", nn.Identity())
            return projection(pooled)  # type: ignore[no-any-return]
        case "hf-clip-text":
            # A text ends by the token that the model pools at.
            ends = pool_tokens(tokens, mask=mask, pooling="last")
            projection = getattr(module, "text_projection", nn.Identity())
            return projection(ends)  # type: ignore[no-any-return]
        case "hf-siglip-text":
            return root.head(tokens[:, -1])  # type: ignore[no-any-return]
        case "open_clip-vit":
            pool = root._global_pool if module_map.final_norm else root._pool
            pooled, _ = pool(tokens)
            return pooled if root.proj is None else pooled @ root.proj
        case "open_clip-text":
            return _pool_open_clip_text(root, tokens, mask)
        case _:
            return root.forward_head(tokens, pre_logits=True)  # type: ignore[no-any-return]


def _pool_wrapped_text(
    module: LibraryModel,
    root: LibraryModel,
    tokens: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Pool by open_clip's pooler, which takes an output of transformers."""
    # Only models that transformers made are pooled here, so the library is there.
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    inner_pooler = getattr(root, "pooler", None)
    output = BaseModelOutputWithPooling(
        last_hidden_state=tokens,
        pooler_output=None if inner_pooler is None else inner_pooler(tokens),
    )
    if mask is None:
        mask = tokens.new_ones(tokens.shape[:2])
    return module.proj(module.pooler(output, mask))  # type: ignore[no-any-return]


def _pool_open_clip_text(root: LibraryModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
    match root.pool_type:
        case "first":
            pooled = tokens[:, 0]
        case "last":
            pooled = tokens[:, -1]
        case _:
            pooled = pool_tokens(tokens, mask=mask, pooling="last")
    projection = root.text_projection
    if projection is None:
        return pooled
    if isinstance(projection, nn.Linear):
        return projection(pooled)  # type: ignore[no-any-return]
    return pooled @ projection  # type: ignore[no-any-return]


def own_dim(module: LibraryModel, module_map: ModuleMap, dim: int) -> int:
    """Return the width of `pool_own`.

    Args:
        dim: width of the tokens.
    """
    root = module.get_submodule(module_map.root)
    if module_map.wrapper == "open_clip-timm":
        return _last_width(module.head) or int(root.num_classes or root.head_hidden_size)
    if module_map.wrapper == "open_clip-hf":
        return _last_width(module.proj) or dim
    match module_map.family:
        case "hf-clip":
            return _last_width(getattr(module, "visual_projection", None)) or dim
        case "hf-clip-text":
            return _last_width(getattr(module, "text_projection", None)) or dim
        case "hf-siglip-text":
            return int(root.head.out_features)
        case "open_clip-vit":
            return int(root.output_dim)
        case "open_clip-text":
            return int(dim if root.text_projection is None else root.output_dim)
        case _:
            return int(getattr(root, "head_hidden_size", dim))


def _last_width(layers: Any) -> int | None:
    """Return the output width of the last linear layer within; None without one."""
    if layers is None:
        return None
    widths = [layer.out_features for layer in layers.modules() if isinstance(layer, nn.Linear)]
    return int(widths[-1]) if widths else None
