"""Load transformers encoders: BERT-like and T5 text towers, and vision transformers."""

import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    MT5EncoderModel,
    SiglipVisionModel,
    T5EncoderModel,
)
from transformers.utils import logging

from apecache.encoders.encoder import (
    FeatureTap,
    ImageEncoder,
    State,
    TextEncoder,
    Tokens,
    build_fingerprint,
    digest_module,
    freeze,
    pool_tokens,
)
from apecache.encoders.layers import caught, resolve_layer
from apecache.encoders.preprocess import Preprocess, image_preprocess, probe
from apecache.encoders.spec import EncoderSpec, Pooling
from apecache.encoders.tower import count_positions
from apecache.errors import EncoderError, nearest
from apecache.fingerprint import IMAGE_DECODING, Json, content_hash

VISION_TYPES = (
    "beit",
    "data2vec-vision",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "ijepa",
    "vit",
)
SIGLIP_TYPES = {"siglip": SiglipVisionModel, "siglip_vision_model": SiglipVisionModel}
T5_TYPES = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}
FIXED_SIZE_TYPES = ("deit", "ijepa", "vit")  # interpolate positions only when asked to
N_CLASS_TOKENS = {"deit": 2, "ijepa": 0, "siglip_vision_model": 0}  # all others have one
NOT_IDENTITY = (
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "id2label",
    "label2id",
)
WELL_KNOWN = (
    "bert-base-uncased",
    "facebook/dino-vitb16",
    "facebook/dinov2-base",
    "facebook/dinov2-small",
    "google-bert/bert-base-multilingual-cased",
    "google/vit-base-patch16-224",
    "intfloat/multilingual-e5-small",
    "princeton-nlp/unsup-simcse-bert-base-uncased",
    "roberta-base",
    "sentence-transformers/all-MiniLM-L6-v2",
    "sentence-transformers/all-mpnet-base-v2",
)
"""Only to suggest a name when one cannot be found."""


def load_transformers_text(specs: Sequence[EncoderSpec], device: torch.device) -> list[TextEncoder]:
    """Load one encoder for each spec; all share one model.

    Args:
        specs: of the same model; they differ in pooling and layer only.

    Raises:
        EncoderError: not found, not a text encoder, or weights that miss parts of the model.
    """
    spec = specs[0]
    config = _config(spec)
    t5 = config.model_type in T5_TYPES
    has_decoder = getattr(config, "is_encoder_decoder", False)
    if not t5 and (has_decoder or hasattr(config, "vision_config")):
        raise EncoderError(
            f"encoder {spec}: {config.model_type} is no single text encoder; BERT-like models "
            "and T5 are supported"
        )
    tokenizer = _open(AutoTokenizer, spec)
    if not getattr(tokenizer, "is_fast", False):
        raise EncoderError(
            f"encoder {spec}: its tokenizer has no tokenizer.json, so it cannot be fingerprinted"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise EncoderError(
            f"encoder {spec}: its tokenizer knows no words; save it beside the model"
        )
    factory = T5_TYPES[config.model_type] if t5 else AutoModel
    module, unloaded = _load_model(spec, factory)
    max_tokens = _max_tokens(spec, tokenizer, config)
    prefix = text_prefix(spec)
    shared_inputs: Json = {"tokenizer": digest_tokenizer(tokenizer), "max_tokens": max_tokens}
    shared_inputs |= {"prefix": prefix} if prefix else {}
    weights = digest_module(module, unloaded)
    architecture = _architecture(module, spec)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: Any = freeze(module, spec, device)

    def states(inputs: tuple[Tensor, ...], requested: Collection[State]) -> dict[State, Tensor]:
        ids, mask = inputs
        output, tokens_by_state = caught(
            frozen,
            spec=spec,
            states=requested,
            run=lambda: frozen(input_ids=ids, attention_mask=mask),
        )
        return {**tokens_by_state, "end": output.last_hidden_state}

    def tokenize(texts: Sequence[str]) -> Tokens:
        prefixed = [prefix + text for text in texts] if prefix else texts
        return tokenize_with(tokenizer, prefixed, max_tokens)

    def encoder(cut: EncoderSpec, layer: State) -> TextEncoder:
        pooling = _text_pooling(cut)
        if t5 and "cls" in pooling:
            raise EncoderError(f"encoder {cut}: T5 has no CLS token; use --text-cut mean")
        inputs: Json = {**shared_inputs, "pooling": pooling}
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
            state=layer,
            pool=lambda state, mask: pool_tokens(state, mask, pooling),
        )
        n_vectors = 2 if pooling == "cls+mean" else 1
        width = int(config.hidden_size) * n_vectors
        row_shape = (max_tokens, width) if pooling == "tokens" else (width,)
        pad_id = int(tokenizer.pad_token_id or 0)
        return TextEncoder(
            spec=cut,
            module=frozen,
            tokenize=tokenize,
            forward=tap,
            pad_id=pad_id,
            max_tokens=max_tokens,
            row_shape=row_shape,
            fingerprint=fingerprint,
            device=device,
        )

    return [encoder(cut, layer) for cut, layer in zip(specs, layers, strict=True)]


