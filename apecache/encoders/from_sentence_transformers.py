"""Load sentence-transformers models, with all of their modules and prompts."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from apecache.encoders.encoder import (
    FeatureTap,
    ImageEncoder,
    State,
    States,
    TextEncoder,
    Tokens,
    freeze,
)
from apecache.encoders.fingerprint import build_fingerprint, digest_module
from apecache.encoders.from_transformers import (
    NO_LIMIT,
    SIGLIP_TEXT,
    UNKNOWN_LENGTH,
    plain_processor,
)
from apecache.encoders.library_types import LibraryModel, Tokenizer
from apecache.encoders.preprocess import Preprocess, image_preprocess, probe
from apecache.encoders.processor import ProcessorPreprocess, fixed_shape
from apecache.encoders.snapshot import cannot_open, read_modules, refuse_code, resolve_folder
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tokenizing import digest_tokenizer, tokenize_with
from apecache.encoders.tower import count_positions
from apecache.encoders.transformers_files import open_saved
from apecache.errors import EncoderError, MissingExtraError
from apecache.fingerprint import IMAGE_DECODING, Json, Modality

WEIGHT_FILES = (
    ("model.safetensors", "model-*.safetensors", "0_*/model*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*.bin", "0_*/pytorch_model*.bin"),
)
MODULE_FILES = ("[1-9]*_*/*",)
"""Everything of the modules after the transformer."""


def load_sentence_transformers(
    specs: Sequence[EncoderSpec],
    device: torch.device,
) -> list[TextEncoder]:
    """Load the sentence embedding, [n, dim]; normalized only if the model's own modules do so.

    Raises:
        EncoderError: no such model, one that does not begin with a transformer, or a cut other than
            the model's own output.
        MissingExtraError: sentence-transformers is not installed.
    """
    (spec,) = _only_own(specs)
    folder = resolve_folder(spec, WEIGHT_FILES, MODULE_FILES)
    _require_modules(spec, folder)
    model = _open(spec, folder)
    _require_modality(spec, model, "text")
    tokenizer: Tokenizer = getattr(model, "tokenizer", None)
    if not getattr(tokenizer, "is_fast", False):
        raise EncoderError(
            f"encoder {spec}: its tokenizer has no tokenizer.json, so it cannot be fingerprinted"
        )
    max_tokens = _max_tokens(spec, model)
    if spec.prefix is not None:
        prefix = spec.prefix
    else:
        prefix = model.prompts.get(model.default_prompt_name) or ""
    inputs: Json = {
        "tokenizer": digest_tokenizer(tokenizer),
        "max_tokens": max_tokens,
        "pooling": "default",
    }
    inputs |= {"prefix": prefix} if prefix else {}
    n_prompt_tokens = _count_unpooled(model, tokenizer, prefix)
    inputs |= {"unpooled_tokens": n_prompt_tokens} if n_prompt_tokens else {}
    fingerprint = build_fingerprint(
        spec,
        weights=digest_module(model),
        architecture=_architecture(model),
        inputs=inputs,
    )
    frozen: LibraryModel = freeze(model, spec, device)

    def tokenize(texts: Sequence[str]) -> Tokens:
        prefixed = [prefix + text for text in texts]
        return tokenize_with(tokenizer, prefixed, max_tokens)

    tap = FeatureTap(
        states=_text_states(frozen, n_prompt_tokens),
        state="own",
        pool=lambda state, _: state,
    )
    encoder = TextEncoder(
        spec=spec,
        module=frozen,
        tokenize=tokenize,
        forward=tap,
        pad_id=int(tokenizer.pad_token_id or 0),
        max_tokens=max_tokens,
        row_shape=(_text_width(tap, tokenize, device),),
        fingerprint=fingerprint,
        device=device,
    )
    return [encoder]


def _text_states(module: LibraryModel, n_prompt_tokens: int) -> States:
    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        features: dict[str, Any] = {"input_ids": inputs[0], "attention_mask": inputs[1]}
        if n_prompt_tokens:
            features["prompt_length"] = n_prompt_tokens
        output = module(features)
        return {"own": output["sentence_embedding"]}

    return states


def _text_width(tap: FeatureTap, tokenize: Any, device: torch.device) -> int:
    ids = torch.tensor(tokenize(["a"]).ids, device=device)
    with torch.no_grad():
        return int(tap(ids, torch.ones_like(ids)).shape[1])


def load_sentence_transformers_image(
    specs: Sequence[EncoderSpec],
    device: torch.device,
) -> list[ImageEncoder]:
    """Load the embedding of images, [n, dim], of a model that reads images too, as CLIP.

    Raises as `load_sentence_transformers` does; EncoderError also for a model without images.
    """
    (spec,) = _only_own(specs)
    folder = resolve_folder(spec, WEIGHT_FILES, MODULE_FILES)
    _require_modules(spec, folder)
    model = _open(spec, folder)
    _require_modality(spec, model, "image")
    reference = _image_processor(spec, folder)
    input_shape = fixed_shape(reference, spec)
    preprocess, _ = image_preprocess(
        spec,
        reference=reference,
        backend="sentence-transformers",
        faster=None,
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
    row_shape = probe(tap, shape=input_shape, spec=spec, device=device)
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
    preprocess, _ = image_preprocess(
        spec,
        reference=_image_processor(spec, resolve_folder(spec)),
        backend="sentence-transformers",
        faster=None,
    )
    return preprocess


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
                f"encoder {cut}: st: gives the model's own output; for other cuts take hf:"
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
    model_type = getattr(_transformer_config(model), "model_type", "")
    if modality == "text" and model_type in SIGLIP_TEXT:
        raise EncoderError(
            f"encoder {spec}: sentence-transformers pads texts to the longest of a batch, and "
            f"{model_type} sees the padding, so a text has no fixed features; take hf:"
        )


def _transformer_config(model: LibraryModel) -> Any:
    return getattr(getattr(model[0], "auto_model", None), "config", None)


def _require_modules(spec: EncoderSpec, folder: Path) -> None:
    """Raise EncoderError unless the folder lists modules, all of them the library's own."""
    if not read_modules(folder, spec):
        raise EncoderError(
            f"encoder {spec} has no modules.json, so its sentence vector is not known; take "
            f"hf:{spec.name}"
        )
    refuse_code(spec, folder, lambda name: name.startswith("sentence_transformers."))


def _max_tokens(spec: EncoderSpec, model: LibraryModel) -> int:
    """Return the spec's limit, else the model's own, but not more than it has positions for."""
    config = _transformer_config(model)
    # An image-text model keeps the positions of its text side in a configuration of that side.
    text_config = getattr(config, "text_config", config)
    n_positions = None if text_config is None else count_positions(text_config)
    limits = [spec.max_tokens or model.max_seq_length, n_positions]
    known_limits = [int(limit) for limit in limits if limit and limit < NO_LIMIT]
    return min(known_limits, default=UNKNOWN_LENGTH)


def _count_unpooled(model: LibraryModel, tokenizer: Tokenizer, prefix: str) -> int:
    """Count the leading tokens that the pooling leaves out: a prompt's, where the model says so."""
    pools_all = all(getattr(module, "include_prompt", True) for module in model)
    if pools_all or not prefix:
        return 0
    ids = tokenizer(prefix)["input_ids"]
    # The text follows in place of the token that ends the prompt.
    return len(ids) - (1 if ids and ids[-1] in tokenizer.all_special_ids else 0)


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
    return {"class": type(module).__name__, **json_settings, **architecture}
