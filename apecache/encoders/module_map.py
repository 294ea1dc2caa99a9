"""Name the parts of each supported family of towers.

The names are those within the libraries' own models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from apecache.encoders.library_types import LibraryModel, ModelConfig
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
    "pooler",
    "whole",
    "adapter",
    "head",
]
"""What a parameter belongs to; adapters and heads are ours, the rest is the library's.

A pooler is the model's own, above the final norm: SigLIP's attention head, CLIP's projection.
`whole` is every parameter of a frozen model whose parts have no names."""
EMBEDDING_PLACES: tuple[Place, ...] = (
    "patch_embedding",
    "token_embedding",
    "position",
    "cls",
    "registers",
    "token_types",
    "embedding_norm",
)

Family = Literal[
    "timm",
    "timm-beit",
    "hf-vit",
    "hf-beit",
    "hf-dinov3",
    "hf-siglip",
    "hf-clip",
    "bert",
    "mpnet",
    "distilbert",
    "modernbert",
    "t5",
    "decoder",
    "whole",
]
TEXT_FAMILIES: tuple[Family, ...] = ("bert", "mpnet", "distilbert", "modernbert", "t5", "decoder")
HF_VISION = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")
HF_BEIT = ("beit", "data2vec-vision")
HF_CONTRASTIVE = ("clip", "siglip")
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert")
SUPPORTED = (
    "timm VisionTransformer, VisionTransformerDistilled, Beit; transformers "
    + ", ".join((*HF_VISION, *HF_BEIT, *HF_CONTRASTIVE))
    + "; "
    "for text " + ", ".join((*BERT_LIKE, "t5", "mt5", "qwen3"))
)
FROZEN_ONLY = "convolutional and hierarchical encoders can be used frozen only"


@dataclass(frozen=True, kw_only=True)
class ModuleMap:
    """Name the parts of one family of towers."""

    family: Family
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
    token_table: str | None = None
    """Name of a token table whose CLS row can be a parameter of its own; None: there is no CLS
    token."""
    own_pooling: tuple[str, ...] = ()
    """Beginnings of the names of parameters that only the model's own pooling uses."""


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
DINOV3_PLACES: dict[str, Place] = {
    "embeddings.patch_embeddings.": "patch_embedding",
    "embeddings.cls_token": "cls",
    "embeddings.register_tokens": "registers",
    "norm.": "final_norm",
}
"""Positions are rotary and have no parameters."""
SIGLIP_PLACES: dict[str, Place] = {
    "embeddings.patch_embedding.": "patch_embedding",
    "embeddings.position_embedding.": "position",
    "post_layernorm.": "final_norm",
    "head.": "pooler",
}
CLIP_PLACES: dict[str, Place] = {
    "embeddings.patch_embedding.": "patch_embedding",
    "embeddings.class_embedding": "cls",
    "embeddings.position_embedding.": "position",
    "pre_layrnorm.": "embedding_norm",
    "post_layernorm.": "final_norm",
}
BERT_PLACES: dict[str, Place] = {
    "embeddings.word_embeddings.": "token_embedding",
    "embeddings.position_embeddings.": "position",
    "embeddings.token_type_embeddings.": "token_types",
    "embeddings.LayerNorm.": "embedding_norm",
}
MPNET_PLACES: dict[str, Place] = {
    **BERT_PLACES,
    "encoder.relative_attention_bias.": "position",
}
MODERNBERT_PLACES: dict[str, Place] = {
    "embeddings.tok_embeddings.": "token_embedding",
    "embeddings.norm.": "embedding_norm",
    "final_norm.": "final_norm",
}
DECODER_PLACES: dict[str, Place] = {
    "embed_tokens.": "token_embedding",
    "norm.": "final_norm",
}
T5_PLACES: dict[str, Place] = {
    "shared.": "token_embedding",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.": "position",
    "encoder.final_layer_norm.": "final_norm",
}
"""T5's table of relative positions lies in its first block and serves all: it counts as an
embedding."""
T5_NORMS = ("layer.0.layer_norm", "layer.1.layer_norm")
BERT_TABLE = "embeddings.word_embeddings"


def read_module_map(module: LibraryModel) -> ModuleMap:
    """Return the module map of a loaded model.

    Raises:
        EncoderError: an architecture that is not supported; the message names the supported ones.
    """
    config: ModelConfig = getattr(module, "config", None)
    model_type = getattr(config, "model_type", type(module).__name__)
    library, _, _ = type(module).__module__.partition(".")
    module_map = None
    if library == "timm":
        module_map = _timm_module_map(module)
    elif library == "transformers":
        # Other libraries wrap models of transformers, and pass on their configuration.
        module_map = _image_module_map(module, model_type) or _text_module_map(module, model_type)
    if module_map is None:
        raise EncoderError(
            f"{type(module).__name__} ({model_type}) cannot be seen as a tower, so it cannot be "
            f"trained; {FROZEN_ONLY}; supported are {SUPPORTED}"
        )
    return module_map


