"""Read how an image-text model scales its cosines: the logit scale and bias of its training.

Trainers on cached features call this, so no encoder is opened: of the files only two scalars are
read.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apecache.encoders.snapshot import cannot_open, read_modules, resolve_folder
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.weight_files import (
    HUB_PREFIX,
    OPEN_CLIP_WEIGHTS,
    SENTENCE_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
)
from apecache.errors import EncoderError, MissingExtraError

SCALE = "logit_scale"
BIAS = "logit_bias"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Hold what turns the cosines of an image-text model into its logits."""

    scale: float
    """Factor of the cosines."""
    bias: float | None
    """Added to the logits; None: the model has no bias (CLIP)."""


def read_calibration(image: EncoderSpec, text: EncoderSpec) -> Calibration:
    """Read the scale and bias of the model that both encoders are sides of.

    Raises:
        EncoderError: the encoders are not both sides of one model, a feature is not the model's
            own output, or the model has no logit scale.
    """
    _require_one_model(image, text)
    values = _logit_values(image)
    if SCALE not in values:
        raise EncoderError(
            f"encoder {image} has no {SCALE}, so it is not an image-text model such as CLIP; "
            "choose a recipe that fits heads"
        )
    return Calibration(scale=math.exp(values[SCALE]), bias=values.get(BIAS))


def _require_one_model(image: EncoderSpec, text: EncoderSpec) -> None:
    for spec in (image, text):
        # Scale and bias belong to the model's own pooling: other features have other cosines.
        if spec.pooling != "default" or spec.layer is not None:
            raise EncoderError(
                f"encoder {spec}: only the model's own output fits the other side; extract it "
                f"without --{spec.modality}-cut"
            )
    if _source(image) != _source(text):
        raise EncoderError(
            f"encoders {image} and {text} are not both sides of one model; extract both with "
            "--model"
        )


def _source(spec: EncoderSpec) -> tuple[str, str, str | None]:
    name = str(spec.folder.resolve()) if spec.folder else spec.name
    return (spec.library, name, spec.revision)


def _logit_values(spec: EncoderSpec) -> dict[str, float]:
    """Return the scalars by the names `logit_scale` and `logit_bias`; a logarithm of the scale."""
    match spec.library:
        case "open_clip" if spec.folder is None and not spec.name.startswith(HUB_PREFIX):
            return _open_clip_values(spec, folder=None)
        case "open_clip":
            repository = spec.name.removeprefix(HUB_PREFIX)
            folder = resolve_folder(spec, OPEN_CLIP_WEIGHTS, repository=repository)
            # Two scalars of a file are read in no time; the whole model takes seconds.
            return _saved_values(folder) or _open_clip_values(spec, folder)
        case "st":
            folder = resolve_folder(spec, SENTENCE_WEIGHTS)
            modules = read_modules(folder, spec)
            inner_folder = folder / str(modules[0].get("path", "")) if modules else folder
            return _saved_values(inner_folder) or _transformers_values(spec, inner_folder)
        case "hf":
            folder = resolve_folder(spec, TRANSFORMERS_WEIGHTS)
            return _saved_values(folder) or _transformers_values(spec, folder)
        case _:
            return {}


def _saved_values(folder: Path) -> dict[str, float]:
    """Read the scalars from safetensors files without reading the other tensors."""
    from safetensors import safe_open

    values: dict[str, float] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in set(weights.keys()) & {SCALE, BIAS}:
                # Some models save the scalar as a list of one.
                values[name] = float(weights.get_tensor(name).float().reshape(-1)[0])
    return values


def _transformers_values(spec: EncoderSpec, folder: Path) -> dict[str, float]:
    """Open the whole model of transformers, whose weights are in no safetensors file."""
    if any(folder.glob("*.safetensors")):
        return {}
    from transformers import AutoModel

    from apecache.encoders.transformers_files import open_saved

    return _values_of(open_saved(AutoModel, spec, folder))


def _open_clip_values(spec: EncoderSpec, folder: Path | None) -> dict[str, float]:
    """Open the whole model of open_clip, whose weights are in no safetensors file."""
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    name, _, tag = spec.name.partition("/")
    source = {"model_name": name, "pretrained": tag}
    if folder is not None:
        source = {"model_name": f"local-dir:{folder}"}
    try:
        return _values_of(open_clip.create_model(**source, require_pretrained=True))
    except Exception as error:  # open_clip raises what its hub client, torch and json raise
        raise cannot_open(spec, error) from error


def _values_of(model: Any) -> dict[str, float]:
    values: dict[str, float] = {}
    for name in (SCALE, BIAS):
        parameter = getattr(model, name, None)
        if parameter is not None:
            values[name] = float(parameter.detach().float().reshape(-1)[0])
    return values
