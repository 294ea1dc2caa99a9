"""transformers encoders: text towers of the BERT kind and T5's, and vision transformers."""

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
    ImageEncoder,
    State,
    Tap,
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
FIXED_SIZE_TYPES = ("deit", "ijepa", "vit")  # these interpolate their positions only when told to
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
    """One encoder for each spec; the specs differ in pooling and layer only, so one model serves
    all of them.

    Raises:
        EncoderError: not found, not a text encoder, or weights that miss parts of the model.
    """
    spec = specs[0]
    config = _config(spec)
    t5 = config.model_type in T5_TYPES
    if not t5 and (
        getattr(config, "is_encoder_decoder", False) or hasattr(config, "vision_config")
    ):
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
    module, unloaded = _load_model(spec, T5_TYPES[config.model_type] if t5 else AutoModel)
    max_tokens = _max_tokens(spec, tokenizer, config)
    prefix = text_prefix(spec)
    about: Json = {"tokenizer": digest_tokenizer(tokenizer), "max_tokens": max_tokens}
    about |= {"prefix": prefix} if prefix else {}
    weights = digest_module(module, unloaded)
    architecture = _architecture(module, spec)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: Any = freeze(module, spec, device)

    def states(inputs: tuple[Tensor, ...], wanted: Collection[State]) -> dict[State, Tensor]:
        ids, mask = inputs
        out, found = caught(
            frozen,
            spec=spec,
            states=wanted,
            run=lambda: frozen(input_ids=ids, attention_mask=mask),
        )
        return {**found, "end": out.last_hidden_state}

    def tokenise(texts: Sequence[str]) -> Tokens:
        return tokenise_with(
            tokenizer,
            [prefix + text for text in texts] if prefix else texts,
            max_tokens,
        )

    def encoder(cut: EncoderSpec, layer: State) -> TextEncoder:
        pooling = _text_pooling(cut)
        if t5 and "cls" in pooling:
            raise EncoderError(f"encoder {cut}: T5 has no CLS token; use --text-cut mean")
        inputs = {**about, "pooling": pooling} | ({} if layer == "end" else {"layer": layer})
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
        )
        tap = Tap(
            states=states,
            state=layer,
            pool=lambda state, mask: pool_tokens(state, mask, pooling),
        )
        width = int(config.hidden_size) * (2 if pooling == "cls+mean" else 1)
        shape = (max_tokens, width) if pooling == "tokens" else (width,)
        pad_id = int(tokenizer.pad_token_id or 0)
        return TextEncoder(
            spec=cut,
            module=frozen,
            tokenise=tokenise,
            forward=tap,
            pad_id=pad_id,
            max_tokens=max_tokens,
            row_shape=shape,
            fingerprint=fingerprint,
            device=device,
        )

    return [encoder(*both) for both in zip(specs, layers, strict=True)]


def text_prefix(spec: EncoderSpec) -> str:
    """What stands before every text: the spec's, else `query: ` for E5 models, which were trained
    with it."""
    name = (spec.folder.resolve().name if spec.folder else spec.name.rpartition("/")[2]).lower()
    asked_for = "query: " if re.match(r"(multilingual-)?e5-", name) else ""
    return asked_for if spec.prefix is None else spec.prefix