def text_prefix(spec: EncoderSpec) -> str:
    """Return what stands before every text: the spec's prefix, else the model's."""
    name = spec.folder.resolve().name if spec.folder else spec.name.rpartition("/")[2]
    # E5 models were trained with this prefix, but their files do not say so.
    is_e5 = re.match(r"(multilingual-)?e5-", name.lower())
    model_prefix = "query: " if is_e5 else ""
    return model_prefix if spec.prefix is None else spec.prefix


def load_transformers_image(
    specs: Sequence[EncoderSpec],
    device: torch.device,
) -> list[ImageEncoder]:
    """Load one encoder for each spec; all share one model.

    Default pooling: SigLIP's own, else the CLS token, else (where there is none) the mean of the
    patch tokens.

    Args:
        specs: of the same model; they differ in pooling and layer only.

    Raises:
        EncoderError: not found, not a vision transformer, or weights that miss parts of the model.
    """
    spec = specs[0]
    config = _config(spec)
    siglip = config.model_type in SIGLIP_TYPES
    if siglip:
        config = getattr(config, "vision_config", config)
    elif config.model_type not in VISION_TYPES:
        supported = ", ".join((*VISION_TYPES, *SIGLIP_TYPES))
        raise EncoderError(
            f"encoder {spec}: {config.model_type} is not supported as an image encoder; "
            f"supported are {supported}"
        )
    processor: Any = _open(AutoImageProcessor, spec)
    size = _resize(processor, spec.resolution)
    factory = SIGLIP_TYPES[config.model_type] if siglip else AutoModel
    module, unloaded = _load_model(spec, factory)
    reference = ProcessorPreprocess(processor=processor, size=size)
    preprocess, _ = image_preprocess(spec, reference=reference, backend="transformers", faster=None)
    shared_inputs: Json = {
        "decoding": IMAGE_DECODING,
        "processor": _plain_processor(processor, size),
    }
    weights = digest_module(module, unloaded)
    architecture = _architecture(module, spec)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: Any = freeze(module, spec, device)
    fixed_size = siglip or config.model_type in FIXED_SIZE_TYPES
    options = {"interpolate_pos_encoding": True} if spec.resolution and fixed_size else {}

    def states(inputs: tuple[Tensor, ...], requested: Collection[State]) -> dict[State, Tensor]:
        (pixels,) = inputs
        output, tokens_by_state = caught(
            frozen,
            spec=spec,
            states=requested,
            run=lambda: frozen(pixel_values=pixels, **options),
        )
        tokens_by_state["end"] = output.last_hidden_state
        if "own" in requested:
            tokens_by_state["own"] = output.pooler_output
        return tokens_by_state

    # The processor's files name its size in several ways, so an image that is not square tells it.
    probe_pixels = reference(Image.new("RGB", (640, 480)))
    height, width = probe_pixels.shape[1:]
    input_shape = (3, int(height), int(width))
    n_prefix = _n_prefix(config)

    def encoder(cut: EncoderSpec, layer: State) -> ImageEncoder:
        has_own_pooling = siglip and cut.pooling == "default"
        pooling: Pooling = "default" if has_own_pooling else _image_pooling(cut, config)
        inputs: Json = {**shared_inputs, "pooling": pooling}
        if layer != "end":
            inputs["layer"] = layer
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
        )

        def pool(state: Tensor, _: Tensor | None) -> Tensor:
            if has_own_pooling:
                return state
            return pool_tokens(state, mask=None, pooling=pooling, n_prefix=n_prefix)

        tap = FeatureTap(states=states, state="own" if has_own_pooling else layer, pool=pool)
        row_shape = probe(tap, shape=input_shape, spec=cut, device=device)
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


