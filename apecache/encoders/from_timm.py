"""timm image encoders: the classifier-free model, with timm's own reference preprocessing (PIL)."""

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
    architecture = str(getattr(module, "default_cfg", {}).get("architecture") or type(module).__name__)
    fingerprint = build_fingerprint(spec, digest_module(module), architecture, {**inputs, "pooling": _pooling(spec)})
    frozen = freeze(module, spec, device)
    dim = int(module.num_features) if not hasattr(module, "head_hidden_size") else int(module.head_hidden_size)
    forward = _forward(frozen, spec)
    return ImageEncoder(spec, frozen, transform, forward, (3, height, width), dim, fingerprint, device)


def _create(spec: EncoderSpec) -> Any:
    size: dict[str, Any] = {"img_size": spec.resolution} if spec.resolution else {}
    try:
        if spec.folder:
            return timm.create_model(f"local-dir:{spec.folder}", pretrained=True, num_classes=0, **size)
        _require_known(spec)
        return timm.create_model(_hub_name(spec), pretrained=True, num_classes=0, **size)
    except TypeError as error:
        if "img_size" not in str(error) or not size:
            raise
        return _create_convolutional(spec)
    except EncoderError:
        raise
    except Exception as error:  # the hub client, safetensors and timm share no base class of errors
        raise EncoderError(f"encoder {spec}: {_one_line(error)}") from error


def _create_convolutional(spec: EncoderSpec) -> Any:
    """Convolutional networks take any input size and have no `img_size` argument."""
    name = f"local-dir:{spec.folder}" if spec.folder else _hub_name(spec)
    return timm.create_model(name, pretrained=True, num_classes=0)


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


def _pooling(spec: EncoderSpec) -> str:
    return "model" if spec.pooling == "default" else spec.pooling


def _forward(module: Any, spec: EncoderSpec) -> Any:
    """timm's own pooling, or the CLS token, or the mean over patch tokens (prefix tokens left out)."""
    if spec.pooling == "default":
        return module
    prefix = int(getattr(module, "num_prefix_tokens", 0))
    if spec.pooling == "cls" and not prefix:
        raise EncoderError(f"encoder {spec} has no CLS token; use --image-pooling default or mean")

    def pooled(pixels: Tensor) -> Tensor:
        tokens = module.forward_features(pixels)
        if spec.pooling == "cls":
            result: Tensor = tokens[:, 0]
        else:
            result = tokens.mean((2, 3)) if tokens.ndim == 4 else tokens[:, prefix:].mean(1)
        return result

    return pooled


def _steps(transform: Any) -> list[str]:
    """The resolved preprocessing step by step, free of memory addresses."""
    steps = [re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(step).split())) for step in transform.transforms]
    return steps


def _plain(config: dict[str, Any]) -> Json:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _one_line(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"{first.strip()} (give a name that timm.list_models knows, or timm:/folder with a saved model)"
