"""Small towers with random weights, and the published shapes without any: what tests import."""

from typing import Any

import timm
import torch
import transformers as hf

from apecache.encoders.tower import Tower, build_tower

BERT_SIZES = {"tiny": (2, 128), "small": (4, 512), "base": (12, 768), "large": (24, 1024)}
VIT_SIZES = {"tiny": (12, 192), "small": (12, 384), "base": (12, 768), "large": (24, 1024)}


def shapes_only(size: str, text_size: str | None = None) -> tuple[Tower, Tower]:
    """ViT/16 at 256 px (DeiT without distillation) and uncased BERT of published sizes, on the meta
    device. There is no large DeiT: the published count of the large deep adapter fits DeiT III's
    blocks, which have layer scales."""
    depth, dim = VIT_SIZES[size]
    text_depth, text_dim = BERT_SIZES[text_size or size]
    settings = {"embed_dim": dim, "depth": depth, "num_heads": dim // 64, "img_size": 256}
    settings |= {"init_values": 1e-6} if size == "large" else {}
    with torch.device("meta"):
        image = timm.create_model(
            "vit_base_patch16_224",
            pretrained=False,
            num_classes=0,
            **settings,
        )
        text = hf.BertModel(
            hf.BertConfig(
                hidden_size=text_dim,
                num_hidden_layers=text_depth,
                num_attention_heads=text_dim // 64,
                intermediate_size=4 * text_dim,
            ),
            add_pooling_layer=False,
        )
    return build_tower(image, "image", "cls"), build_tower(
        text,
        modality="text",
        pooling="cls",
        cls_id=101,
    )


def small_vit(seed: int = 0, **settings: Any) -> Tower:
    """timm, three blocks of width 16, 16 patches of 4 px; CLS."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 3}
    module = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        num_classes=0,
        **sizes | settings,
    )
    return build_tower(module.eval(), "image", "cls")


def small_bert(seed: int = 0, **settings: Any) -> Tower:
    """Three blocks of width 16, 60 tokens, CLS is 2, no dropout; CLS."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 60}
    module = hf.BertModel(hf.BertConfig(**sizes | still | settings), add_pooling_layer=False)
    return build_tower(module.eval(), modality="text", pooling="cls", cls_id=2)


def small_t5(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    config = hf.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=3,
        num_heads=2,
        vocab_size=60,
        dropout_rate=0.0,
    )
    return build_tower(hf.T5EncoderModel(config).eval(), "text", "mean")


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SMALL_IMAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig, {"num_register_tokens": 2}),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig, {}),
    "clip": (hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig, {"projection_dim": 8}),
}
SMALL_TEXTS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "modernbert": (
        hf.ModernBertModel,
        hf.ModernBertConfig,
        {**SIZES, "pad_token_id": 0, "initializer_range": 0.2},
    ),
    "mpnet": (hf.MPNetModel, hf.MPNetConfig, SIZES),
    "distilbert": (
        hf.DistilBertModel,
        hf.DistilBertConfig,
        {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    ),
    "qwen3": (
        hf.Qwen3Model,
        hf.Qwen3Config,
        {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0},
    ),
}


def small_tower(family: str, seed: int = 0) -> Tower:
    """A tower of transformers with three blocks of width 16 and its default pooling."""
    torch.manual_seed(seed)
    if family in SMALL_IMAGES:
        model, config, settings = SMALL_IMAGES[family]
        module = model(config(**SIZES, image_size=16, patch_size=4, **settings))
        return build_tower(module.eval(), "image")
    model, config, settings = SMALL_TEXTS[family]
    module = model(config(vocab_size=60, **settings))
    return build_tower(module.eval(), modality="text", cls_id=2)


def pictures(n: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def sentences(n: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [n, 7]; the first token is CLS (2), the second text is padded with 0."""
    ids = torch.randint(5, 60, (n, 7), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids * mask, mask
