"""Name the parts of each supported family of towers.

The names are those within the libraries' own models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from apecache.encoders.library_types import LibraryModel, ModelConfig
from apecache.encoders.module_places import (
    BERT_PLACES,
    CLIP_PLACES,
    CLIP_TEXT_PLACES,
    DEBERTA_PLACES,
    DECODER_PLACES,
    DINOV3_PLACES,
    HF_VISION_PLACES,
    MODERNBERT_PLACES,
    MPNET_PLACES,
    OPEN_CLIP_TEXT_PLACES,
    OPEN_CLIP_VIT_PLACES,
    SIGLIP_PLACES,
    T5_PLACES,
    TIMM_PLACES,
    Place,
)
from apecache.errors import EncoderError

Family = Literal[
    "timm",
    "timm-beit",
    "timm-eva",
    "hf-vit",
    "hf-beit",
    "hf-dinov3",
    "hf-siglip",
    "hf-clip",
    "hf-siglip-text",
    "hf-clip-text",
    "open_clip-vit",
    "open_clip-text",
    "bert",
    "deberta",
    "mpnet",
    "distilbert",
    "modernbert",
    "t5",
    "decoder",
    "whole",
]
Wrapper = Literal["open_clip-timm", "open_clip-hf"]
"""A model of open_clip around a model of timm or transformers, with a projection of its own."""
TEXT_FAMILIES: tuple[Family, ...] = (
    "hf-siglip-text",
    "hf-clip-text",
    "open_clip-text",
    "bert",
    "deberta",
    "mpnet",
    "distilbert",
    "modernbert",
    "t5",
    "decoder",
)
OWN_FAMILIES: tuple[Family, ...] = (
    "timm",
    "timm-beit",
    "timm-eva",
    "hf-clip",
    "hf-clip-text",
    "hf-siglip-text",
    "open_clip-vit",
    "open_clip-text",
)
"""Families that always have a pooling of their own."""
PADDED_FAMILIES: tuple[Family, ...] = ("hf-siglip-text",)
"""Families whose tokens see the padding of their text."""
HF_VISION = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")
HF_BEIT = ("beit", "data2vec-vision")
HF_CONTRASTIVE = ("clip", "metaclip_2", "siglip")
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "modernbert", "deberta-v2")
SUPPORTED = (
    "timm VisionTransformer, VisionTransformerDistilled, Beit, Eva; transformers "
    + ", ".join((*HF_VISION, *HF_BEIT, *HF_CONTRASTIVE))
    + "; open_clip's vision transformers; for text "
    + ", ".join((*BERT_LIKE, "t5", "mt5", "qwen3", *HF_CONTRASTIVE, "siglip2"))
    + ", open_clip's text transformers"
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
    root: str = ""
    """Name of the module that holds embeddings and blocks; empty: the model itself."""
    wrapper: Wrapper | None = None
    """What the model adds around the module `root`; None: nothing."""

    def within(
        self,
        root: str,
        wrapper: Wrapper,
        poolers: Sequence[str],
    ) -> "ModuleMap":
        """Return the map of a model that wraps this one as its submodule `root`.

        Args:
            poolers: beginnings of the names, within the wrapper, of what its own pooling adds.
        """
        place_of_module: dict[str, Place] = dict.fromkeys(poolers, "pooler")
        place_of_module |= {
            f"{root}.{beginning}": module_place for beginning, module_place in self.places.items()
        }
        return replace(
            self,
            blocks=f"{root}.{self.blocks}",
            places=place_of_module,
            final_norm=f"{root}.{self.final_norm}" if self.final_norm else None,
            token_table=f"{root}.{self.token_table}" if self.token_table else None,
            own_pooling=(*poolers, *[f"{root}.{beginning}" for beginning in self.own_pooling]),
            root=root,
            wrapper=wrapper,
        )


TIMM_OWN = ("fc_norm.", "attn_pool.")
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
    if library == "open_clip":
        module_map = _open_clip_module_map(module)
    elif library == "timm":
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
    match name:
        case "Beit":
            family: Family = "timm-beit"
            place_of_module: dict[str, Place] = {**TIMM_PLACES, "rel_pos_bias.": "position"}
        case "Eva":
            family = "timm-eva"
            place_of_module = {**TIMM_PLACES, "rope.": "position"}
        case "VisionTransformer" | "VisionTransformerDistilled":
            family = "timm"
            place_of_module = TIMM_PLACES
        case _:
            return None
    # Blocks of other designs (parallel branches, norms at the end) have no norm before attention.
    block_names = {type(block).__name__ for block in module.blocks}
    has_norms = all(hasattr(b, "norm1") and hasattr(b, "attn") for b in module.blocks)
    post_norm_blocks = block_names & {"EvaBlockPostNorm", "ResPostBlock"}
    if not has_norms or post_norm_blocks:
        raise EncoderError(
            f"timm blocks of the kind {next(iter(post_norm_blocks or block_names))} "
            f"cannot be seen as a tower's; supported are {SUPPORTED}"
        )
    return ModuleMap(
        family=family,
        blocks="blocks",
        places=place_of_module,
        final_norm=final_norm,
        norms=("norm1", "norm2"),
        own_pooling=TIMM_OWN,
    )


def _open_clip_module_map(module: LibraryModel) -> ModuleMap | None:
    """Return the module map of one side of an open_clip model; None of any other."""
    norms = ("ln_1", "ln_2")
    match type(module).__name__:
        case "VisionTransformer":
            # Elsewhere the norm comes after the pooling.
            is_plain = module.attn_pool is None and not module.final_ln_after_pool
            return ModuleMap(
                family="open_clip-vit",
                blocks="transformer.resblocks",
                places=OPEN_CLIP_VIT_PLACES,
                final_norm="ln_post" if is_plain else None,
                norms=norms,
                own_pooling=("attn_pool", "proj") if is_plain else ("attn_pool", "proj", "ln_post"),
            )
        case "TextTransformer":
            return _open_clip_text_map(module, norms)
        case "TimmModel":
            inner = read_module_map(module.trunk)
            # timm's classifier may serve as the projection.
            return inner.within("trunk", "open_clip-timm", ("head.", "trunk.head."))
        case "HFTextEncoder":
            inner = read_module_map(module.transformer)
            takes_pooler = getattr(module.pooler, "use_pooler_output", False)
            poolers = ("proj.", "transformer.pooler.") if takes_pooler else ("proj.",)
            return inner.within("transformer", "open_clip-hf", poolers)
        case _:
            return None


def _open_clip_text_map(module: LibraryModel, norms: tuple[str, str]) -> ModuleMap:
    # These masks are made of the token ids, which a cut does not have any more.
    needs_ids = module.cls_emb is not None or module.use_pad_mask
    finds_end = module.pool_type in ("argmax", "eos") and module.attn_mask is None
    if needs_ids or finds_end:
        raise EncoderError(
            "an open_clip text tower that appends a class token (CoCa) or masks its padding cannot "
            "be seen as a tower, so it cannot be trained; use it frozen"
        )
    return ModuleMap(
        family="open_clip-text",
        blocks="transformer.resblocks",
        places=OPEN_CLIP_TEXT_PLACES,
        final_norm="ln_final",
        norms=norms,
        own_pooling=("text_projection",),
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
            return _contrastive_map(
                module,
                family="hf-clip",
                root="vision_model",
                place_of_module=CLIP_PLACES,
                # Only CLIP's own pooling has a norm, of the CLS token alone.
                final_norm=None,
                projection="visual_projection.",
            )
        case _:
            return None


def _contrastive_map(
    module: LibraryModel,
    family: Family,
    root: str,
    place_of_module: Mapping[str, Place],
    final_norm: str | None,
    projection: str,
) -> ModuleMap:
    """Return the module map of a CLIP or SigLIP of transformers.

    Args:
        root: name of the tower's own module, where a projection lies beside it.
        places: beginnings of names within that module.
        projection: beginning of the names of what the model's own pooling ends with.
    """
    root = root if hasattr(module, root) else ""
    prefix = f"{root}." if root else ""
    named_places = {
        f"{prefix}{beginning}": module_place for beginning, module_place in place_of_module.items()
    }
    own_norm = () if final_norm else (f"{prefix}post_layernorm.",)
    return ModuleMap(
        family=family,
        blocks=f"{prefix}encoder.layers",
        places={**named_places, projection: "pooler"},
        final_norm=f"{prefix}{final_norm}" if final_norm else None,
        norms=("layer_norm1", "layer_norm2"),
        own_pooling=(*own_norm, projection),
        root=root,
    )


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
        case "clip_text_model" | "metaclip_2_text_model":
            return _contrastive_map(
                module,
                family="hf-clip-text",
                root="text_model",
                place_of_module=CLIP_TEXT_PLACES,
                final_norm="final_layer_norm",
                projection="text_projection.",
            )
        case "siglip_text_model" | "siglip2_text_model":
            return _contrastive_map(
                module,
                family="hf-siglip-text",
                root="text_model",
                place_of_module=CLIP_TEXT_PLACES,
                final_norm="final_layer_norm",
                projection="head.",
            )
        case "deberta-v2":
            return _deberta_anatomy(module)
        case "qwen3" if hasattr(module, "embed_tokens"):
            return _decoder_anatomy(module)
        case _:
            return None


def _deberta_anatomy(module: LibraryModel) -> ModuleMap:
    if module.encoder.conv is not None or not module.encoder.relative_attention:
        raise EncoderError(
            "a DeBERTa with a convolution (v2-xlarge, v2-xxlarge) or without relative positions "
            "cannot be seen as a tower, so it cannot be trained; take DeBERTa-v3"
        )
    return ModuleMap(
        family="deberta",
        blocks="encoder.layer",
        places=DEBERTA_PLACES,
        final_norm=None,
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        ends=("attention.output.dropout", "output.dropout"),
        token_table=BERT_TABLE,
    )


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
