"""Load either tower of an open_clip model: its projected embedding.

Preprocessing and tokenizer are the model's own.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.encoders.encoder import (
    FeatureTap,
    ImageEncoder,
    TextEncoder,
    Tokens,
    freeze,
)
from apecache.encoders.fingerprint import build_fingerprint, digest_module
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.open_clip_cuts import (
    open_clip_states,
    open_clip_tap,
    require_unpadded,
    run_trimmed,
)
from apecache.encoders.open_clip_texts import (
    DEFAULT_CONTEXT,
    digest_texts,
    find_ending,
    open_library,
    open_text_tokenizer,
    tokenize_texts,
)
from apecache.encoders.preprocess import (
    Preprocess,
    TensorPreprocess,
    choose_preprocess,
    feature_shape,
)
from apecache.encoders.snapshot import (
    cannot_open,
    download,
    read_json,
    refuse_kernels,
    resolve_folder,
    true_keys,
)
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.weight_files import HUB_PREFIX, OPEN_CLIP_WEIGHTS
from apecache.errors import EncoderError, nearest
from apecache.fingerprint import Json


def load_open_clip_image(specs: Sequence[EncoderSpec], device: torch.device) -> list[ImageEncoder]:
    """Load the image tower; its default is the embedding before normalization, [n, embed_dim].

    Args:
        specs: of the same model; they differ in pooling and layer only.

    Raises:
        EncoderError: no such model or weights, or a cut that the tower does not have.
        MissingExtraError: open_clip is not installed.
    """
    spec = specs[0]
    folder = _folder(spec)
    model = _create(spec, folder)
    config = _image_config(model, spec)
    preprocess, backend = _image_preprocess(spec, config)
    shared_inputs: Json = {
        **backend,
        "config": {key: _plain(value) for key, value in sorted(config.items())},
    }
    weights = digest_module(model.visual)
    architecture = _architecture(model, spec, folder)
    visual: LibraryModel = freeze(model.visual, spec, device)
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    input_shape = (3, height, width)
    states = open_clip_states(visual, spec, visual)

    def encoder(cut: EncoderSpec) -> ImageEncoder:
        tap = open_clip_tap(states, visual, cut)
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs={**shared_inputs, **_cut_inputs(cut, tap)},
        )
        row_shape = feature_shape(tap, shape=input_shape, spec=cut, device=device)
        return ImageEncoder(
            spec=cut,
            module=visual,
            preprocess=preprocess,
            forward=tap,
            input_shape=input_shape,
            row_shape=row_shape,
            fingerprint=fingerprint,
            device=device,
        )

    return [encoder(cut) for cut in specs]


def _cut_inputs(cut: EncoderSpec, tap: FeatureTap) -> dict[str, Json]:
    """Return what the fingerprint says of a cut; nothing of the model's own output."""
    if cut.pooling == "default":
        return {}
    layer = {} if tap.state == "end" else {"layer": tap.state}
    return {"pooling": cut.pooling, **layer}


def load_open_clip_text(specs: Sequence[EncoderSpec], device: torch.device) -> list[TextEncoder]:
    """Load the text tower; its default is the embedding before normalization, [n, embed_dim].

    Raises as `load_open_clip_image` does.
    """
    spec = specs[0]
    folder = _folder(spec)
    tokenizer = open_text_tokenizer(spec, folder, _text_config(spec, folder))
    model = _create(spec, folder)
    # Of a tower from transformers the model names all its positions, which no training used.
    context = int(tokenizer.context_length)
    if spec.max_tokens and spec.max_tokens != context:
        raise EncoderError(
            f"encoder {spec}: its context is {context} tokens; leave --max-tokens off"
        )
    tower = model.text
    ending = find_ending(tower)
    require_unpadded(specs, sees_padding=ending.by is None)
    prefix = spec.prefix or ""
    shared_inputs: Json = {
        "tokenizer": digest_texts(tokenizer),
        "max_tokens": context,
        "pooling": "default",
    }
    shared_inputs |= {"prefix": prefix} if prefix else {}
    weights = digest_module(tower)
    architecture = _architecture(model, spec, folder)
    frozen: LibraryModel = freeze(tower, spec, device)

    def tokenize(texts: Sequence[str]) -> Tokens:
        prefixed = [prefix + text for text in texts]
        return tokenize_texts(tokenizer, prefixed, context, ending)

    is_trimmed = ending.by in ("argmax", "eos")
    states = open_clip_states(frozen, spec, run_trimmed(frozen) if is_trimmed else frozen)

    def encoder(cut: EncoderSpec) -> TextEncoder:
        tap = open_clip_tap(states, frozen, cut)
        ids = torch.tensor(tokenize(["a"]).ids, device=device)
        with torch.no_grad():
            width = int(tap(ids, torch.ones_like(ids)).shape[-1])
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs={**shared_inputs, **_cut_inputs(cut, tap)},
        )
        return TextEncoder(
            spec=cut,
            module=frozen,
            tokenize=tokenize,
            forward=tap,
            pad_id=ending.pad_id,
            max_tokens=context,
            row_shape=(context, width) if cut.pooling == "tokens" else (width,),
            fingerprint=fingerprint,
            device=device,
            length=None if ending.by else context,
        )

    return [encoder(cut) for cut in specs]


