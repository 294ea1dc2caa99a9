"""Load transformers encoders of texts and of images, with the tokenizers and processors of each."""

import json
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
)

from apecache.encoders.encoder import (
    FeatureTap,
    ImageEncoder,
    State,
    States,
    TextEncoder,
    Tokens,
    freeze,
    pool_tokens,
)
from apecache.encoders.fingerprint import build_fingerprint, digest_module
from apecache.encoders.layers import caught, resolve_layer
from apecache.encoders.library_types import LibraryModel, ModelConfig, Processor, Tokenizer
from apecache.encoders.preprocess import Preprocess, choose_preprocess, feature_shape
from apecache.encoders.preprocess_transformers import (
    ProcessorPreprocess,
    fixed_shape,
    resize_options,
)
from apecache.encoders.sentence_texts import NO_LIMIT, UNKNOWN_LENGTH
from apecache.encoders.snapshot import resolve_folder
from apecache.encoders.spec import EncoderSpec, Pooling
from apecache.encoders.text_repository import (
    TextUse,
    read_text_use,
)
from apecache.encoders.tokenizing import (
    digest_tokenizer,
    has_case,
    open_tokenizer,
    tokenize_with,
)
from apecache.encoders.tower import count_positions
from apecache.encoders.transformers_files import (
    describe_architecture,
    load_model,
    open_saved,
)
from apecache.encoders.transformers_images import image_states, image_tap, read_image_family
from apecache.encoders.transformers_texts import (
    PROJECTED_TEXT,
    SIGLIP_TEXT,
    padding_id,
    read_text_config,
    require_eos,
    text_factory,
    text_pooling,
    text_width,
    until_end,
)
from apecache.encoders.weight_files import TRANSFORMERS_WEIGHTS
from apecache.errors import EncoderError
from apecache.fingerprint import IMAGE_DECODING, Json


def load_transformers_text(specs: Sequence[EncoderSpec], device: torch.device) -> list[TextEncoder]:
    """Load one encoder for each spec; all share one model.

    Default pooling: CLIP's own, else what the repository says, else the architecture's convention
    (`text_repository.resolve_pooling`).

    Args:
        specs: of the same model; they differ in pooling and layer only.

    Raises:
        EncoderError: not found, not a text encoder, weights that miss parts of the model, or no
            known pooling.
    """
    spec = specs[0]
    folder = resolve_folder(spec)
    config = read_text_config(spec, folder)
    use = read_text_use(spec, folder)
    tokenizer = _open_tokenizer(spec, folder, config)
    projected = config.model_type in PROJECTED_TEXT
    sees_padding = config.model_type in SIGLIP_TEXT
    poolings = [text_pooling(cut, folder, use, config) for cut in specs]
    max_tokens = _max_tokens(spec, tokenizer=tokenizer, config=config, saved_limit=use.max_tokens)
    prefix = use.prompt if spec.prefix is None else spec.prefix
    if spec.prefix is None:
        _warn_of_e5(spec, prefix)
    _require_pooled_prompt(specs, use, prefix)
    lower_case = use.lower_case and has_case(tokenizer)

    def tokenize(texts: Sequence[str]) -> Tokens:
        prefixed = [prefix + text for text in texts] if prefix else texts
        lowered = [text.lower() for text in prefixed] if lower_case else prefixed
        tokens = tokenize_with(tokenizer, lowered, max_tokens)
        if not projected:
            return tokens
        # A text may hold the end-of-text token itself. Nothing after it reaches the features.
        ended = [until_end(row, config) for row in tokens.ids]
        return Tokens(ids=ended, n_truncated=tokens.n_truncated)

    if projected:
        require_eos(spec, tokenize([""]).ids[0], config)
    # The last layer of the model's own output, which other cuts do not use.
    own_layer = "head." if sees_padding else "text_projection"
    module, unloaded = load_model(
        spec,
        folder=resolve_folder(spec, TRANSFORMERS_WEIGHTS),
        factory=text_factory(config),
        may_lack=("pooler",) if "default" in poolings else ("pooler", own_layer),
        **({"config": config} if projected or sees_padding else {}),
    )
    shared_inputs: Json = {"tokenizer": digest_tokenizer(tokenizer), "max_tokens": max_tokens}
    shared_inputs |= {"prefix": prefix} if prefix else {}
    shared_inputs |= {"lower_case": True} if lower_case else {}
    weights = digest_module(module, unloaded)
    architecture = describe_architecture(module, folder)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: LibraryModel = freeze(module, spec, device)
    # One pass over whole texts: a decoder's cache of keys and values would only take memory.
    if getattr(frozen.config, "use_cache", False):
        frozen.config.use_cache = False

    states = _text_states(frozen, spec, config)

    def encoder(cut: EncoderSpec, layer: State, pooling: Pooling) -> TextEncoder:
        inputs: Json = {**shared_inputs, "pooling": pooling}
        if layer != "end":
            inputs["layer"] = layer
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
        )

        tap = _text_tap(states, layer, pooling)
        width = text_width(pooling, config)
        row_shape = (max_tokens, width) if pooling == "tokens" else (width,)
        return TextEncoder(
            spec=cut,
            module=frozen,
            tokenize=tokenize,
            forward=tap,
            pad_id=padding_id(tokenizer, config),
            max_tokens=max_tokens,
            row_shape=row_shape,
            fingerprint=fingerprint,
            device=device,
            # A model that sees the padding gets as much of it as it was trained with.
            length=config.max_position_embeddings if sees_padding else None,
        )

    cuts = zip(specs, layers, poolings, strict=True)
    return [encoder(cut, layer, pooling) for cut, layer, pooling in cuts]


