"""timm image encoders: the classifier-free model, with timm's own reference preprocessing (PIL)."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from apecache.encoders.encoder import (
    ImageEncoder,
    State,
    States,
    Tap,
    build_fingerprint,
    digest_module,
    freeze,
    pool_tokens,
)
from apecache.encoders.layers import caught, resolve_layer
from apecache.encoders.preprocess import Preprocess, image_preprocess, probe, resize_of
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, nearest
from apecache.fingerprint import Json

N_PATCH_CONVOLUTIONS = 4
"""A transformer has at most so many convolutions: its patch embedding, or a small stem."""


def load_timm(specs: Sequence[EncoderSpec], device: torch.device) -> list[ImageEncoder]:
    """One encoder for each spec; the specs differ in pooling and layer only, so one model serves
    all of them.

    Raises:
        EncoderError: an unknown architecture, a hub that cannot be reached, weights that do not
            fit.
    """
    spec = specs[0]
    module = _create(spec)
    config, transform = _transform(module, spec)
    height, width = config["input_size"][1:]
    memory = memory_format(module)
    about: Json = {"config": _plain(config), "transform": _steps(transform)}
    about |= {"memory_format": "channels_last"} if memory is torch.channels_last else {}
    weights = digest_module(module)
    architecture = _architecture(module, spec)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: Any = freeze(module, spec, device).to(memory_format=memory)
    states = _states(frozen, spec, memory)

    def encoder(cut: EncoderSpec, layer: State) -> ImageEncoder:
        _require_tokens(frozen, cut)
        preprocess, backend = image_preprocess(
            cut,
            reference=transform,
            backend="timm-pil",
            faster=resize_of(config),
        )
        inputs = {
            **about,
            **backend,
            "pooling": "model" if cut.pooling == "default" else cut.pooling,
        }
        inputs |= {} if layer == "end" else {"layer": layer}
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
        )
        tap = Tap(
            states=states,
            state="own" if cut.pooling == "default" else layer,
            pool=_pool(frozen, cut),
        )
        shape = (3, height, width)
        return ImageEncoder(
            spec=cut,
            module=frozen,
            preprocess=preprocess,
            forward=tap,
            input_shape=shape,
            row_shape=probe(tap, shape=shape, spec=cut, device=device),
            fingerprint=fingerprint,
            device=device,
        )

    return [encoder(*both) for both in zip(specs, layers, strict=True)]


def _transform(module: Any, spec: EncoderSpec) -> tuple[dict[str, Any], Any]:
    """timm's configuration of the data, and its transform."""
    config = resolve_model_data_config(module)
    if spec.resolution:
        config["input_size"] = (3, spec.resolution, spec.resolution)
    return config, create_transform(**config, is_training=False)


def timm_preprocess(spec: EncoderSpec) -> Preprocess:
    """What `load_timm` preprocesses with. Raises EncoderError as it does."""
    config, transform = _transform(_shape(spec), spec)
    return image_preprocess(
        spec,
        reference=transform,
        backend="timm-pil",
        faster=resize_of(config),
    )[0]


def shape_timm(spec: EncoderSpec, device: str = "meta") -> Any:
    """The architecture without classifier: on the meta device without weights, on another with
    random ones. Raises EncoderError as `load_timm` does."""
    return _shape(spec, device, num_classes=0)


def count_timm_classes(spec: EncoderSpec) -> int:
    """Of the classifier that belongs to the weights, which are not read. Raises EncoderError as
    `load_timm` does."""
    return int(_shape(spec).num_classes)


def _shape(spec: EncoderSpec, device: str = "meta", **options: Any) -> Any:
    size: dict[str, Any] = {"img_size": spec.resolution} if spec.resolution else {}
    if not spec.folder:
        _require_known(spec)
    name = f"local-dir:{spec.folder}" if spec.folder else spec.name
    try:
        with torch.device(device):
            return timm.create_model(name, pretrained=False, **size, **options)
    except Exception as error:  # as in _create
        raise EncoderError(f"encoder {spec}: {_one_line(error)}") from error


def timm_classifier(spec: EncoderSpec) -> torch.nn.Module:
    """The classifier that `load_timm` takes off. Raises EncoderError if there is none."""
    classifier: torch.nn.Module = _create_whole(spec).get_classifier()
    if not isinstance(classifier, torch.nn.Linear):
        raise EncoderError(
            f"encoder {spec}: these weights have no linear classifier; choose a supervised teacher"
        )
    return classifier.float().requires_grad_(False)