def shape_open_clip(spec: EncoderSpec, device: str = "meta") -> Any:
    """Build one tower without its weights: none on the meta device, else random ones.

    Raises EncoderError as `load_open_clip_image` does.
    """
    model = _build(spec, device)
    return model.visual if spec.modality == "image" else model.text


def shape_size(spec: EncoderSpec) -> tuple[int, int]:
    """Return (height, width) of the pixels that the model's preprocessing gives."""
    size = _image_config(_build(spec, "meta"), spec)["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def shape_features(spec: EncoderSpec, module: LibraryModel) -> Callable[..., Tensor]:
    """Return what extraction takes of a shape: (pixels,) or (ids, mask) -> features."""
    if spec.modality == "image":
        return open_clip_tap(open_clip_states(module, spec, module), module, spec)
    if find_ending(module).by == "padding" and next(module.parameters()).is_meta:
        raise EncoderError(
            f"encoder {spec}: its text tower is a model of transformers, which needs values to "
            "run; plan with that model as hf:"
        )
    context = getattr(module, "context_length", None) or DEFAULT_CONTEXT

    def run(ids: Tensor) -> Any:
        # A shape is counted and timed at the whole context, whichever texts there are.
        return module(torch.nn.functional.pad(ids, (0, context - ids.shape[1])))

    return open_clip_tap(open_clip_states(module, spec, run), module, spec)


def open_clip_preprocess(spec: EncoderSpec) -> Preprocess:
    """Return the preprocessing of `load_open_clip_image`. Raises EncoderError as it does."""
    preprocess, _ = _image_preprocess(spec, _image_config(_build(spec, "meta"), spec))
    return preprocess


def _image_config(model: LibraryModel, spec: EncoderSpec) -> dict[str, Any]:
    config: dict[str, Any] = dict(model.visual.preprocess_cfg)
    if spec.resolution:
        config["size"] = spec.resolution
    return config


def _image_preprocess(spec: EncoderSpec, config: dict[str, Any]) -> tuple[Preprocess, Json]:
    """Return the preprocessing, and how its fingerprint names it."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return choose_preprocess(
        spec,
        reference=image_transform_v2(PreprocessCfg(**config), is_train=False),
        backend="open-clip-pil",
        tensor_form=read_tensor_form(config),
    )


def _folder(spec: EncoderSpec) -> Path | None:
    """Return the folder of a saved model or of a hub repository; None for a name of open_clip's.

    Raises:
        EncoderError: as `resolve_folder`; or its configuration asks for code of a repository.
    """
    if spec.folder is None and not spec.name.startswith(HUB_PREFIX):
        return None
    repository = spec.name.removeprefix(HUB_PREFIX)
    folder = resolve_folder(spec, OPEN_CLIP_WEIGHTS, repository=repository)
    described = read_json(folder / "open_clip_config.json", spec)
    if not described:
        raise EncoderError(
            f"encoder {spec} has no open_clip_config.json, so it is not an open_clip model; "
            "choose another library"
        )
    if any(true_keys(described, "trust_remote_code")):
        raise EncoderError(
            f"encoder {spec}: open_clip_config.json asks for Python code of a repository, which "
            "apecache never runs; choose another model"
        )
    return folder


def _create(spec: EncoderSpec, folder: Path | None) -> LibraryModel:
    """Load the whole model in evaluation mode."""
    inner_name = _text_config(spec, folder).get("hf_model_name")
    if inner_name:
        inner_folder = Path(inner_name)
        if not inner_folder.is_dir():
            inner_folder = download(spec, repository=inner_name)
        refuse_kernels(spec, inner_folder)
    return _open(spec, _source(spec, folder), require_pretrained=True)


def _build(spec: EncoderSpec, device: str) -> Any:
    """Build the whole model without weights."""
    source = {**_source(spec, _folder(spec)), "pretrained": None}
    # open_clip warns that the weights are random, which they are meant to be.
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with torch.device(device):
            return _open(
                spec,
                source,
                device=device,
                load_weights=False,
                pretrained_text=False,
            )
    finally:
        logging.disable(previous)


def _source(spec: EncoderSpec, folder: Path | None) -> dict[str, Any]:
    """Return the name of the model and of its weights, as open_clip takes them."""
    if folder is not None:
        return {"model_name": f"local-dir:{folder}"}
    if spec.revision:
        raise EncoderError(
            f"encoder {spec}: a tag of open_clip names one revision; leave @ off, or take "
            "open_clip:hf-hub:ORG/NAME@REVISION"
        )
    name, _, tag = spec.name.partition("/")
    _require_known(spec, name=name, tag=tag, open_clip=open_library())
    return {"model_name": name, "pretrained": tag}


def _open(spec: EncoderSpec, source: dict[str, Any], **options: Any) -> LibraryModel:
    open_clip = open_library()
    try:
        with _asking_nobody():
            # As a separate tower the text side takes batches shorter than its context.
            model = open_clip.create_model(
                **source,
                **options,
                force_custom_text=True,
                force_image_size=spec.resolution,
            )
    except Exception as error:  # open_clip raises what its hub client, torch and json raise
        raise cannot_open(spec, error) from error
    return model.eval()


@contextmanager
def _asking_nobody() -> Iterator[None]:
    """Make transformers refuse code of a repository, in place of asking on standard input.

    open_clip opens text towers of transformers without saying that their code is not trusted.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def _require_known(spec: EncoderSpec, name: str, tag: str, open_clip: Any) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tags:
        suggestion = nearest(name, open_clip.list_models())
        raise EncoderError(
            f"encoder {spec}: open_clip has no pretrained model {name!r}{suggestion}"
        )
    if tag not in tags:
        raise EncoderError(
            f"encoder {spec}: give NAME/TAG; the tags of {name} are {', '.join(tags)}"
        )


def _described(spec: EncoderSpec, folder: Path | None) -> Json:
    """Return the model's configuration; empty for a name without one."""
    if folder is not None:
        return read_json(folder / "open_clip_config.json", spec).get("model_cfg") or {}
    return open_library().get_model_config(spec.name.partition("/")[0]) or {}


def _text_config(spec: EncoderSpec, folder: Path | None) -> dict[str, Any]:
    config: dict[str, Any] = _described(spec, folder).get("text_cfg") or {}
    return config


def _architecture(model: LibraryModel, spec: EncoderSpec, folder: Path | None) -> Json:
    """Return the class and what the weights do not show: the model's configuration, if known."""
    described = _described(spec, folder) or {"name": spec.name}
    return {"class": type(model).__name__, "config": described}


def read_tensor_form(config: dict[str, Any]) -> TensorPreprocess | None:
    """Return the preprocessing on tensors; None unless it is a square crop of the short side."""
    size = config["size"]
    if isinstance(size, int):
        side = size
    elif size[0] == size[1]:
        side = size[0]
    else:
        side = None
    if side is None or config.get("resize_mode", "shortest") != "shortest":
        return None
    return TensorPreprocess(
        edge=side,
        crop=(side, side),
        interpolation=config.get("interpolation", "bicubic"),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _plain(value: Any) -> Json:
    return list(value) if isinstance(value, tuple) else value