def _text_states(module: LibraryModel, spec: EncoderSpec, config: ModelConfig) -> States:
    """Return one forward pass of a loaded model; all cuts of the model share it."""
    projected = config.model_type in PROJECTED_TEXT
    sees_padding = config.model_type in SIGLIP_TEXT

    def states(inputs: tuple[Tensor, ...], requested: Collection[State]) -> dict[State, Tensor]:
        ids, mask = inputs
        masked = {} if sees_padding else {"attention_mask": mask}
        output, tokens_by_state = caught(
            module,
            spec=spec,
            states=requested,
            run=lambda: module(input_ids=ids, **masked),
        )
        if projected:
            # A tower that was saved without the projection gives the end-of-text token.
            projected_text = output.get("text_embeds")
            tokens_by_state["own"] = (
                output.pooler_output if projected_text is None else projected_text
            )
        elif sees_padding:
            tokens_by_state["own"] = output.pooler_output
        return {**tokens_by_state, "end": output.last_hidden_state}

    return states


def _text_tap(states: States, layer: State, pooling: Pooling) -> FeatureTap:
    """Return the features of a cut; the pooling `default` is the model's own."""

    def pool(state: Tensor, mask: Tensor | None) -> Tensor:
        return state if pooling == "default" else pool_tokens(state, mask, pooling)

    return FeatureTap(states=states, state="own" if pooling == "default" else layer, pool=pool)


def _open_tokenizer(spec: EncoderSpec, folder: Path, config: ModelConfig) -> Any:
    """Open the tokenizer; where it is SigLIP's slow one, name the library that has a fast one."""
    try:
        return open_tokenizer(spec, folder)
    except EncoderError as error:
        if config.model_type not in SIGLIP_TEXT:
            raise
        raise EncoderError(f"{error}; take the same model from open_clip:") from error


def _require_pooled_prompt(specs: Sequence[EncoderSpec], use: TextUse, prefix: str) -> None:
    """Raise EncoderError where the repository leaves the prompt out of the pooled tokens."""
    for cut in specs:
        if prefix and cut.pooling == "default" and not use.is_prompt_pooled:
            raise EncoderError(
                f"encoder {cut}: its pooling leaves the prompt {prefix!r} out; take "
                f"st:{cut.name}, or give --text-prefix ''"
            )


def _warn_of_e5(spec: EncoderSpec, prefix: str) -> None:
    name = spec.folder.resolve().name.lower() if spec.folder else ""
    if not prefix and name.startswith(("e5-", "multilingual-e5-")) and "instruct" not in name:
        warnings.warn(
            f"encoder {spec}: the folder is named like an E5 model, but no file in it says so; "
            "if it is one, give --text-prefix 'query: '",
            stacklevel=2,
        )


def text_prefix(spec: EncoderSpec) -> str:
    """Return what stands before every text: the spec's prefix, else the repository's."""
    if spec.prefix is not None:
        return spec.prefix
    return read_text_use(spec, resolve_folder(spec)).prompt


