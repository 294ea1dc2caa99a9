"""Where the parts of each supported family of towers lie: names within the libraries' own models,
nothing else."""

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
BERT_LIKE = ("bert", "roberta", "xlm-roberta")
SUPPORTED = (
    "timm VisionTransformer, VisionTransformerDistilled, Beit; transformers "
    + ", ".join((*HF_VISION, "beit"))
    + "; "
    "for text " + ", ".join((*BERT_LIKE, "t5", "mt5"))
)


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where the parts of one family lie.

    `places`: beginnings of parameter names, the first that fits counts; what no entry names is not
    on the way from input to output (poolers, classifiers, mask tokens). `norms`: the norms of a
    block's two branches, by name within the block. `ends`: in blocks with the norm last, the
    dropouts that end the branches; None where it comes first.
    """

    family: Literal["timm", "timm-beit", "hf-vit", "hf-beit", "bert", "t5"]
    blocks: str
    places: Mapping[str, Place]
    final_norm: str | None
    norms: tuple[str, str]
    ends: tuple[str, str] | None = None


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
    "layernorm.": "final_norm",
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


def read_anatomy(module: Any) -> Anatomy:
    """Raises EncoderError for an architecture that is not one of the supported ones, named with
    these."""
    config: Any = getattr(module, "config", None)
    kind = getattr(config, "model_type", type(module).__name__)
    from_timm = type(module).__module__.startswith("timm.")
    match kind:
        case "VisionTransformer" | "VisionTransformerDistilled" if (
            from_timm and module.attn_pool is None
        ):
            return _timm_anatomy(module)
        case "Beit" if from_timm:
            places: dict[str, Place] = {**TIMM_PLACES, "rel_pos_bias.": "position"}
            norm = "norm" if not isinstance(module.norm, nn.Identity) else None
            return Anatomy(
                family="timm-beit",
                blocks="blocks",
                places=places,
                final_norm=norm,
                norms=("norm1", "norm2"),
            )
        case "vit" | "deit" | "dinov2" | "dinov2_with_registers" | "beit":
            return _hf_vision_anatomy(module, kind)
        case "bert" | "roberta" | "xlm-roberta" if not config.is_decoder:
            ends = ("attention.output.dropout", "output.dropout")
            norms = ("attention.output.LayerNorm", "output.LayerNorm")
            return Anatomy(
                family="bert",
                blocks="encoder.layer",
                places=BERT_PLACES,
                final_norm=None,
                norms=norms,
                ends=ends,
            )
        case "t5" | "mt5" if not hasattr(module, "decoder"):
            return Anatomy(
                family="t5",
                blocks="encoder.block",
                places=T5_PLACES,
                final_norm="encoder.final_layer_norm",
                norms=T5_NORMS,
            )
        case _:
            raise EncoderError(
                f"{type(module).__name__} ({kind}) cannot be seen as a tower; supported are "
                f"{SUPPORTED}"
            )


def _timm_anatomy(module: Any) -> Anatomy:
    if not all(hasattr(block, "norm1") and hasattr(block, "attn") for block in module.blocks):
        name = type(module.blocks[0]).__name__
        raise EncoderError(
            f"timm blocks of the kind {name} cannot be seen as a tower's; supported are {SUPPORTED}"
        )
    norm = "norm" if not isinstance(module.norm, nn.Identity) else None
    return Anatomy(
        family="timm",
        blocks="blocks",
        places=TIMM_PLACES,
        final_norm=norm,
        norms=("norm1", "norm2"),
    )


def _hf_vision_anatomy(module: Any, kind: str) -> Anatomy:
    blocks = "layers" if hasattr(module, "layers") else "encoder.layer"
    norms = (
        ("norm1", "norm2") if kind.startswith("dinov2") else ("layernorm_before", "layernorm_after")
    )
    norm = "layernorm" if not isinstance(module.layernorm, nn.Identity) else None
    return Anatomy(
        family="hf-beit" if kind == "beit" else "hf-vit",
        blocks=blocks,
        places=HF_VISION_PLACES,
        final_norm=norm,
        norms=norms,
    )
