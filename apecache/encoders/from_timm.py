"""Load timm image encoders without classifier, with timm's own reference preprocessing (PIL)."""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from apecache.encoders.encoder import FeatureTap, ImageEncoder, State, States, freeze, pool_tokens
from apecache.encoders.fingerprint import build_fingerprint, digest_module
from apecache.encoders.layers import caught, flatten_map, resolve_layer
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.preprocess import (
    Preprocess,
    choose_preprocess,
    feature_shape,
    timm_tensor_form,
)
from apecache.encoders.snapshot import read_json, resolve_folder
from apecache.encoders.spec import EncoderSpec, no_class_token
from apecache.encoders.weight_files import HUB_PREFIX, TIMM_WEIGHTS
from apecache.errors import EncoderError, nearest
from apecache.fingerprint import Json

N_PATCH_CONVOLUTIONS = 4
"""Most convolutions of a transformer: its patch embedding, or a small stem."""


def load_timm(specs: Sequence[EncoderSpec], device: torch.device) -> list[ImageEncoder]:
    """Load one encoder for each spec; all share one model.

    Args:
        specs: of the same model; they differ in pooling and layer only.

    Raises:
        EncoderError: an unknown architecture, a hub that cannot be reached, weights that do not
            fit.
    """
    spec = specs[0]
    module = _create(spec)
    config, transform = _transform(module, spec)
    height, width = config["input_size"][1:]
    input_shape = (3, height, width)
    layout = memory_format(module)
    shared_inputs: Json = {"config": _plain(config), "transform": _steps(transform)}
    # The memory format chooses the kernels, and with them the last bits of the features.
    shared_inputs |= {"memory_format": "channels_last"} if layout is torch.channels_last else {}
    # Before freeze, which changes the dtype: the digest is of the weights as the files hold them.
    weights = digest_module(module)
    architecture = _architecture(module, spec)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: LibraryModel = freeze(module, spec, device).to(memory_format=layout)
    states = _states(frozen, spec, layout)

    def encoder(cut: EncoderSpec, layer: State) -> ImageEncoder:
        n_prefix = _count_prefix(frozen, states, cut, layer, input_shape)
        _require_tokens(frozen, cut, n_prefix)
        preprocess, backend = choose_preprocess(
            cut,
            reference=transform,
            backend="timm-pil",
            tensor_form=timm_tensor_form(config),
        )
        inputs = {
            **shared_inputs,
            **backend,
            "pooling": "model" if cut.pooling == "default" else cut.pooling,
        }
        if layer != "end":
            inputs["layer"] = layer
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
        )
        tap = FeatureTap(
            states=states,
            state="own" if cut.pooling == "default" else layer,
            pool=_pool(frozen, cut, n_prefix),
        )
        row_shape = feature_shape(tap, shape=input_shape, spec=cut, device=device)
        return ImageEncoder(
            spec=cut,
            module=frozen,
            preprocess=preprocess,
            forward=tap,
            input_shape=input_shape,
            row_shape=row_shape,
            fingerprint=fingerprint,
            device=device,
        )

    return [encoder(cut, layer) for cut, layer in zip(specs, layers, strict=True)]


def _transform(module: LibraryModel, spec: EncoderSpec) -> tuple[dict[str, Any], Any]:
    """Return timm's configuration of the data, and its transform."""
    config = resolve_model_data_config(module)
    if spec.resolution:
        config["input_size"] = (3, spec.resolution, spec.resolution)
    return config, create_transform(**config, is_training=False)


def timm_preprocess(spec: EncoderSpec) -> Preprocess:
    """Return the preprocessing of `load_timm`. Raises EncoderError as it does."""
    config, transform = _transform(_shape(spec), spec)
    preprocess, _ = choose_preprocess(
        spec,
        reference=transform,
        backend="timm-pil",
        tensor_form=timm_tensor_form(config),
    )
    return preprocess


def shape_timm(spec: EncoderSpec, device: str = "meta") -> LibraryModel:
    """Build the architecture without classifier.

    On the meta device it has no weights, on another one random weights. Raises EncoderError as
    `load_timm` does.
    """
    return _shape(spec, device, num_classes=0)


def shape_size(spec: EncoderSpec) -> tuple[int, int]:
    """Return (height, width) of the pixels that `timm_preprocess` gives."""
    config, _ = _transform(_shape(spec), spec)
    _, height, width = config["input_size"]
    return int(height), int(width)