def load_transformers_image(
    specs: Sequence[EncoderSpec],
    device: torch.device,
) -> list[ImageEncoder]:
    """Load one encoder for each spec; all share one model.

    Default pooling: the model's own for CLIP (projected), SigLIP, AIMv2 with its head, fine-tuned
    BEiTs, and convolutional and hierarchical models (what their classifiers take); else the CLS
    token, else (where there is none) the mean of the patch tokens.

    Args:
        specs: of the same model; they differ in pooling and layer only.

    Raises:
        EncoderError: not found, not a supported image model, or weights that miss parts of it.
    """
    spec = specs[0]
    folder = resolve_folder(spec)
    config = open_saved(AutoConfig, spec, folder)
    family = read_image_family(spec, config)
    processor, size = _processor(spec, folder)
    reference = ProcessorPreprocess(processor=processor, size=size)
    input_shape = fixed_shape(reference, spec)
    needs_own = any(family.has_own_pooling(cut) for cut in specs)
    module, unloaded = load_model(
        spec,
        folder=resolve_folder(spec, TRANSFORMERS_WEIGHTS),
        factory=family.factory,
        # Only what no cut uses may be missing.
        may_lack=() if needs_own else family.may_lack,
        **family.options,
    )
    preprocess, _ = choose_preprocess(
        spec, reference=reference, backend="transformers", tensor_form=None
    )
    shared_inputs: Json = {
        "decoding": IMAGE_DECODING,
        "processor": plain_processor(processor, size),
    }
    weights = digest_module(module, unloaded)
    architecture = describe_architecture(module, folder)
    layers = [resolve_layer(module, cut) for cut in specs]
    frozen: LibraryModel = freeze(module, spec, device)
    states = image_states(frozen, spec, family)

    def encoder(cut: EncoderSpec, layer: State) -> ImageEncoder:
        tap, pooling = image_tap(states, cut=cut, layer=layer, family=family)
        inputs: Json = {**shared_inputs, "pooling": pooling}
        if layer != "end":
            inputs["layer"] = layer
        fingerprint = build_fingerprint(
            cut,
            weights=weights,
            architecture=architecture,
            inputs=inputs,
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


def transformers_preprocess(spec: EncoderSpec) -> Preprocess:
    """Return the preprocessing of `load_transformers_image`. Raises EncoderError as it does."""
    processor, size = _processor(spec, resolve_folder(spec))
    reference = ProcessorPreprocess(processor=processor, size=size)
    preprocess, _ = choose_preprocess(
        spec, reference=reference, backend="transformers", tensor_form=None
    )
    return preprocess


def shape_transformers(spec: EncoderSpec, device: str = "meta") -> LibraryModel:
    """Build the architecture in float32: the tower alone, as the loaders open it.

    On the meta device it has no weights, on another one random weights.

    Raises:
        EncoderError: its config.json cannot be read, or it is no encoder of that modality.
    """
    if spec.modality == "image":
        saved_config = open_saved(AutoConfig, spec, resolve_folder(spec))
        family = read_image_family(spec, saved_config)
        config, factory = family.config, family.factory
        options = {key: value for key, value in family.options.items() if key != "config"}
    else:
        config = read_text_config(spec, resolve_folder(spec))
        factory = text_factory(config)
        options = {}
    config.dtype = torch.float32
    with torch.device(device):
        if factory is AutoModel:
            return AutoModel.from_config(config, trust_remote_code=False, **options)
        return factory(config, **options)


def shape_features(spec: EncoderSpec, module: LibraryModel) -> Callable[..., Tensor]:
    """Return what extraction takes of a shape: (pixels,) or (ids, mask) -> features.

    Raises EncoderError as the loaders do.
    """
    layer = resolve_layer(module, spec)
    if spec.modality == "image":
        family = read_image_family(spec, open_saved(AutoConfig, spec, resolve_folder(spec)))
        states = image_states(module, spec, family)
        tap, _ = image_tap(states, cut=spec, layer=layer, family=family)
        return tap
    folder = resolve_folder(spec)
    config = read_text_config(spec, folder)
    use = read_text_use(spec, folder)
    pooling = text_pooling(spec, folder=folder, use=use, config=config)
    return _text_tap(_text_states(module, spec, config), layer, pooling)


def image_size(spec: EncoderSpec) -> tuple[int, int]:
    """Return (height, width) of the pixels that the encoder's own processor gives.

    Raises EncoderError if there is no processor, or its pixels have no fixed size.
    """
    processor, size = _processor(spec, resolve_folder(spec))
    _, height, width = fixed_shape(ProcessorPreprocess(processor=processor, size=size), spec)
    return height, width


def _processor(spec: EncoderSpec, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the image processor, and its call options for the spec's resolution."""
    processor: Processor = open_saved(AutoImageProcessor, spec, folder)
    return processor, resize_options(processor, spec)


def _max_tokens(
    spec: EncoderSpec,
    tokenizer: Tokenizer,
    config: ModelConfig,
    saved_limit: int | None,
) -> int:
    """Return how many tokens of a text are encoded, special tokens included.

    It is the spec's limit, else the repository's for sentences, else the tokenizer's; but never
    more than the model has positions for.

    Raises:
        EncoderError: no room is left for words.
    """
    n_positions = count_positions(config)
    limit = spec.max_tokens or saved_limit
    if limit is None and tokenizer.model_max_length < NO_LIMIT:
        limit = int(tokenizer.model_max_length)
    limits = [number for number in (limit, n_positions) if number]
    max_tokens = min(limits, default=UNKNOWN_LENGTH)
    n_special = int(tokenizer.num_special_tokens_to_add())
    if max_tokens <= n_special:
        raise EncoderError(
            f"encoder {spec}: {max_tokens} tokens leave no room for words beside {n_special} "
            "special ones"
        )
    return max_tokens


def plain_processor(processor: Processor, size: dict[str, Any]) -> Json:
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
