"""Write the encoders of a run as folders that the transformers library opens."""

import json
from pathlib import Path
from typing import Any

from apecache.encoders.encoder import ImageEncoder
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.snapshot import read_json, resolve_folder
from apecache.encoders.spec import EncoderSpec
from apecache.storage.replace import replace_tensors, replace_text


def write_timm_folder(encoder: ImageEncoder, out: Path, loader: str) -> None:
    """Write a timm encoder without its classifier in timm's own format.

    Args:
        encoder: of library timm.
        out: folder, which may exist.
        loader: `transformers` or `open_clip`; timm needs other files for each.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = timm_config(encoder)
    if loader == "open_clip":
        # open_clip asks timm for the architecture alone and brings the weights itself.
        config["pretrained_cfg"]["num_classes"] = config["num_classes"]
    replace_text(out / "config.json", json.dumps(config, indent=1))
    if loader == "transformers":
        replace_tensors(out / "model.safetensors", encoder.module.state_dict())


def timm_config(encoder: ImageEncoder) -> dict[str, Any]:
    """Return timm's config.json of an encoder without classifier, at the spec's resolution."""
    data_config = timm_data_config(encoder)
    module: LibraryModel = encoder.module
    return {
        "architecture": str(module.default_cfg.get("architecture") or ""),
        "num_classes": 0,
        "num_features": int(module.num_features),
        "model_args": timm_model_args(encoder),
        "pretrained_cfg": {
            **data_config,
            "first_conv": module.default_cfg.get("first_conv"),
            "classifier": module.default_cfg.get("classifier"),
            "fixed_input_size": bool(module.default_cfg.get("fixed_input_size", False)),
        },
    }


def timm_data_config(encoder: ImageEncoder) -> dict[str, Any]:
    """Return size, crop, mean and deviation of a timm encoder's preprocessing, as JSON."""
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(encoder.module)
    if encoder.spec.resolution:
        config["input_size"] = (3, encoder.spec.resolution, encoder.spec.resolution)
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }


def timm_model_args(encoder: ImageEncoder) -> dict[str, Any]:
    """Return the arguments by which timm builds the architecture of an encoder."""
    spec = encoder.spec
    folder = _timm_folder(spec)
    saved = {} if folder is None else read_json(folder / "config.json", spec)
    arguments = dict(saved.get("model_args") or {})
    # Convolutional networks take any size and have no such argument.
    if spec.resolution and hasattr(encoder.module, "patch_embed"):
        arguments["img_size"] = spec.resolution
    return arguments


def _timm_folder(spec: EncoderSpec) -> Path | None:
    """Return the folder that describes the encoder; None for a name of timm's own."""
    repository = spec.name.removeprefix("hf-hub:")
    if spec.folder is None and "/" not in repository:
        return None
    return resolve_folder(spec, repository=repository)
