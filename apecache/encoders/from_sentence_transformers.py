"""Load sentence-transformers models, with all of their modules and prompts."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from apecache.encoders.encoder import (
    FeatureTap,
    ImageEncoder,
    State,
    TextEncoder,
    Tokens,
    freeze,
)
from apecache.encoders.fingerprint import build_fingerprint, digest_module
from apecache.encoders.from_transformers import (
    plain_processor,
    shape_transformers,
)
from apecache.encoders.from_transformers import shape_features as transformers_features
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.preprocess import Preprocess, choose_preprocess, feature_shape
from apecache.encoders.preprocess_transformers import ProcessorPreprocess, fixed_shape
from apecache.encoders.sentence_texts import (
    SentenceShape,
    open_sentences,
    sentence_states,
    sentence_tap,
    transformer_config,
)
from apecache.encoders.snapshot import (
    cannot_open,
    read_json,
    read_modules,
    refuse_code,
    refuse_kernels,
    resolve_folder,
)
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.text_repository import pooling_names
from apecache.encoders.transformers_files import open_saved
from apecache.encoders.transformers_texts import PROJECTED_TEXT, SIGLIP_TEXT
from apecache.encoders.weight_files import SENTENCE_WEIGHTS
from apecache.errors import EncoderError, MissingExtraError
from apecache.fingerprint import IMAGE_DECODING, Json, Modality

MODULE_FILES = ("[1-9]*_*/*",)
"""Everything of the modules after the transformer."""


def load_sentence_transformers(
    specs: Sequence[EncoderSpec],
    device: torch.device,
) -> list[TextEncoder]:
    """Load the sentence embedding, [n, dim]; normalized only if the model's own modules do so.

    Other cuts are of the tokens of its transformer.

    Args:
        specs: of the same model; they differ in pooling and layer only.

    Raises:
        EncoderError: no such model, one that does not begin with a transformer or with static word
            vectors, or a cut that it does not have.
        MissingExtraError: sentence-transformers is not installed.
    """
    spec = specs[0]
    folder = resolve_folder(spec, SENTENCE_WEIGHTS, MODULE_FILES)
    _require_modules(spec, folder)
    model = _open(spec, folder)
    _require_modality(spec, model, "text")
    prefix = spec.prefix
    if prefix is None:
        prefix = model.prompts.get(model.default_prompt_name) or ""
    texts = open_sentences(spec, model, prefix)
    weights = digest_module(model)
    architecture = _architecture(model)
    frozen: LibraryModel = freeze(model, spec, device)
    states = sentence_states(frozen, spec, texts.n_unpooled)

    def tokenize(captions: Sequence[str]) -> Tokens:
        return texts.tokenize([prefix + caption for caption in captions])

    def encoder(cut: EncoderSpec) -> TextEncoder:
        tap = sentence_tap(states, frozen, cut, texts.n_unpooled)
        ids = torch.tensor(tokenize(["a"]).ids, device=device)
        with torch.no_grad():
            width = int(tap(ids, torch.ones_like(ids)).shape[-1])
        inputs: Json = {**texts.identity, "pooling": cut.pooling}
        inputs |= {"prefix": prefix} if prefix else {}
        inputs |= {"unpooled_tokens": texts.n_unpooled} if texts.n_unpooled else {}
        inputs |= {} if tap.state in ("own", "end") else {"layer": tap.state}
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
        )
        return TextEncoder(
            spec=cut,
            module=frozen,
            tokenize=tokenize,
            forward=tap,
            pad_id=texts.pad_id,
            max_tokens=texts.max_tokens,
            row_shape=(texts.max_tokens, width) if cut.pooling == "tokens" else (width,),
            fingerprint=fingerprint,
            device=device,
        )

    return [encoder(cut) for cut in specs]


def load_sentence_transformers_image(
    specs: Sequence[EncoderSpec],
    device: torch.device,
) -> list[ImageEncoder]:
    """Load the embedding of images, [n, dim], of a model that reads images too, as CLIP.

    Raises as `load_sentence_transformers` does; EncoderError also for a model without images.
    """
    (spec,) = _only_own(specs)
    folder = resolve_folder(spec, SENTENCE_WEIGHTS, MODULE_FILES)
    _require_modules(spec, folder)
    model = _open(spec, folder)
    _require_modality(spec, model, "image")
    reference = _image_processor(spec, folder)
    input_shape = fixed_shape(reference, spec)
    preprocess, _ = choose_preprocess(
        spec,
        reference=reference,
        backend="sentence-transformers",
        tensor_form=None,
    )
    fingerprint = build_fingerprint(
        spec,
        weights=digest_module(model),
        architecture=_architecture(model),
        inputs={
            "decoding": IMAGE_DECODING,
            "processor": plain_processor(reference.processor, {}),
            "pooling": "default",
        },
    )
    frozen: LibraryModel = freeze(model, spec, device)

    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        output = frozen({"pixel_values": inputs[0], "modality": "image"})
        return {"own": output["sentence_embedding"]}

    tap = FeatureTap(states=states, state="own", pool=lambda state, _: state)
    row_shape = feature_shape(tap, shape=input_shape, spec=spec, device=device)
    encoder = ImageEncoder(
        spec=spec,
        module=frozen,
        preprocess=preprocess,
        forward=tap,
        input_shape=input_shape,
        row_shape=row_shape,
        fingerprint=fingerprint,
        device=device,
    )
    return [encoder]


def sentence_transformers_preprocess(spec: EncoderSpec) -> Preprocess:
    """Return the preprocessing of `load_sentence_transformers_image`."""
    preprocess, _ = choose_preprocess(
        spec,
        reference=_image_processor(spec, resolve_folder(spec)),
        backend="sentence-transformers",
        tensor_form=None,
    )
    return preprocess


def shape_sentence_transformers(spec: EncoderSpec, device: str = "meta") -> SentenceShape:
    """Build the transformer and the dense layers in float32, without their weights.

    Raises:
        EncoderError: the model does not begin with a transformer, or its files cannot be read.
    """
    folder = resolve_folder(spec, modules=MODULE_FILES)
    _require_modules(spec, folder)
    layers: list[torch.nn.Module] = []
    for module in read_modules(folder, spec):
        if str(module.get("type", "")).endswith(".Dense"):
            described = read_json(folder / str(module.get("path", "")) / "config.json", spec)
            with torch.device(device):
                layer = torch.nn.Linear(
                    int(described["in_features"]),
                    int(described["out_features"]),
                    bias=bool(described.get("bias", True)),
                )
            layers.append(layer)
    return SentenceShape(shape_transformers(_inner_spec(spec, folder), device), layers)


def _inner_spec(spec: EncoderSpec, folder: Path) -> EncoderSpec:
    """Name the transformer within the model as hf: does.

    Raises:
        EncoderError: the first module is none, as static word vectors.
    """
    path = str(read_modules(folder, spec)[0].get("path", ""))
    if not (folder / path / "config.json").is_file():
        raise EncoderError(
            f"encoder {spec} does not begin with a transformer, so its shape is not known; extract "
            "with it, but leave it out of plans"
        )
    return replace(spec, library="hf", name=str((folder / path).resolve()), revision=None)


def shape_features(spec: EncoderSpec, module: SentenceShape) -> Callable[..., Tensor]:
    """Return what extraction takes of a shape: (pixels,) or (ids, mask) -> features."""
    inner = _inner_spec(spec, resolve_folder(spec))
    config = module.transformer.config
    has_own = spec.modality == "image" or config.model_type in (*PROJECTED_TEXT, *SIGLIP_TEXT)
    if spec.pooling != "default":
        return transformers_features(inner, module.transformer)
    # Every pooling of words has the width and about the cost of the mean.
    pooled_spec = inner if has_own else replace(inner, pooling="mean")
    pool = transformers_features(pooled_spec, module.transformer)
    n_poolings = 1 if has_own else _count_poolings(spec, resolve_folder(spec))

    def features(*inputs: Tensor) -> Tensor:
        pooled = pool(*inputs)
        # Several poolings stand side by side.
        pooled = torch.cat([pooled] * n_poolings, dim=-1)
        for layer in module.layers:
            pooled = layer(pooled)
        return pooled

    return features


def _count_poolings(spec: EncoderSpec, folder: Path) -> int:
    """Count the poolings of words that a model puts side by side."""
    for module in read_modules(folder, spec):
        if str(module.get("type", "")).endswith(".Pooling"):
            described = read_json(folder / str(module.get("path", "")) / "config.json", spec)
            return max(1, len(pooling_names(described)))
    return 1


def shape_size(spec: EncoderSpec) -> tuple[int, int]:
    """Return (height, width) of the pixels that the model's processor gives."""
    _, height, width = fixed_shape(_image_processor(spec, resolve_folder(spec)), spec)
    return height, width


