"""Export a run as `VisionTextDualEncoderModel` of transformers, with processor and tokenizer.

The class projects `pooler_output` of two models without a bias. Biases and means of the heads go
into the bias of the last layer before that output, so that the projections are exact.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.from_transformers import text_prefix
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.preprocess_transformers import resize_options
from apecache.encoders.snapshot import resolve_folder
from apecache.errors import RunError
from apecache.export.affine import affine_of, input_shift, is_affine
from apecache.export.check import ExportedModel
from apecache.export.whole_model import WholeModel
from apecache.fingerprint import Modality

ELSE = "export with --to sentence-transformers or --to onnx"


@dataclass(frozen=True, kw_only=True)
class PooledOutput:
    """Name how a model of transformers makes its `pooler_output`."""

    last_bias: str
    """Parameter whose change moves the pooled output by as much."""
    projection: str | None = None
    """Layer without bias between the pooled output and the encoder's features; None: there is
    none."""


IMAGE_OUTPUTS = {
    "dinov2": PooledOutput(last_bias="layernorm.bias"),
    "dinov2_with_registers": PooledOutput(last_bias="layernorm.bias"),
    "clip_vision_model": PooledOutput(
        last_bias="post_layernorm.bias",
        projection="visual_projection",
    ),
    "siglip_vision_model": PooledOutput(last_bias="head.mlp.fc2.bias"),
    "convnext": PooledOutput(last_bias="layernorm.bias"),
    "convnextv2": PooledOutput(last_bias="layernorm.bias"),
    "swin": PooledOutput(last_bias="layernorm.bias"),
}
"""Image models by type. A ViT's pooler ends in tanh, which no projection undoes."""
TEXT_OUTPUTS = {
    "clip_text_model": PooledOutput(
        last_bias="final_layer_norm.bias",
        projection="text_projection",
    ),
    "siglip_text_model": PooledOutput(last_bias="head.bias"),
}
"""Text models by type. The poolers of BERT and its family end in tanh."""


def write_transformers(model: WholeModel, out: Path) -> None:
    """Write a folder for `VisionTextDualEncoderModel.from_pretrained`.

    Raises:
        RunError: a head that is not linear, or an encoder whose pooled output the class lacks.
    """
    from transformers import (
        AutoTokenizer,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    image_module, image_projection = _side(model, "image", IMAGE_OUTPUTS)
    text_module, text_projection = _side(model, "text", TEXT_OUTPUTS)
    config = VisionTextDualEncoderConfig(
        vision_config=image_module.config.to_dict(),
        text_config=text_module.config.to_dict(),
        projection_dim=model.dim,
        logit_scale_init_value=math.log(model.run.scale),
    )
    dual: Any = VisionTextDualEncoderModel(config).eval()
    dual.vision_model.load_state_dict(image_module.state_dict())
    dual.text_model.load_state_dict(text_module.state_dict())
    with torch.no_grad():
        dual.visual_projection.weight.copy_(image_projection)
        dual.text_projection.weight.copy_(text_projection)
        dual.logit_scale.fill_(math.log(model.run.scale))
    dual.save_pretrained(out)
    _image_processor(model.image.encoder).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(
        str(resolve_folder(model.text.encoder.spec)),
        trust_remote_code=False,
    )
    # The limit of the run, which may be lower than that of the tokenizer's files.
    tokenizer.model_max_length = model.text.encoder.max_tokens
    tokenizer.save_pretrained(out)


def open_transformers(folder: Path) -> ExportedModel:
    """Open what `write_transformers` wrote, by transformers alone."""
    from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

    loaded: Any = VisionTextDualEncoderModel.from_pretrained(str(folder)).eval()
    processor: Any = AutoImageProcessor.from_pretrained(str(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))

    @torch.no_grad()
    def encode_image(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        embedded: Tensor = loaded.get_image_features(pixel_values=pixels).pooler_output
        return torch.nn.functional.normalize(embedded, dim=-1)

    @torch.no_grad()
    def encode_text(texts: Sequence[str]) -> Tensor:
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        embedded: Tensor = loaded.get_text_features(**inputs).pooler_output
        return torch.nn.functional.normalize(embedded, dim=-1)

    return ExportedModel(encode_image=encode_image, encode_text=encode_text)


def _side(
    model: WholeModel,
    side: Modality,
    outputs: dict[str, PooledOutput],
) -> tuple[Any, Tensor]:
    """Return the model of one side, with the shift in its last bias, and its projection."""
    encoder: ImageEncoder | TextEncoder = getattr(model, side).encoder
    spec = encoder.spec
    head = model.head(side)
    if not is_affine(head):
        name = "trained with its encoder" if head is None else f"of kind {head.spec.kind}"
        raise RunError(
            f"the {side} head is {name}; VisionTextDualEncoderModel can hold linear and identity "
            f"heads: {ELSE}"
        )
    assert head is not None
    module: LibraryModel = encoder.module
    model_type = getattr(getattr(module, "config", None), "model_type", spec.library)
    output = outputs.get(model_type)
    is_own = encoder.fingerprint.fields["inputs"].get("pooling") in ("default", "cls")
    if output is None or spec.library != "hf" or spec.layer is not None or not is_own:
        raise RunError(
            f"{side} encoder {spec} ({model_type}, pooling {spec.pooling}): "
            "VisionTextDualEncoderModel projects the pooled output of hf: encoders, and only of "
            f"{', '.join(outputs)} is that the run's features: {ELSE}"
        )
    if isinstance(encoder, TextEncoder) and text_prefix(spec):
        raise RunError(
            f"text encoder {spec} puts {text_prefix(spec)!r} before every text, which the class "
            f"cannot: {ELSE}"
        )
    weight, bias = affine_of(head)
    # The class projects what comes before the model's own projection, so both become one.
    if output.projection is not None and hasattr(module, output.projection):
        weight = weight @ getattr(module, output.projection).weight.double()
    bare = _bare(module, side)
    shift = input_shift(weight, bias, f"the {side} projection")
    parameter = bare.get_parameter(output.last_bias)
    with torch.no_grad():
        parameter.copy_((parameter.double() + shift).to(parameter.dtype))
    return bare, weight.float()


def _bare(module: LibraryModel, side: Modality) -> Any:
    """Return a copy of the model under its projection."""
    import copy

    name = "vision_model" if side == "image" else "text_model"
    inner = getattr(module, name, None)
    is_projected = type(module).__name__.endswith("WithProjection")
    # Copied: the shift changes a bias, and the run is compared with the export afterwards.
    copied: Any = copy.deepcopy(inner if is_projected and inner is not None else module)
    return copied


def _image_processor(encoder: ImageEncoder) -> Any:
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(
        str(resolve_folder(encoder.spec)),
        trust_remote_code=False,
    )
    for name, value in resize_options(processor, encoder.spec).items():
        setattr(processor, name, value)
    return processor