def load_transformers_image(
    specs: Sequence[EncoderSpec],
    device: torch.device,
) -> list[ImageEncoder]:
    """One encoder for each spec; the specs differ in pooling and layer only, so one model serves
    all of them.

    Default pooling: SigLIP's own, else the CLS token, else (where there is none) the mean of the
    patch tokens.

    Raises:
        EncoderError: not found, not a vision transformer, or weights that miss parts of the model.
    """
    spec = specs[0]
    config = _config(spec)
    siglip = config.model_type in SIGLIP_TYPES
    if siglip:
        config = getattr(config, "vision_config", config)
    elif config.model_type not in VISION_TYPES:
        raise EncoderError(
            (
                f"encoder {spec}: {config.model_type} is not supported as an image encoder; "
                "supported are "
            )
            + ", ".join((*VISION_TYPES, *SIGLIP_TYPES))
        )
    processor: Any = _open(AutoImageProcessor, spec)
    size = _resize(processor, spec.resolution)
    module, unloaded = _load_model(spec, SIGLIP_TYPES[config.model_type] if siglip else AutoModel)
    reference = ProcessorPreprocess(processor=processor, size=size)
    preprocess, _ = image_preprocess(spec, reference=reference, backend="transformers", faster=None)
    about: Json = {"decoding": IMAGE_DECODING, "processor": _plain_processor(processor, size)}
    weights = digest_module(module, unloaded)
    architecture = _architecture(module, spec)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: Any = freeze(module, spec, device)
    fixed_size = siglip or config.model_type in FIXED_SIZE_TYPES
    options = {"interpolate_pos_encoding": True} if spec.resolution and fixed_size else {}

    def states(inputs: tuple[Tensor, ...], wanted: Collection[State]) -> dict[State, Tensor]:
        (pixels,) = inputs
        out, found = caught(
            frozen,
            spec=spec,
            states=wanted,
            run=lambda: frozen(pixel_values=pixels, **options),
        )
        found["end"] = out.last_hidden_state
        return {**found, "own": out.pooler_output} if "own" in wanted else found

    height, width = reference(Image.new("RGB", (640, 480))).shape[1:]

    def encoder(cut: EncoderSpec, layer: State) -> ImageEncoder:
        own = siglip and cut.pooling == "default"
        pooling: Pooling = "default" if own else _image_pooling(cut, config)
        inputs = {**about, "pooling": pooling} | ({} if layer == "end" else {"layer": layer})
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
        )
        n_prefix = _n_prefix(config)
        tap = (
            Tap(states=states, state="own", pool=lambda state, _: state)
            if own
            else Tap(
                states=states,
                state=layer,
                pool=lambda state, _: pool_tokens(
                    state,
                    mask=None,
                    pooling=pooling,
                    n_prefix=n_prefix,
                ),
            )
        )
        shape = (3, int(height), int(width))
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


@dataclass(frozen=True, kw_only=True)
class ProcessorPreprocess:
    """The library's own image processor, with the options that give another size."""

    processor: Any
    size: dict[str, Any]

    def __call__(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt", **self.size)[
            "pixel_values"
        ][0]
        return pixels


def transformers_preprocess(spec: EncoderSpec) -> Preprocess:
    """What `load_transformers_image` preprocesses with. Raises EncoderError as it does."""
    processor: Any = _open(AutoImageProcessor, spec)
    return image_preprocess(
        spec,
        reference=ProcessorPreprocess(
            processor=processor,
            size=_resize(processor, spec.resolution),
        ),
        backend="transformers",
        faster=None,
    )[0]


def shape_transformers(spec: EncoderSpec, device: str = "meta") -> Any:
    """The architecture in float32 whatever its files hold, of an encoder with a decoder that
    encoder: on the meta device without weights, on another with random ones.

    Raises:
        EncoderError: its config.json cannot be had.
    """
    config = _config(spec)
    config.dtype = torch.float32
    with torch.device(device):
        half = T5_TYPES.get(config.model_type)
        return AutoModel.from_config(config) if half is None else half(config)


def image_size(spec: EncoderSpec) -> tuple[int, int]:
    """(height, width) of what the encoder's own processor makes of an image. Raises EncoderError
    without one."""
    processor: Any = _open(AutoImageProcessor, spec)
    pixels = ProcessorPreprocess(processor=processor, size=_resize(processor, spec.resolution))(
        Image.new("RGB", (640, 480))
    )
    return pixels.shape[1], pixels.shape[2]


def _config(spec: EncoderSpec) -> Any:
    return _open(AutoConfig, spec)


def _open(factory: Any, spec: EncoderSpec, **options: Any) -> Any:
    source = str(spec.folder or spec.name)
    try:
        return factory.from_pretrained(source, revision=spec.revision or "main", **options)
    except Exception as error:  # the libraries below share no base class of errors
        first = next(
            (line for line in str(error).splitlines() if line.strip()),
            type(error).__name__,
        )
        what = f"cannot be opened ({first.strip()})"
        raise EncoderError(
            f"encoder {spec} {what}{nearest(spec.name, WELL_KNOWN)} Or give hf:/folder"
        ) from error


