"""timm image encoders: the classifier-free model, with timm's own reference preprocessing (PIL)."""

import json
import re
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from apecache.encoders.encoder import ImageEncoder, build_fingerprint, digest_module, freeze
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, nearest
from apecache.fingerprint import IMAGE_DECODING, Json


def load_timm(spec: EncoderSpec, device: torch.device) -> ImageEncoder:
    """Pooled features before the classifier, [n, num_features].

    Raises:
        EncoderError: an unknown architecture, a hub that cannot be reached, weights that do not fit.
    """
    module = _create(spec)
    config = resolve_model_data_config(module)
    if spec.resolution:
        config["input_size"] = (3, spec.resolution, spec.resolution)
    height, width = config["input_size"][1:]
    transform = create_transform(**config, is_training=False)
    inputs: Json = {
        "decoding": IMAGE_DECODING,
        "backend": "timm-pil",
        "config": _plain(config),
        "transform": _steps(transform),
    }
    inputs["pooling"] = "model" if spec.pooling == "default" else spec.pooling
    fingerprint = build_fingerprint(spec, digest_module(module), _architecture(module, spec), inputs)
    frozen = freeze(module, spec, device)
    pooled = getattr(module, "head_hidden_size", module.num_features)  # the model's own pooling may widen
    dim = int(pooled if spec.pooling == "default" else module.num_features)
    forward = _forward(frozen, spec)
    return ImageEncoder(spec, frozen, transform, forward, (3, height, width), dim, fingerprint, device)


def shape_timm(spec: EncoderSpec) -> Any:
    """The architecture without weights or classifier, on the meta device. Raises EncoderError as `load_timm` does."""
    size: dict[str, Any] = {"img_size": spec.resolution} if spec.resolution else {}
    if not spec.folder:
        _require_known(spec)
    name = f"local-dir:{spec.folder}" if spec.folder else spec.name
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, num_classes=0, **size)
    except Exception as error:  # as in _create
        raise EncoderError(f"encoder {spec}: {_one_line(error)}") from error


def _create(spec: EncoderSpec) -> Any:
    """The model, loaded with its classifier, which is then taken off: asked for a model without one, timm accepts
    weights that lack other parameters too, and leaves those random."""
    try:
        if not spec.folder:
            _require_known(spec)
        module = _pretrained(f"local-dir:{spec.folder}" if spec.folder else _hub_name(spec), spec.resolution)
        module.reset_classifier(0)
        return module
    except EncoderError:
        raise
    except Exception as error:  # the hub client, safetensors and timm share no base class of errors
        raise EncoderError(f"encoder {spec}: {_one_line(error)}") from error


def _pretrained(name: str, resolution: int | None) -> Any:
    size: dict[str, Any] = {"img_size": resolution} if resolution else {}
    try:
        return timm.create_model(name, pretrained=True, **size)
    except TypeError as error:
        if not resolution or "img_size" not in str(error):
            raise
    return timm.create_model(name, pretrained=True)  # convolutional networks take any size and have no `img_size`


def _hub_name(spec: EncoderSpec) -> str:
    if not spec.revision:
        return spec.name
    config = timm.get_pretrained_cfg(spec.name)
    if config is None or not config.hf_hub_id:
        raise EncoderError(
            f"encoder {spec}: these weights do not come from a hub, so they have no revision; leave @ off"
        )
    repository = config.hf_hub_id if config.hf_hub_id.count("/") and not config.hf_hub_id.endswith("/") else None
    return f"hf-hub:{repository or config.hf_hub_id + spec.name}@{spec.revision}"


def _require_known(spec: EncoderSpec) -> None:
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise EncoderError(f"encoder {spec}: timm has no model {architecture!r}{nearest(architecture, known)}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise EncoderError(
            f"encoder {spec}: {architecture} has no weights {tag!r}; there are {', '.join(tags) or 'none'}"
        )


def _architecture(module: Any, spec: EncoderSpec) -> Json:
    """What the weights do not show: the same ones under another pooling or other arguments give other features."""
    name = str(getattr(module, "default_cfg", {}).get("architecture") or type(module).__name__)
    pool = getattr(module, "global_pool", None) or getattr(getattr(module, "head", None), "global_pool", None)
    saved = json.loads((spec.folder / "config.json").read_text()) if spec.folder else {}
    return {"class": name, "pool": str(getattr(pool, "pool_type", pool)), "arguments": saved.get("model_args") or {}}


def _forward(module: Any, spec: EncoderSpec) -> Any:
    """timm's own pooling, or the CLS token, or the mean over patch tokens (prefix tokens left out)."""
    if spec.pooling == "default":
        return module
    prefix = int(getattr(module, "num_prefix_tokens", 0))
    channels_last = getattr(module, "output_fmt", None) == "NHWC"
    if spec.pooling == "cls" and not (prefix and getattr(module, "has_class_token", True)):
        raise EncoderError(f"encoder {spec} has no CLS token; use --image-pooling default or mean")

    def pooled(pixels: Tensor) -> Tensor:
        tokens = module.forward_features(pixels)
        if spec.pooling == "cls":
            result: Tensor = tokens[:, 0]
        else:
            result = (
                tokens.mean((1, 2) if channels_last else (2, 3)) if tokens.ndim == 4 else tokens[:, prefix:].mean(1)
            )
        return result

    return pooled


def _steps(transform: Any) -> list[str]:
    """The resolved preprocessing step by step, free of memory addresses."""
    steps = [re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(step).split())) for step in transform.transforms]
    return steps


def _plain(config: dict[str, Any]) -> Json:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())[:300] or type(error).__name__
    return f"{message} (give a name that timm.list_models knows, or timm:/folder with a saved model)"
