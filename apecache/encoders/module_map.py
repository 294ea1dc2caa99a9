"""Name the parts of each supported family of towers.

The names are those within the libraries' own models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from apecache.errors import EncoderError

Place = Literal[
    "patch_embedding",
    "token_embedding",
    "position",
    "cls",
    "registers",
    "token_types",
    "embedding_norm",
    "block",
    "final_norm",
    "adapter",
    "head",
]
"""What a parameter belongs to; adapters and heads are ours, the rest is the library's."""
EMBEDDING_PLACES: tuple[Place, ...] = (
    "patch_embedding",
    "token_embedding",
    "position",
    "cls",
    "registers",
    "token_types",
    "embedding_norm",
)

HF_VISION = ("vit", "deit", "dinov2", "dinov2_with_registers")
HF_BEIT = ("beit", "data2vec-vision")
BERT_LIKE = ("bert", "roberta", "xlm-roberta")
SUPPORTED = (
    "timm VisionTransformer, VisionTransformerDistilled, Beit; transformers "
    + ", ".join((*HF_VISION, *HF_BEIT))
    + "; "
    "for text " + ", ".join((*BERT_LIKE, "t5", "mt5"))
)


@dataclass(frozen=True, kw_only=True)
class ModuleMap:
    """Name the parts of one family of towers."""

    family: Literal["timm", "timm-beit", "hf-vit", "hf-beit", "bert", "t5"]
    blocks: str
    """Name of the list of blocks."""
    places: Mapping[str, Place]
    """Beginnings of parameter names; the first that fits counts. A parameter that fits none does
    not lie between input and output: poolers, classifiers, mask tokens."""
    final_norm: str | None
    norms: tuple[str, str]
    """The norms of a block's two branches, by name within the block."""
    ends: tuple[str, str] | None = None
    """In blocks with the norm last, the dropouts that end the two branches; None where the norm
    comes first."""


TIMM_PLACES: dict[str, Place] = {
    "patch_embed.": "patch_embedding",
    "cls_token": "cls",
    "reg_token": "registers",
    "dist_token": "registers",
    "pos_embed": "position",
    "norm_pre.": "embedding_norm",
    "norm.": "final_norm",
    "fc_norm.": "final_norm",
}
HF_VISION_PLACES: dict[str, Place] = {
    "embeddings.patch_embeddings.": "patch_embedding",
    "embeddings.cls_token": "cls",
    "embeddings.distillation_token": "registers",
    "embeddings.register_tokens": "registers",
    "embeddings.position_embeddings": "position",
    "shared_position_bias.": "position",
    "encoder.relative_position_bias.": "position",
    "layernorm.": "final_norm",
    "pooler.layernorm.": "final_norm",
}
BERT_PLACES: dict[str, Place] = {
    "embeddings.word_embeddings.": "token_embedding",
    "embeddings.position_embeddings.": "position",
    "embeddings.token_type_embeddings.": "token_types",
    "embeddings.LayerNorm.": "embedding_norm",
}
T5_PLACES: dict[str, Place] = {
    "shared.": "token_embedding",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.": "position",
    "encoder.final_layer_norm.": "final_norm",
}
"""T5's table of relative positions lies in its first block and serves all: it counts as an
embedding."""
T5_NORMS = ("layer.0.layer_norm", "layer.1.layer_norm")


def read_anatomy(module: Any) -> ModuleMap:
    """Return the anatomy of a loaded model.

    Raises:
        EncoderError: an architecture that is not supported; the message names the supported ones.
    """
    config: Any = getattr(module, "config", None)
    model_type = getattr(config, "model_type", type(module).__name__)
    from_timm = type(module).__module__.startswith("timm.")
    match model_type:
        case "VisionTransformer" | "VisionTransformerDistilled" if (
            from_timm and module.attn_pool is None
        ):
            return _timm_anatomy(module)
        case "Beit" if from_timm:
            beit_places: dict[str, Place] = {**TIMM_PLACES, "rel_pos_bias.": "position"}
            # timm replaces the final norm by an identity where its head has a norm after pooling.
            final_norm = "norm" if not isinstance(module.norm, nn.Identity) else None
            return ModuleMap(
                family="timm-beit",
                blocks="blocks",
                places=beit_places,
                final_norm=final_norm,
                norms=("norm1", "norm2"),
            )
        case "vit" | "deit" | "dinov2" | "dinov2_with_registers" | "beit" | "data2vec-vision":
            return _hf_vision_anatomy(module, model_type)
        case "bert" | "roberta" | "xlm-roberta" if not config.is_decoder:
            return ModuleMap(
                family="bert",
                blocks="encoder.layer",
                places=BERT_PLACES,
                final_norm=None,
                norms=("attention.output.LayerNorm", "output.LayerNorm"),
                ends=("attention.output.dropout", "output.dropout"),
            )
        case "t5" | "mt5" if not hasattr(module, "decoder"):
            return ModuleMap(
                family="t5",
                blocks="encoder.block",
                places=T5_PLACES,
                final_norm="encoder.final_layer_norm",
                norms=T5_NORMS,
            )
        case _:
            raise EncoderError(
                f"{type(module).__name__} ({model_type}) cannot be seen as a tower; supported are "
                f"{SUPPORTED}"
            )


def _timm_anatomy(module: Any) -> ModuleMap:
    # Blocks of other designs (parallel branches) have no single norm before the attention.
    if not all(hasattr(block, "norm1") and hasattr(block, "attn") for block in module.blocks):
        name = type(module.blocks[0]).__name__
        raise EncoderError(
            f"timm blocks of the kind {name} cannot be seen as a tower's; supported are {SUPPORTED}"
        )
    final_norm = "norm" if not isinstance(module.norm, nn.Identity) else None
    return ModuleMap(
        family="timm",
        blocks="blocks",
        places=TIMM_PLACES,
        final_norm=final_norm,
        norms=("norm1", "norm2"),
    )


def _hf_vision_anatomy(module: Any, model_type: str) -> ModuleMap:
    # ViT, DeiT and BEiT hold their blocks themselves, DINOv2 has an encoder that holds them.
    blocks = "layers" if hasattr(module, "layers") else "encoder.layer"
    norms = ("layernorm_before", "layernorm_after")
    if model_type.startswith("dinov2"):
        norms = ("norm1", "norm2")
    final_norm = "layernorm" if not isinstance(module.layernorm, nn.Identity) else None
    return ModuleMap(
        family="hf-beit" if model_type in HF_BEIT else "hf-vit",
        blocks=blocks,
        places=HF_VISION_PLACES,
        final_norm=final_norm,
        norms=norms,
    )