def shape_features(spec: EncoderSpec, module: LibraryModel) -> Callable[..., Tensor]:
    """Return what extraction takes of a shape: (pixels,) -> features."""
    n_prefix = int(getattr(module, "num_prefix_tokens", 0))
    _require_tokens(module, spec, n_prefix)
    states = _states(module, spec, torch.contiguous_format)
    state: State = "own" if spec.pooling == "default" else "end"
    return FeatureTap(states=states, state=state, pool=_pool(module, spec, n_prefix))


def count_timm_classes(spec: EncoderSpec) -> int:
    """Count the classes of the classifier that belongs to the weights; the weights are not read.

    Raises EncoderError as `load_timm` does.
    """
    return int(_shape(spec).num_classes)


def _shape(spec: EncoderSpec, device: str = "meta", **options: Any) -> LibraryModel:
    size: dict[str, Any] = {"img_size": spec.resolution} if spec.resolution else {}
    folder = _folder(spec, weights=())
    if folder is None:
        _require_known(spec)
    name = spec.name if folder is None else f"local-dir:{folder}"
    try:
        with torch.device(device):
            return timm.create_model(name, pretrained=False, **size, **options)
    except Exception as error:  # as in _create
        raise EncoderError(f"encoder {spec}: {_one_line(error)}") from error


def timm_classifier(spec: EncoderSpec) -> torch.nn.Module:
    """Load the classifier that `load_timm` takes off. Raises EncoderError if there is none."""
    classifier: torch.nn.Module = _create_whole(spec).get_classifier()
    if not isinstance(classifier, torch.nn.Linear):
        raise EncoderError(
            f"encoder {spec}: these weights have no linear classifier; choose a supervised teacher"
        )
    return classifier.float().requires_grad_(False)


def _create(spec: EncoderSpec) -> LibraryModel:
    """Load the model without its classifier."""
    # Asked for a model without classifier, timm accepts weights that lack other parameters too,
    # and leaves those random. So the classifier is loaded first and then taken off.
    module = _create_whole(spec)
    module.reset_classifier(0)
    return module


def _create_whole(spec: EncoderSpec) -> LibraryModel:
    folder = _folder(spec, TIMM_WEIGHTS)
    try:
        if folder is None:
            _require_known(spec)
        name = _hub_name(spec) if folder is None else f"local-dir:{folder}"
        return _pretrained(name, spec.resolution)
    except EncoderError:
        raise
    except Exception as error:  # the hub client, safetensors and timm share no base class of errors
        raise EncoderError(f"encoder {spec}: {_one_line(error)}") from error


def _folder(spec: EncoderSpec, weights: Sequence[Sequence[str]]) -> Path | None:
    """Return the folder of a saved model or of a hub repository; None for a name of timm's own.

    A repository is written `hf-hub:ORG/NAME` or `ORG/NAME`, as `timm/NAME`. Raises EncoderError as
    `resolve_folder` does.
    """
    repository = spec.name.removeprefix(HUB_PREFIX)
    if spec.folder is None and "/" not in repository:
        return None
    return resolve_folder(spec, weights, repository=repository)


def _pretrained(name: str, resolution: int | None) -> Any:
    size: dict[str, Any] = {"img_size": resolution} if resolution else {}
    try:
        return timm.create_model(name, pretrained=True, **size)
    except TypeError as error:
        if not resolution or "img_size" not in str(error):
            raise
    # Convolutional networks take any size and have no `img_size`.
    return timm.create_model(name, pretrained=True)


def _hub_name(spec: EncoderSpec) -> str:
    """Return the name under which timm loads the spec's revision."""
    if not spec.revision:
        return spec.name
    config = timm.get_pretrained_cfg(spec.name)
    if config is None or not config.hf_hub_id:
        raise EncoderError(
            f"encoder {spec}: these weights do not come from a hub, so they have no revision; "
            "leave @ off"
        )
    # timm completes a hub id that is only an owner ("timm/") with the model's name.
    repository = config.hf_hub_id
    if "/" not in repository or repository.endswith("/"):
        repository += spec.name
    return f"hf-hub:{repository}@{spec.revision}"


def _require_known(spec: EncoderSpec) -> None:
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        suggestion = nearest(architecture, timm.list_models())
        raise EncoderError(f"encoder {spec}: timm has no model {architecture!r}{suggestion}")
    pretrained_names = timm.list_pretrained(f"{architecture}.*")
    tags = [name.partition(".")[2] for name in pretrained_names]
    if tag and tag not in tags:
        raise EncoderError(
            f"encoder {spec}: {architecture} has no weights {tag!r}; there are "
            f"{', '.join(tags) or 'none'}"
        )


