"""Describe the text models of transformers: class, own pooling, end of text, padding."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    MetaClip2TextModel,
    MetaClip2TextModelWithProjection,
    MT5EncoderModel,
    Siglip2TextModel,
    SiglipTextModel,
    T5EncoderModel,
    UMT5EncoderModel,
)

from apecache.encoders.library_types import ModelConfig, Tokenizer
from apecache.encoders.spec import EncoderSpec, Pooling, no_class_token
from apecache.encoders.text_repository import TextUse, has_class_token, resolve_pooling
from apecache.encoders.transformers_files import open_saved
from apecache.errors import EncoderError

T5_TYPES = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}
PROJECTED_TEXT = {
    "clip": CLIPTextModelWithProjection,
    "clip_text_model": CLIPTextModelWithProjection,
    "metaclip_2": MetaClip2TextModelWithProjection,
    "metaclip_2_text_model": MetaClip2TextModelWithProjection,
}
"""Text towers whose own output is the projected end-of-text token."""
UNPROJECTED_TEXT = {"CLIPTextModel": CLIPTextModel, "MetaClip2TextModel": MetaClip2TextModel}
"""Text towers that were saved without a projection, by the class that config.json names."""
SIGLIP_TEXT = {
    "siglip": SiglipTextModel,
    "siglip_text_model": SiglipTextModel,
    "siglip2": Siglip2TextModel,
    "siglip2_text_model": Siglip2TextModel,
}
"""Text towers whose own output is that of the last position. They were trained on texts that are
padded to one length, and they see the padding."""
PADDING_TYPES = ("convbert", "fnet", "mobilebert", "nystromformer")
"""They read each token with its neighbours, or all positions, and so the padding too."""
LEGACY_EOS = 2
"""What old CLIP configs name as end of text; the library then takes the highest id."""


def text_width(pooling: Pooling, config: ModelConfig) -> int:
    """Return the width of the features of one text or token."""
    if pooling == "default" and unprojected_class(config) is None:
        is_siglip = config.model_type in SIGLIP_TEXT
        return int(config.projection_size if is_siglip else config.projection_dim)
    n_vectors = 2 if pooling == "cls+mean" else 1
    return int(config.hidden_size) * n_vectors


def read_text_config(spec: EncoderSpec, folder: Path) -> ModelConfig:
    """Return the configuration of the text tower.

    Raises:
        EncoderError: the model is not a single text encoder.
    """
    config = open_saved(AutoConfig, spec, folder)
    if config.model_type in PROJECTED_TEXT:
        text_config = getattr(config, "text_config", config)
        # The whole model's projection counts; its towers may repeat another one.
        text_config.projection_dim = config.projection_dim
        return text_config
    if config.model_type in SIGLIP_TEXT:
        return getattr(config, "text_config", config)
    if config.model_type in PADDING_TYPES:
        raise EncoderError(
            f"encoder {spec}: the output of {config.model_type} depends on the padding of its "
            "batch, so a text has no fixed features; choose another model, such as distilbert"
        )
    t5 = config.model_type in T5_TYPES
    has_decoder = getattr(config, "is_encoder_decoder", False)
    if not t5 and (has_decoder or hasattr(config, "vision_config")):
        raise EncoderError(
            f"encoder {spec}: {config.model_type} is not a single text encoder; BERT-like models, "
            "T5, causal decoders, CLIP and SigLIP are supported; open_clip: has other pairs"
        )
    return config


def unprojected_class(config: ModelConfig) -> Any | None:
    """Return the class of a text tower that was saved without its projection; None of others."""
    names = list(getattr(config, "architectures", None) or [])
    classes = [UNPROJECTED_TEXT[name] for name in names if name in UNPROJECTED_TEXT]
    return classes[0] if classes else None


def text_factory(config: ModelConfig) -> Any:
    """Return the class that opens the text tower."""
    if (unprojected := unprojected_class(config)) is not None:
        return unprojected
    factories = {**T5_TYPES, **PROJECTED_TEXT, **SIGLIP_TEXT}
    return factories.get(config.model_type, AutoModel)


def padding_id(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """Return the id of padding. It is masked, so any id serves where the tokenizer names none."""
    if config.model_type in PROJECTED_TEXT:
        # Old CLIP configs take the highest id as the end of the text: no padding may exceed it.
        return int(tokenizer.eos_token_id or 0)
    return int(tokenizer.pad_token_id or 0)


def text_pooling(cut: EncoderSpec, folder: Path, use: TextUse, config: ModelConfig) -> Pooling:
    """Return the pooling of a cut; `default` is the model's own, of CLIP and SigLIP.

    Raises:
        EncoderError: it is not known, or takes a CLS token that the model does not have.
    """
    has_own = config.model_type in (*PROJECTED_TEXT, *SIGLIP_TEXT)
    if has_own and cut.pooling == "default" and cut.layer is None:
        return "default"
    pooling = resolve_pooling(cut, folder, use, config)
    # A repository that takes the first token is obeyed.
    if "cls" in cut.pooling and not has_class_token(config):
        raise no_class_token(f"encoder {cut}: {config.model_type}", "text")
    return pooling


def until_end(ids: list[int], config: ModelConfig) -> list[int]:
    """Return the tokens up to the one that the model pools at."""
    eos_id = config.eos_token_id
    if eos_id == LEGACY_EOS and config.model_type.startswith("clip"):
        return ids[: ids.index(max(ids)) + 1]
    return ids[: ids.index(eos_id) + 1] if eos_id in ids else ids


def require_eos(spec: EncoderSpec, ids: Sequence[int], config: ModelConfig) -> None:
    """Raise EncoderError unless the tokenizer ends a text by the token that the model pools at."""
    eos_id = config.eos_token_id
    is_legacy = eos_id == LEGACY_EOS and config.model_type.startswith("clip")
    ends_right = bool(ids) and (ids[-1] == max(ids) if is_legacy else eos_id in ids)
    if not ends_right:
        raise EncoderError(
            f"encoder {spec}: its tokenizer does not end a text by the token {eos_id} that the "
            "model pools at; save the right tokenizer beside the model"
        )