def _timm_module_map(module: LibraryModel) -> ModuleMap | None:
    name = type(module).__name__
    # timm replaces the final norm by an identity where its head has a norm after pooling.
    has_final_norm = not isinstance(getattr(module, "norm", None), nn.Identity)
    final_norm = "norm" if has_final_norm else None
    if name == "Beit":
        return ModuleMap(
            family="timm-beit",
            blocks="blocks",
            places={**TIMM_PLACES, "rel_pos_bias.": "position"},
            final_norm=final_norm,
            norms=("norm1", "norm2"),
            own_pooling=("fc_norm.",),
        )
    is_plain = name in ("VisionTransformer", "VisionTransformerDistilled")
    if not is_plain or module.attn_pool is not None:
        return None
    # Blocks of other designs (parallel branches) have no single norm before the attention.
    if not all(hasattr(block, "norm1") and hasattr(block, "attn") for block in module.blocks):
        block_name = type(module.blocks[0]).__name__
        raise EncoderError(
            f"timm blocks of the kind {block_name} cannot be seen as a tower's; supported are "
            f"{SUPPORTED}"
        )
    return ModuleMap(
        family="timm",
        blocks="blocks",
        places=TIMM_PLACES,
        final_norm=final_norm,
        norms=("norm1", "norm2"),
        own_pooling=("fc_norm.",),
    )


def _image_module_map(module: LibraryModel, model_type: str) -> ModuleMap | None:
    """Return the module map of an image encoder of transformers; None of any other model."""
    match model_type:
        case "vit" | "deit" | "dinov2" | "dinov2_with_registers" | "beit" | "data2vec-vision":
            return _hf_vision_module_map(module, model_type)
        case "dinov3_vit":
            return ModuleMap(
                family="hf-dinov3",
                blocks="model.layer",
                places=DINOV3_PLACES,
                final_norm="norm",
                norms=("norm1", "norm2"),
            )
        case "siglip_vision_model":
            return ModuleMap(
                family="hf-siglip",
                blocks="encoder.layers",
                places=SIGLIP_PLACES,
                final_norm="post_layernorm",
                norms=("layer_norm1", "layer_norm2"),
                own_pooling=("head.",),
            )
        case "clip_vision_model" | "metaclip_2_vision_model":
            # The projection lies beside the tower, if the files have it.
            prefix = "vision_model." if hasattr(module, "vision_model") else ""
            places: dict[str, Place] = {
                f"{prefix}{beginning}": place for beginning, place in CLIP_PLACES.items()
            }
            places["visual_projection."] = "pooler"
            return ModuleMap(
                family="hf-clip",
                blocks=f"{prefix}encoder.layers",
                places=places,
                # Only CLIP's own pooling has a norm, of the CLS token alone.
                final_norm=None,
                norms=("layer_norm1", "layer_norm2"),
                own_pooling=(f"{prefix}post_layernorm.", "visual_projection."),
            )
        case _:
            return None


def _text_module_map(module: LibraryModel, model_type: str) -> ModuleMap | None:
    """Return the module map of a text encoder of transformers; None of any other model."""
    config: ModelConfig = getattr(module, "config", None)
    match model_type:
        case "bert" | "roberta" | "xlm-roberta" if not config.is_decoder:
            return ModuleMap(
                family="bert",
                blocks="encoder.layer",
                places=BERT_PLACES,
                final_norm=None,
                norms=("attention.output.LayerNorm", "output.LayerNorm"),
                ends=("attention.output.dropout", "output.dropout"),
                token_table=BERT_TABLE,
            )
        case "mpnet":
            return ModuleMap(
                family="mpnet",
                blocks="encoder.layer",
                places=MPNET_PLACES,
                final_norm=None,
                norms=("attention.LayerNorm", "output.LayerNorm"),
                ends=("attention.dropout", "output.dropout"),
                token_table=BERT_TABLE,
            )
        case "distilbert":
            return ModuleMap(
                family="distilbert",
                blocks="transformer.layer",
                places=BERT_PLACES,
                final_norm=None,
                norms=("sa_layer_norm", "output_layer_norm"),
                # Its attention ends in a dense layer without dropout.
                ends=("attention.out_lin", "ffn.dropout"),
                token_table=BERT_TABLE,
            )
        case "modernbert":
            return ModuleMap(
                family="modernbert",
                blocks="layers",
                places=MODERNBERT_PLACES,
                final_norm="final_norm",
                # The first norm of the first block is an identity.
                norms=("attn_norm", "mlp_norm"),
                token_table="embeddings.tok_embeddings",
            )
        case "t5" | "mt5" if not hasattr(module, "decoder"):
            return ModuleMap(
                family="t5",
                blocks="encoder.block",
                places=T5_PLACES,
                final_norm="encoder.final_layer_norm",
                norms=T5_NORMS,
            )
        case "qwen3" if hasattr(module, "embed_tokens"):
            return _decoder_anatomy(module)
        case _:
            return None


def _decoder_anatomy(module: LibraryModel) -> ModuleMap:
    is_causal = getattr(module.config, "is_causal", True) is not False
    if not is_causal or set(module.config.layer_types) != {"full_attention"}:
        raise EncoderError(
            f"{type(module).__name__} with sliding or two-way attention cannot be seen as a "
            f"tower; supported are {SUPPORTED}"
        )
    return ModuleMap(
        family="decoder",
        blocks="layers",
        places=DECODER_PLACES,
        final_norm="norm",
        norms=("input_layernorm", "post_attention_layernorm"),
    )


def _hf_vision_module_map(module: LibraryModel, model_type: str) -> ModuleMap:
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
        own_pooling=("pooler.",),
    )
