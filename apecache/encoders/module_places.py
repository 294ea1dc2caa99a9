"""Name the parts of towers by the beginnings of parameter names, for each family."""

from typing import Literal

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

TIMM_PLACES: dict[str, Place] = {
    "patch_embed.": "patch_embedding",
    "cls_token": "cls",
    "reg_token": "registers",
    "dist_token": "registers",
    "pos_embed": "position",
    "norm_pre.": "embedding_norm",
    "norm.": "final_norm",
    "fc_norm.": "final_norm",
    "attn_pool.": "pooler",
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
CLIP_TEXT_PLACES: dict[str, Place] = {
    "embeddings.token_embedding.": "token_embedding",
    "embeddings.position_embedding.": "position",
    "final_layer_norm.": "final_norm",
}
OPEN_CLIP_VIT_PLACES: dict[str, Place] = {
    "conv1.": "patch_embedding",
    "class_embedding": "cls",
    "positional_embedding": "position",
    "ln_pre.": "embedding_norm",
    "ln_post.": "final_norm",
    "attn_pool": "pooler",
    "proj": "pooler",
}
OPEN_CLIP_TEXT_PLACES: dict[str, Place] = {
    "token_embedding.": "token_embedding",
    "positional_embedding": "position",
    "ln_final.": "final_norm",
    "text_projection": "pooler",
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
DEBERTA_PLACES: dict[str, Place] = {
    **BERT_PLACES,
    "encoder.rel_embeddings.": "position",
    "encoder.LayerNorm.": "embedding_norm",
}
"""All blocks look the relative positions up in one table, which counts as an embedding."""
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
