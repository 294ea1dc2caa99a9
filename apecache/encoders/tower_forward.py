"""Run the pieces of a tower around its blocks: the embeddings, and what every block takes.

Each family calls its blocks with other keywords: masks, relative positions, rotary positions. They
are computed by the library's own modules.
"""

from typing import Any

import torch
from torch import Tensor

from apecache.encoders.library_types import LibraryModel
from apecache.encoders.module_map import ModuleMap
from apecache.errors import EncoderError

MASKED = -65504.0
"""Added to the scores of masked tokens: the lowest float16, so that it survives every autocast."""


def embed_inputs(module: LibraryModel, module_map: ModuleMap, inputs: Tensor) -> Tensor:
    """Pixels or token ids -> tokens [n, length, dim] as the first block takes them."""
    module = module.get_submodule(module_map.root)
    match module_map.family:
        case "timm-eva":
            return _embed_eva(module, inputs)
        case "open_clip-vit":
            return module._embeds(inputs)  # type: ignore[no-any-return]
        case "open_clip-text":
            embedded, _ = module._embeds(inputs)
            return embedded  # type: ignore[no-any-return]
        case "timm":
            tokens = module._pos_embed(module.patch_embed(inputs))
            return module.norm_pre(module.patch_drop(tokens))  # type: ignore[no-any-return]
        case "timm-beit":
            patches = module.patch_embed(inputs)
            cls_tokens = module.cls_token.expand(len(patches), -1, -1)
            tokens = torch.cat((cls_tokens, patches), dim=1)
            if module.pos_embed is not None:
                tokens = tokens + module.pos_embed
            return module.pos_drop(tokens)  # type: ignore[no-any-return]
        case "hf-vit":
            # The others interpolate their positions without being asked.
            is_fixed_size = module.config.model_type in ("vit", "deit")
            options = {"interpolate_pos_encoding": True} if is_fixed_size else {}
            return module.embeddings(inputs, **options)  # type: ignore[no-any-return]
        case "hf-siglip":
            return module.embeddings(  # type: ignore[no-any-return]
                inputs,
                interpolate_pos_encoding=True,
            )
        case "hf-clip":
            embedded = module.embeddings(inputs, interpolate_pos_encoding=True)
            return module.pre_layrnorm(embedded)  # type: ignore[no-any-return]
        case "hf-beit":
            embedded = module.embeddings(inputs)
            # Data2VecVision also returns the shape of its grid.
            patches = embedded[0] if isinstance(embedded, tuple) else embedded
            return patches  # type: ignore[no-any-return]
        case "hf-dinov3":
            return module.embeddings(inputs)  # type: ignore[no-any-return]
        case (
            "bert"
            | "deberta"
            | "mpnet"
            | "distilbert"
            | "modernbert"
            | "hf-clip-text"
            | "hf-siglip-text"
        ):
            return module.embeddings(input_ids=inputs)  # type: ignore[no-any-return]
        case "t5":
            return module.encoder.dropout(module.shared(inputs))  # type: ignore[no-any-return]
        case "decoder":
            return module.embed_tokens(inputs)  # type: ignore[no-any-return]
        case "whole":
            raise EncoderError(f"{type(module).__name__} runs as a whole; its parts have no names")


def _embed_eva(module: LibraryModel, pixels: Tensor) -> Tensor:
    # Rotary positions of training are drawn at random, differently in each slice of a batch.
    if module.rope is not None:
        module.rope.eval()
    tokens, _ = module._pos_embed(module.patch_embed(pixels))
    return module.norm_pre(tokens)  # type: ignore[no-any-return]