def _image_processor(spec: EncoderSpec, folder: Path) -> ProcessorPreprocess:
    if spec.resolution:
        raise EncoderError(
            f"encoder {spec}: st: gives images of the model's own size; leave --resolution off, or "
            "take hf:"
        )
    modules = read_modules(folder, spec)
    first_folder = folder / str(modules[0].get("path", "")) if modules else folder
    processor = open_saved(AutoImageProcessor, spec, first_folder)
    return ProcessorPreprocess(processor=processor, size={})


def _only_own(specs: Sequence[EncoderSpec]) -> Sequence[EncoderSpec]:
    """Return the specs unchanged; refuse a cut other than the model's own output."""
    for cut in specs:
        if cut.pooling != "default" or cut.layer is not None:
            raise EncoderError(
                f"encoder {cut}: st: gives images by the model's own output; for other cuts take "
                "hf:"
            )
    return specs


def _require_modality(spec: EncoderSpec, model: LibraryModel, modality: Modality) -> None:
    """Refuse a model that does not read the modality, or reads it in another form.

    Raises:
        EncoderError: as said.
    """
    # Older modules, such as a bag of words, read texts only.
    config = getattr(model[0], "modality_config", {"text": {}})
    if "message" in config:
        raise EncoderError(
            f"encoder {spec} reads {modality}s within a chat template, which apecache does not "
            "follow; choose another model"
        )
    if modality not in config:
        names = ", ".join(str(name) for name in config)
        raise EncoderError(f"encoder {spec} reads no {modality}s; it reads {names}")
    model_type = getattr(transformer_config(model), "model_type", "")
    if modality == "text" and model_type in SIGLIP_TEXT:
        raise EncoderError(
            f"encoder {spec}: sentence-transformers pads texts to the longest of a batch, and "
            f"{model_type} sees the padding, so a text has no fixed features; take hf:"
        )