def _create(spec: EncoderSpec) -> Any:
    """The model, loaded with its classifier, which is then taken off: asked for a model without
    one, timm accepts weights that lack other parameters too, and leaves those random."""
    module = _create_whole(spec)
    module.reset_classifier(0)
    return module


def _create_whole(spec: EncoderSpec) -> Any:
    try:
        if not spec.folder:
            _require_known(spec)
        return _pretrained(
            f"local-dir:{spec.folder}" if spec.folder else _hub_name(spec),
            spec.resolution,
        )
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
    return timm.create_model(
        name,
        pretrained=True,
    )  # convolutional networks take any size and have no `img_size`


def _hub_name(spec: EncoderSpec) -> str:
    if not spec.revision:
        return spec.name
    config = timm.get_pretrained_cfg(spec.name)
    if config is None or not config.hf_hub_id:
        raise EncoderError(
            f"encoder {spec}: these weights do not come from a hub, so they have no revision; "
            "leave @ off"
        )
    repository = (
        config.hf_hub_id
        if config.hf_hub_id.count("/") and not config.hf_hub_id.endswith("/")
        else None
    )
    return f"hf-hub:{repository or config.hf_hub_id + spec.name}@{spec.revision}"


def _require_known(spec: EncoderSpec) -> None:
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise EncoderError(
            f"encoder {spec}: timm has no model {architecture!r}{nearest(architecture, known)}"
        )
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise EncoderError(
            f"encoder {spec}: {architecture} has no weights {tag!r}; there are "
            f"{', '.join(tags) or 'none'}"
        )


def _architecture(module: Any, spec: EncoderSpec) -> Json:
    """What the weights do not show: the same ones under another pooling or other arguments give
    other features."""
    name = str(getattr(module, "default_cfg", {}).get("architecture") or type(module).__name__)
    pool = getattr(module, "global_pool", None) or getattr(
        getattr(module, "head", None),
        "global_pool",
        None,
    )
    saved = json.loads((spec.folder / "config.json").read_text()) if spec.folder else {}
    return {
        "class": name,
        "pool": str(getattr(pool, "pool_type", pool)),
        "arguments": saved.get("model_args") or {},
    }


def memory_format(module: Any) -> torch.memory_format:
    """Channels last for convolutional networks: a third faster on a CPU, and what tensor cores
    want; contiguous for transformers, whose one convolution does not care."""
    n_convolutions = sum(isinstance(part, torch.nn.Conv2d) for part in module.modules())
    return torch.channels_last if n_convolutions > N_PATCH_CONVOLUTIONS else torch.contiguous_format


def _states(module: Any, spec: EncoderSpec, memory: torch.memory_format) -> States:
    def states(inputs: tuple[Tensor, ...], wanted: Collection[State]) -> dict[State, Tensor]:
        pixels = inputs[0].contiguous(memory_format=memory)
        end, found = caught(
            module,
            spec=spec,
            states=wanted,
            run=lambda: module.forward_features(pixels),
        )
        found["end"] = end
        return {**found, "own": module.forward_head(end)} if "own" in wanted else found

    return states


def _require_tokens(module: Any, spec: EncoderSpec) -> None:
    has_cls = int(getattr(module, "num_prefix_tokens", 0)) and getattr(
        module,
        "has_class_token",
        True,
    )
    if spec.pooling in ("cls", "cls+mean") and not has_cls:
        raise EncoderError(f"encoder {spec} has no CLS token; use --image-cut default or mean")


def _pool(module: Any, spec: EncoderSpec) -> Callable[[Tensor, Tensor | None], Tensor]:
    """timm's own pooling, or over tokens without the prefix ones; maps of convolutional networks
    count as tokens."""
    if spec.pooling == "default":
        return lambda own, _: own
    prefix = int(getattr(module, "num_prefix_tokens", 0))
    channels_last = getattr(module, "output_fmt", None) == "NHWC"

    def pool(state: Tensor, _: Tensor | None) -> Tensor:
        if state.ndim == 4:
            state = (state if channels_last else state.permute(0, 2, 3, 1)).flatten(1, 2)
        return pool_tokens(state, mask=None, pooling=spec.pooling, n_prefix=prefix)

    return pool


def _steps(transform: Any) -> list[str]:
    """The resolved preprocessing step by step, free of memory addresses."""
    steps = [
        re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(step).split())) for step in transform.transforms
    ]
    return steps


def _plain(config: dict[str, Any]) -> Json:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())[:300] or type(error).__name__
    return (
        f"{message} (give a name that timm.list_models knows, or timm:/folder with a saved model)"
    )