def block_contexts(
    module: LibraryModel,
    module_map: ModuleMap,
    hidden: Tensor,
    mask: Tensor | None,
    image_size: tuple[int, int] | None,
) -> list[dict[str, Any]]:
    """Return the keywords that each block takes beside the tokens, shallowest block first.

    Args:
        hidden: tokens [n, length, dim].
        mask: int64 [n, length], 0 for padding; None: no padding, or an image.
        image_size: (height, width) of the images; None for texts.
    """
    n_blocks = len(module.get_submodule(module_map.blocks))
    module = module.get_submodule(module_map.root)
    if module_map.family == "modernbert":
        return _modernbert_contexts(module, hidden, mask)
    if module_map.family == "timm-eva":
        return _eva_contexts(module, hidden, image_size)
    context = _shared_context(
        module,
        module_map=module_map,
        hidden=hidden,
        mask=mask,
        image_size=image_size,
    )
    return [context] * n_blocks


def _shared_context(
    module: LibraryModel,
    module_map: ModuleMap,
    hidden: Tensor,
    mask: Tensor | None,
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return the keywords that are the same for all blocks."""
    length = hidden.shape[1]
    match module_map.family:
        case "timm" | "hf-vit" | "open_clip-vit":
            return {}
        case "hf-siglip" | "hf-clip" | "hf-siglip-text":
            # SigLIP's texts were trained without hiding their padding.
            return {"attention_mask": None}
        case "hf-clip-text":
            return {"attention_mask": _causal(mask, hidden)}
        case "open_clip-text":
            causal = module.attn_mask
            return {"attn_mask": None if causal is None else causal[:length, :length]}
        case "deberta":
            return _deberta_context(module, hidden, mask)
        case "timm-beit":
            bias = None if module.rel_pos_bias is None else module.rel_pos_bias()
            return {"shared_rel_pos_bias": bias}
        case "hf-beit":
            return _beit_context(module, length, image_size)
        case "hf-dinov3":
            return {"position_embeddings": _dinov3_positions(module, hidden, image_size)}
        case "mpnet":
            position_bias = module.encoder.compute_position_bias(hidden)
            return {"attention_mask": _additive(mask, hidden), "position_bias": position_bias}
        case "t5":
            # The table of positions lies in the first block and serves all blocks.
            first_attention = module.encoder.block[0].layer[0].SelfAttention
            position_bias = first_attention.compute_bias(length, length, hidden.device)
            return {
                "attention_mask": _additive(mask, hidden),
                "position_bias": position_bias.to(hidden.dtype),
            }
        case "decoder":
            return {
                "attention_mask": _causal(mask, hidden),
                "position_embeddings": module.rotary_emb(hidden, _positions(hidden)),
            }
        case _:
            return {"attention_mask": _additive(mask, hidden)}


def _beit_context(
    module: LibraryModel,
    length: int,
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    patch_size = int(module.config.patch_size)
    grid = _patch_grid(length - 1, patch_size, image_size)
    # Data2VecVision keeps the table that all blocks share in its encoder.
    is_beit = module.config.model_type == "beit"
    if is_beit:
        shared = module.shared_position_bias
    else:
        shared = getattr(module.encoder, "relative_position_bias", None)
    bias = None if shared is None else shared(grid, dim_size=length)
    bias_name = "attention_mask" if is_beit else "relative_position_bias"
    resolution = (grid[0] * patch_size, grid[1] * patch_size)
    return {bias_name: bias, "resolution": resolution}


def _patch_grid(
    n_patches: int,
    patch_size: int,
    image_size: tuple[int, int] | None,
) -> tuple[int, int]:
    """Return (rows, columns) of the patches, which tokens after a cut do not say any more.

    Raises:
        EncoderError: the tokens are not those of a square image, nor of `image_size`.
    """
    height, width = image_size or (0, 0)
    grid = (height // patch_size, width // patch_size)
    if grid[0] * grid[1] != n_patches:
        # The config may name another size than the images have.
        side = round(n_patches**0.5)
        grid = (side, side)
    if grid[0] * grid[1] != n_patches:
        raise EncoderError(
            f"{n_patches} patches are those of no square image, and of none with {height} x "
            f"{width} pixels; give the image size"
        )
    return grid


def _eva_contexts(
    module: LibraryModel,
    hidden: Tensor,
    image_size: tuple[int, int] | None,
) -> list[dict[str, Any]]:
    """Return the rotary positions of each block; those of evaluation in training too."""
    n_blocks = len(module.blocks)
    if module.rope is None:
        return [{}] * n_blocks
    patch_height, _ = module.patch_embed.patch_size
    n_patches = hidden.shape[1] - module.num_prefix_tokens
    grid = _patch_grid(n_patches, int(patch_height), image_size)
    # The shape alone decides, as in the library for images of any size.
    rotations = module.rope.eval().get_embed(shape=grid)
    if getattr(module, "rope_mixed", False):
        return [{"rope": rotations[depth]} for depth in range(n_blocks)]
    return [{"rope": rotations}] * n_blocks


def _deberta_context(
    module: LibraryModel,
    hidden: Tensor,
    mask: Tensor | None,
) -> dict[str, Any]:
    encoder = module.encoder
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    return {
        "attention_mask": encoder.get_attention_mask(mask),
        "relative_pos": encoder.get_rel_pos(hidden),
        "rel_embeddings": encoder.get_rel_embedding(),
    }


def _dinov3_positions(
    module: LibraryModel,
    hidden: Tensor,
    image_size: tuple[int, int] | None,
) -> tuple[Tensor, Tensor]:
    """Return the rotary positions of the patches.

    They are those of evaluation in training too: DINOv3's random shifts and scales of positions
    would differ between slices of a batch.

    Raises:
        EncoderError: the tokens are not those of a square image, nor of `image_size`.
    """
    n_patches = hidden.shape[1] - 1 - module.config.num_register_tokens
    patch_size = int(module.config.patch_size)
    grid = _patch_grid(n_patches, patch_size, image_size)
    positions = module.rope_embeddings.eval()
    # Of the pixels only shape, dtype and device are read.
    pixels = hidden.new_empty(1, 1, grid[0] * patch_size, grid[1] * patch_size)
    cosines, sines = positions(pixels)
    return cosines, sines


def _modernbert_contexts(
    module: LibraryModel,
    hidden: Tensor,
    mask: Tensor | None,
) -> list[dict[str, Any]]:
    """Return the keywords of each block: full attention, or one within a window of tokens."""
    positions = _positions(hidden)
    distances = (positions[0, :, None] - positions[0, None, :]).abs()
    outside = distances > module.config.sliding_window
    sliding = _joined(_additive(mask, hidden), outside[None, None].to(hidden.dtype) * MASKED)
    masks = {"full_attention": _additive(mask, hidden), "sliding_attention": sliding}
    rotations = {name: module.rotary_emb(hidden, positions, name) for name in masks}
    return [
        {
            "attention_mask": masks[block.attention_type],
            "position_embeddings": rotations[block.attention_type],
        }
        for block in module.layers
    ]


def _positions(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)


def _causal(mask: Tensor | None, hidden: Tensor) -> Tensor:
    """Return what hides later tokens and padding, [n or 1, 1, length, length]."""
    length = hidden.shape[1]
    is_later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    return _joined(_additive(mask, hidden), is_later[None, None].to(hidden.dtype) * MASKED)


def _joined(padding: Tensor | None, masked_pairs: Tensor) -> Tensor:
    """Return both masks as one. A sum of both would not be finite in float16."""
    return masked_pairs if padding is None else torch.minimum(padding, masked_pairs)


def _additive(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Return what is added to attention scores: 0 for tokens, MASKED for padding.

    Args:
        mask: int64 [n, length], 0 for padding.
        hidden: gives the dtype.

    Returns:
        [n, 1, 1, length]; None without a mask.
    """
    if mask is None:
        return None
    is_padding = mask[:, None, None, :] == 0
    return is_padding.to(hidden.dtype) * MASKED
