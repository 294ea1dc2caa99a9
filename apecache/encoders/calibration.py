"""Read how an image-text model scales its cosines: the logit scale and bias of its training."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apecache.encoders.snapshot import read_modules, resolve_folder
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError

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
    values = _library_values(image)
    if SCALE not in values:
        raise EncoderError(
            f"encoder {image} has no {SCALE}, so it is not an image-text model such as CLIP; "
            "choose a recipe that fits heads"
        )
    return Calibration(scale=math.exp(values[SCALE]), bias=values.get(BIAS))


def _require_one_model(image: EncoderSpec, text: EncoderSpec) -> None:
    for spec in (image, text):
        if spec.pooling != "default" or spec.layer is not None:
            raise EncoderError(
                f"encoder {spec}: only the model's own output fits the other side; extract it "
                f"without --{spec.modality}-cut"
            )
    sources = [replace(spec, name=_place(spec)) for spec in (image, text)]
    first, second = [(spec.library, spec.name, spec.revision) for spec in sources]
    if first != second:
        raise EncoderError(
            f"encoders {image} and {text} are not both sides of one model; extract both with "
            "--model"
        )


def _place(spec: EncoderSpec) -> str:
    return str(spec.folder.resolve()) if spec.folder else spec.name


def _library_values(spec: EncoderSpec) -> dict[str, float]:
    """Return the scalars by the names `logit_scale` and `logit_bias`; a logarithm of the scale."""
    match spec.library:
        case "open_clip":
            from apecache.encoders.from_open_clip import open_clip_folder, open_clip_model

            folder = open_clip_folder(spec)
            found = {} if folder is None else _saved_values(folder)
            return found or _values_of(open_clip_model(spec))
        case "st":
            from apecache.encoders import from_sentence_transformers

            folder = resolve_folder(spec, from_sentence_transformers.WEIGHT_FILES)
            modules = read_modules(folder, spec)
            first_folder = folder / str(modules[0].get("path", "")) if modules else folder
            return _saved_values(first_folder) or _pickled_values(spec, first_folder)
        case "hf":
            from apecache.encoders import transformers_files

            folder = resolve_folder(spec, transformers_files.WEIGHT_FILES)
            return _saved_values(folder) or _pickled_values(spec, folder)
        case _:
            return {}


def _saved_values(folder: Path) -> dict[str, float]:
    """Read the scalars from safetensors files without reading the other tensors."""
    from safetensors import safe_open

    values: dict[str, float] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in set(weights.keys()) & {SCALE, BIAS}:
                values[name] = float(weights.get_tensor(name).float().reshape(-1)[0])
    return values


def _pickled_values(spec: EncoderSpec, folder: Path) -> dict[str, float]:
    """Open the whole model of transformers, whose weights are in no safetensors file."""
    if any(folder.glob("*.safetensors")):
        return {}
    from transformers import AutoModel

    from apecache.encoders.transformers_files import open_saved

    return _values_of(open_saved(AutoModel, spec, folder))


def _values_of(model: Any) -> dict[str, float]:
    values: dict[str, float] = {}
    for name in (SCALE, BIAS):
        parameter = getattr(model, name, None)
        if parameter is not None:
            values[name] = float(parameter.detach().float().reshape(-1)[0])
    return values