def _require_modules(spec: EncoderSpec, folder: Path) -> None:
    """Raise EncoderError unless the folder lists modules, all of them the library's own."""
    if not read_modules(folder, spec):
        raise EncoderError(
            f"encoder {spec} has no modules.json, so its sentence vector is not known; take "
            f"hf:{spec.name}"
        )
    refuse_kernels(spec, folder)
    refuse_code(spec, folder, lambda name: name.startswith("sentence_transformers."))


def _open(spec: EncoderSpec, folder: Path) -> LibraryModel:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtraError("sentence_transformers", "sentence-transformers") from None
    try:
        return SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    except Exception as error:  # safetensors and transformers share no base class of errors
        raise cannot_open(spec, error) from error


def _architecture(model: LibraryModel) -> Json:
    """Return every module with its settings.

    The same weights under another pooling give other features.
    """
    return [_described(module) for module in model]


def _described(module: LibraryModel) -> Json:
    """Return one module's class, its settings as plain JSON, and its transformer's shape."""
    settings = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
    # How the files were opened is no property of the features.
    opening_keys = ("model_args", "tokenizer_args")
    own_settings = {key: value for key, value in settings.items() if key not in opening_keys}
    json_settings = json.loads(json.dumps(own_settings, default=str))
    transformer = getattr(module, "auto_model", None)
    config = getattr(transformer, "config", None)
    architecture: dict[str, Any] = {}
    if config:
        n_heads = getattr(config, "num_attention_heads", 0)
        architecture = {"model_type": config.model_type, "heads": n_heads}
    for side in ("text_config", "vision_config"):
        if hasattr(config, side):
            architecture[side] = int(getattr(config, side).num_attention_heads)
    return {"class": type(module).__name__, **json_settings, **architecture}