@dataclass(frozen=True, kw_only=True)
class ProcessorPreprocess:
    """Call the library's own image processor, with the options that give another size."""

    processor: Any
    size: dict[str, Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> float32 [3, height, width]."""
        processed = self.processor(images=image, return_tensors="pt", **self.size)
        pixels: Tensor = processed["pixel_values"][0]
        return pixels


def transformers_preprocess(spec: EncoderSpec) -> Preprocess:
    """Return the preprocessing of `load_transformers_image`. Raises EncoderError as it does."""
    processor: Any = _open(AutoImageProcessor, spec)
    size = _resize(processor, spec.resolution)
    reference = ProcessorPreprocess(processor=processor, size=size)
    preprocess, _ = image_preprocess(spec, reference=reference, backend="transformers", faster=None)
    return preprocess


def shape_transformers(spec: EncoderSpec, device: str = "meta") -> Any:
    """Build the architecture in float32; of T5, which also has a decoder, the encoder only.

    On the meta device it has no weights, on another one random weights.

    Raises:
        EncoderError: its config.json cannot be read.
    """
    config = _config(spec)
    config.dtype = torch.float32
    with torch.device(device):
        encoder_class = T5_TYPES.get(config.model_type)
        return AutoModel.from_config(config) if encoder_class is None else encoder_class(config)


def image_size(spec: EncoderSpec) -> tuple[int, int]:
    """Return (height, width) of the pixels that the encoder's own processor gives.

    Raises EncoderError if there is no processor.
    """
    processor: Any = _open(AutoImageProcessor, spec)
    size = _resize(processor, spec.resolution)
    preprocess = ProcessorPreprocess(processor=processor, size=size)
    pixels = preprocess(Image.new("RGB", (640, 480)))
    return pixels.shape[1], pixels.shape[2]


def _config(spec: EncoderSpec) -> Any:
    return _open(AutoConfig, spec)


def _open(factory: Any, spec: EncoderSpec, **options: Any) -> Any:
    source = str(spec.folder or spec.name)
    try:
        return factory.from_pretrained(source, revision=spec.revision or "main", **options)
    except Exception as error:  # the libraries below share no base class of errors
        lines = (line for line in str(error).splitlines() if line.strip())
        first_line = next(lines, type(error).__name__)
        suggestion = nearest(spec.name, WELL_KNOWN)
        raise EncoderError(
            f"encoder {spec} cannot be opened ({first_line.strip()}){suggestion} Or give hf:/folder"
        ) from error


def _load_model(spec: EncoderSpec, factory: Any) -> tuple[Any, list[str]]:
    """Load the model in float32.

    Returns:
        The model, and the sorted names of its parameters that the files do not hold.

    Raises:
        EncoderError: a parameter is missing or has another shape. Only an unused pooler may be
            missing.
    """
    # Without ignore_mismatched_sizes transformers raises an error of its own at the first one.
    with _quiet(local=spec.folder is not None):
        module, report = _open(
            factory,
            spec,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    missing = sorted(report["missing_keys"])
    lost = [name for name in missing if "pooler" not in name]
    lost += [name for name, *_ in report["mismatched_keys"]]
    if lost:
        raise EncoderError(
            f"encoder {spec}: its files lack {len(lost)} parameters of "
            f"{type(module).__name__}: {lost[0]}, …"
        )
    return module, missing


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """Silence the library's report of unused weights, and its progress bar for a local folder."""
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _text_pooling(spec: EncoderSpec) -> Pooling:
    """Return the spec's pooling, else the one that the local folder names, else the masked mean.

    sentence-transformers writes the name to 1_Pooling/config.json.
    """
    if spec.pooling != "default":
        return spec.pooling
    path = spec.folder / "1_Pooling" / "config.json" if spec.folder else None
    if path and path.is_file():
        return _pooling_of(json.loads(path.read_text()), spec)
    return "mean"


def _pooling_of(config: dict[str, Any], spec: EncoderSpec) -> Pooling:
    """Read a sentence-transformers pooling file, in its newer form or its older one."""
    # The newer form has one key with a name, the older one a flag for each pooling.
    mode_name = config.get("pooling_mode")
    if mode_name in ("cls", "mean"):
        return "cls" if mode_name == "cls" else "mean"
    selected_flags: list[str] = []
    for key, value in config.items():
        if key.startswith("pooling_mode_") and value is True:
            selected_flags.append(key)
    supported_flags: dict[str, Pooling] = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
    }
    if len(selected_flags) != 1 or selected_flags[0] not in supported_flags:
        raise EncoderError(
            f"encoder {spec}: pooling {selected_flags or mode_name} is not supported; give "
            "--text-cut mean or cls"
        )
    return supported_flags[selected_flags[0]]