def _load_model(spec: EncoderSpec, factory: Any) -> tuple[Any, list[str]]:
    """The model and the names of its parameters that the files do not hold (only an unused pooler
    may be missing)."""
    with _quiet(local=spec.folder is not None):
        module, report = _open(
            factory,
            spec,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    missing = sorted(report["missing_keys"])
    lost = [name for name in missing if "pooler" not in name] + [
        name for name, *_ in report["mismatched_keys"]
    ]
    if lost:
        raise EncoderError(
            f"encoder {spec}: its files lack {len(lost)} parameters of "
            f"{type(module).__name__}: {lost[0]}, …"
        )
    return module, missing


@contextmanager
def _quiet(local: bool) -> Iterator[None]:
    """No report of weights that are not used (missing ones are an error below), no bar for a local
    folder."""
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
    """What the spec says, else the sentence-transformers pooling file of a local folder, else the
    masked mean."""
    if spec.pooling != "default":
        return spec.pooling
    path = spec.folder / "1_Pooling" / "config.json" if spec.folder else None
    if path and path.is_file():
        return _pooling_of(json.loads(path.read_text()), spec)
    return "mean"


def _pooling_of(config: dict[str, Any], spec: EncoderSpec) -> Pooling:
    chosen = [
        key for key, value in config.items() if key.startswith("pooling_mode_") and value is True
    ]
    modes: dict[str, Pooling] = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
    }
    named = config.get("pooling_mode")
    if named in ("cls", "mean"):
        return "cls" if named == "cls" else "mean"
    if len(chosen) != 1 or chosen[0] not in modes:
        raise EncoderError(
            f"encoder {spec}: pooling {chosen or named} is not supported; give --text-cut "
            "mean or cls"
        )
    return modes[chosen[0]]


def _max_tokens(spec: EncoderSpec, tokenizer: Any, config: Any) -> int:
    """The smallest of: the spec's, sentence-transformers' file, the tokenizer's, the positions of
    the model, 512."""
    path = spec.folder / "sentence_bert_config.json" if spec.folder else None
    saved = json.loads(path.read_text()).get("max_seq_length") if path and path.is_file() else None
    positions = getattr(config, "max_position_embeddings", None)
    offset = 2 if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
    limits = [
        int(tokenizer.model_max_length),
        (int(positions) - offset) if positions else None,
        512,
    ]
    limits.append(spec.max_tokens or saved)
    max_tokens = min(int(limit) for limit in limits if limit)
    n_special = int(tokenizer.num_special_tokens_to_add())
    if max_tokens <= n_special:
        raise EncoderError(
            f"encoder {spec}: {max_tokens} tokens leave no room for words beside {n_special} "
            "special ones"
        )
    return max_tokens


def tokenise_with(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Tokens:
    if not texts:
        return Tokens(ids=[], n_truncated=0)
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens, verbose=False)["input_ids"]
    full = [text for text, row in zip(texts, ids, strict=True) if len(row) == max_tokens]
    longer = tokenizer(full, truncation=False, verbose=False)["input_ids"] if full else []
    return Tokens(ids=ids, n_truncated=sum(len(row) > max_tokens for row in longer))


def digest_tokenizer(tokenizer: Any) -> str:
    """Content of the tokenizer without the truncation and padding that calls switch on and off."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    return content_hash(json.dumps(kept, sort_keys=True, ensure_ascii=False))


def _architecture(module: Any, spec: EncoderSpec) -> Json:
    """The class and the settings of config.json: the same weights with other heads give other
    features."""
    settings, _ = module.config.get_config_dict(
        str(spec.folder or spec.name),
        revision=spec.revision or "main",
    )
    return {
        "class": type(module).__name__,
        **{k: v for k, v in sorted(settings.items()) if k not in NOT_IDENTITY},
    }


def _image_pooling(spec: EncoderSpec, config: Any) -> Pooling:
    has_class = N_CLASS_TOKENS.get(config.model_type, 1) > 0
    if "cls" in spec.pooling and not has_class:
        raise EncoderError(f"encoder {spec} has no CLS token; use --image-cut default or mean")
    return ("cls" if has_class else "mean") if spec.pooling == "default" else spec.pooling


def _resize(processor: Any, resolution: int | None) -> dict[str, Any]:
    """Call options that make the processor give `resolution` x `resolution` pixels, the crop ratio
    kept."""
    if resolution is None:
        return {}
    side = {"height": resolution, "width": resolution}
    if not getattr(processor, "do_center_crop", False):
        return {"size": side}
    old = processor.crop_size["height"]
    edge = processor.size.get("shortest_edge", processor.size.get("height", old))
    return {"size": {"shortest_edge": round(edge * resolution / old)}, "crop_size": side}


def _plain_processor(processor: Any, size: dict[str, Any]) -> Json:
    """The processor's settings without names of files and of the library's version."""
    settings = {**json.loads(processor.to_json_string()), **size}
    left_out = (
        "_processor_class",
        "processor_class",
        "feature_extractor_type",
        "transformers_version",
    )
    return {
        "class": type(processor).__name__,
        **{k: v for k, v in sorted(settings.items()) if k not in left_out},
    }


def _n_prefix(config: Any) -> int:
    return N_CLASS_TOKENS.get(config.model_type, 1) + int(getattr(config, "num_register_tokens", 0))