def _architecture(module: LibraryModel, spec: EncoderSpec) -> Json:
    """Return what the weights do not show.

    The same weights under another pooling or other arguments give other features.
    """
    default_config = getattr(module, "default_cfg", {})
    name = str(default_config.get("architecture") or type(module).__name__)
    pool = getattr(module, "global_pool", None)
    if not pool:
        head = getattr(module, "head", None)
        pool = getattr(head, "global_pool", None)
    folder = _folder(spec, weights=())
    saved_config = {} if folder is None else read_json(folder / "config.json", spec)
    return {
        "class": name,
        "pool": str(getattr(pool, "pool_type", pool)),
        "arguments": saved_config.get("model_args") or {},
    }


def memory_format(module: LibraryModel) -> torch.memory_format:
    """Return the faster memory format: channels last for convolutional networks only.

    It is a third faster there on a CPU, and tensor cores need it. Transformers, which have one
    convolution, gain nothing.
    """
    n_convolutions = sum(isinstance(submodule, torch.nn.Conv2d) for submodule in module.modules())
    is_convolutional = n_convolutions > N_PATCH_CONVOLUTIONS
    return torch.channels_last if is_convolutional else torch.contiguous_format


def _states(module: LibraryModel, spec: EncoderSpec, memory: torch.memory_format) -> States:
    def states(inputs: tuple[Tensor, ...], requested: Collection[State]) -> dict[State, Tensor]:
        pixels = inputs[0].contiguous(memory_format=memory)
        end, tokens_by_state = caught(
            module,
            spec=spec,
            states=requested,
            run=lambda: module.forward_features(pixels),
            n_inputs=len(pixels),
        )
        tokens_by_state["end"] = end
        if "own" in requested:
            tokens_by_state["own"] = module.forward_head(end)
        return tokens_by_state

    return states


def _count_prefix(
    module: LibraryModel,
    states: States,
    spec: EncoderSpec,
    layer: State,
    shape: tuple[int, int, int],
) -> int:
    """Count the leading tokens that are no patches: class and register tokens.

    Some models (CaiT, XCiT, ConViT) add them after some of their blocks.
    """
    n_prefix = int(getattr(module, "num_prefix_tokens", 0))
    if spec.pooling == "default" or not isinstance(layer, int) or not n_prefix:
        return n_prefix
    parameter = next(module.parameters())
    pixels = torch.zeros(1, *shape, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        tokens_by_state = states((pixels,), (layer, "end"))
    inner = tokens_by_state[layer]
    is_without = inner.ndim == 3 and inner.shape[1] == tokens_by_state["end"].shape[1] - n_prefix
    return 0 if is_without else n_prefix


def _require_tokens(module: LibraryModel, spec: EncoderSpec, n_prefix: int) -> None:
    has_cls = n_prefix > 0 and getattr(module, "has_class_token", True)
    if spec.pooling in ("cls", "cls+mean") and not has_cls:
        raise no_class_token(f"encoder {spec}", "image")


def _pool(
    module: LibraryModel,
    spec: EncoderSpec,
    n_prefix: int,
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return timm's own pooling, or one over the tokens without the prefix tokens.

    The positions of a convolutional network's feature map count as tokens.
    """
    if spec.pooling == "default":
        return lambda pooled, _: pooled
    channels_last = getattr(module, "output_fmt", None) == "NHWC"

    def pool(state: Tensor, _: Tensor | None) -> Tensor:
        if state.ndim == 4:
            # A map holds patches alone.
            patches = flatten_map(state, channels_last)
            return pool_tokens(patches, mask=None, pooling=spec.pooling)
        return pool_tokens(state, mask=None, pooling=spec.pooling, n_prefix=n_prefix)

    return pool


def _steps(transform: Any) -> list[str]:
    """Return the resolved preprocessing step by step."""
    steps: list[str] = []
    for step in transform.transforms:
        description = " ".join(str(step).split())
        # Addresses of functions differ in every process.
        steps.append(re.sub(r" at 0x[0-9a-f]+", "", description))
    return steps


def _plain(config: dict[str, Any]) -> Json:
    """Return the configuration as JSON gives it back: with lists in place of tuples."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())[:300] or type(error).__name__
    return (
        f"{message} (give a name that timm.list_models knows, or timm:/folder with a saved model)"
    )