def _max_tokens(spec: EncoderSpec, tokenizer: Any, config: Any) -> int:
    """Return how many tokens of a text are encoded, special tokens included.

    It is the smallest of the tokenizer's limit, the model's positions, 512, and the spec's limit
    (without one: that of the folder's sentence-transformers file).

    Raises:
        EncoderError: no room is left for words.
    """
    path = spec.folder / "sentence_bert_config.json" if spec.folder else None
    saved_limit = None
    if path and path.is_file():
        saved_limit = json.loads(path.read_text()).get("max_seq_length")
    limits = [
        int(tokenizer.model_max_length),
        count_positions(config),
        512,
        spec.max_tokens or saved_limit,
    ]
    max_tokens = min(int(limit) for limit in limits if limit)
    n_special = int(tokenizer.num_special_tokens_to_add())
    if max_tokens <= n_special:
        raise EncoderError(
            f"encoder {spec}: {max_tokens} tokens leave no room for words beside {n_special} "
            "special ones"
        )
    return max_tokens


def tokenize_with(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Tokens:
    """Tokenize texts, cut to `max_tokens`, and count those that were cut."""
    if not texts:
        return Tokens(ids=[], n_truncated=0)
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens, verbose=False)
    ids = encoded["input_ids"]
    # A full row may just fit, so the few full ones are tokenized again without truncation.
    full_texts = [text for text, row in zip(texts, ids, strict=True) if len(row) == max_tokens]
    n_truncated = 0
    if full_texts:
        untruncated = tokenizer(full_texts, truncation=False, verbose=False)
        n_truncated = sum(len(row) > max_tokens for row in untruncated["input_ids"])
    return Tokens(ids=ids, n_truncated=n_truncated)


def digest_tokenizer(tokenizer: Any) -> str:
    """Hash the tokenizer's content."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls switch truncation and padding on and off: they say nothing about the tokenizer.
    switched = ("truncation", "padding")
    identity = {key: value for key, value in content.items() if key not in switched}
    return content_hash(json.dumps(identity, sort_keys=True, ensure_ascii=False))


def _architecture(module: Any, spec: EncoderSpec) -> Json:
    """Return the class and the settings of config.json.

    The same weights with another number of heads give other features.
    """
    settings, _ = module.config.get_config_dict(
        str(spec.folder or spec.name),
        revision=spec.revision or "main",
    )
    identity = {key: settings[key] for key in sorted(settings) if key not in NOT_IDENTITY}
    return {"class": type(module).__name__, **identity}


def _image_pooling(spec: EncoderSpec, config: Any) -> Pooling:
    """Return the spec's pooling; the default is CLS, or the mean where there is no CLS token."""
    has_class = N_CLASS_TOKENS.get(config.model_type, 1) > 0
    if "cls" in spec.pooling and not has_class:
        raise EncoderError(f"encoder {spec} has no CLS token; use --image-cut default or mean")
    if spec.pooling != "default":
        return spec.pooling
    return "cls" if has_class else "mean"


def _resize(processor: Any, resolution: int | None) -> dict[str, Any]:
    """Return the call options for `resolution` x `resolution` pixels, at the same crop ratio."""
    if resolution is None:
        return {}
    side = {"height": resolution, "width": resolution}
    if not getattr(processor, "do_center_crop", False):
        return {"size": side}
    crop_edge = processor.crop_size["height"]
    resize_edge = processor.size.get("shortest_edge", processor.size.get("height", crop_edge))
    # The same share of the image is cropped away as at the processor's own resolution.
    new_edge = round(resize_edge * resolution / crop_edge)
    return {"size": {"shortest_edge": new_edge}, "crop_size": side}


def _plain_processor(processor: Any, size: dict[str, Any]) -> Json:
    """Return the processor's settings without names of files and of the library's version."""
    settings = {**json.loads(processor.to_json_string()), **size}
    left_out = (
        "_processor_class",
        "processor_class",
        "feature_extractor_type",
        "transformers_version",
    )
    identity = {key: settings[key] for key in sorted(settings) if key not in left_out}
    return {"class": type(processor).__name__, **identity}


def _n_prefix(config: Any) -> int:
    """Count the tokens before the first patch: class and register tokens."""
    n_class_tokens = N_CLASS_TOKENS.get(config.model_type, 1)
    return n_class_tokens + int(getattr(config, "num_register_tokens", 0))
