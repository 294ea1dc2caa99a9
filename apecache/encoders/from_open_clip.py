"""Load either tower of an open_clip model: its projected embedding.

Preprocessing and tokenizer are the model's own.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from apecache.encoders.library_types import LibraryModel, Tokenizer
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
    resolve_folder,
    true_keys,
)
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, MissingExtraError, nearest
from apecache.fingerprint import Json, content_hash

HUB_PREFIX = "hf-hub:"
WEIGHT_FILES = (
    ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors"),
    ("open_clip_pytorch_model.bin", "pytorch_model.bin"),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "*.model")
DEFAULT_CONTEXT = 77
"""Tokens of a text where open_clip's configuration names no number."""


def load_open_clip_image(specs: Sequence[EncoderSpec], device: torch.device) -> list[ImageEncoder]:
    """Load the image tower: its embedding before normalization, [n, embed_dim].

    There are no other cuts.

    Raises:
        EncoderError: no such model or weights, or a cut other than the model's own output.
        MissingExtraError: open_clip is not installed.
    """
    (spec,) = _only_own(specs)
    folder = _folder(spec)
    model = _create(spec, folder)
    config = _image_config(model, spec)
    preprocess, backend = _image_preprocess(spec, config)
    inputs: Json = {
        **backend,
        "config": {key: _plain(value) for key, value in sorted(config.items())},
    }
    fingerprint = build_fingerprint(
        spec,
        weights=digest_module(model.visual),
        architecture=_architecture(model, spec, folder),
        inputs=inputs,
    )
    visual: LibraryModel = freeze(model.visual, spec, device)
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    tap = FeatureTap(states=_states(visual), state="own", pool=lambda state, _: state)
    input_shape = (3, height, width)
    row_shape = feature_shape(tap, shape=input_shape, spec=spec, device=device)
    encoder = ImageEncoder(
        spec=spec,
        module=visual,
        preprocess=preprocess,
        forward=tap,
        input_shape=input_shape,
        row_shape=row_shape,
        fingerprint=fingerprint,
        device=device,
    )
    return [encoder]


def load_open_clip_text(specs: Sequence[EncoderSpec], device: torch.device) -> list[TextEncoder]:
    """Load the text tower: its embedding before normalization, [n, embed_dim].

    There are no other cuts. Raises as `load_open_clip_image` does.
    """
    (spec,) = _only_own(specs)
    folder = _folder(spec)
    tokenizer = _tokenizer(spec, folder)
    model = _create(spec, folder)
    # Of a tower from transformers the model names all its positions, which no training used.
    context = int(tokenizer.context_length)
    if spec.max_tokens and spec.max_tokens != context:
        raise EncoderError(
            f"encoder {spec}: its context is {context} tokens; leave --max-tokens off"
        )
    tower = model.text
    # A causal tower that pools at the end-of-text token never sees the padding after it, so its
    # batches are padded to their longest caption only. Any other tower gets the whole context.
    # CoCa appends a token of its own after the padding.
    pools_at_end = (
        getattr(tower, "pool_type", "") in ("argmax", "eos")
        and getattr(tower, "cls_emb", None) is None
    )
    trimmed = pools_at_end and getattr(tower, "attn_mask", None) is not None
    eos_id = tower.eos_id if trimmed and tower.pool_type == "eos" else None
    prefix = spec.prefix or ""
    inputs: Json = {"tokenizer": _digest(tokenizer), "max_tokens": context, "pooling": "default"}
    inputs |= {"prefix": prefix} if prefix else {}
    fingerprint = build_fingerprint(
        spec,
        weights=digest_module(tower),
        architecture=_architecture(model, spec, folder),
        inputs=inputs,
    )
    frozen: LibraryModel = freeze(tower, spec, device)

    def tokenize(texts: Sequence[str]) -> Tokens:
        prefixed = [prefix + text for text in texts]
        return _tokenize(
            tokenizer,
            texts=prefixed,
            context=context,
            trimmed=trimmed,
            eos_id=eos_id,
        )

    states = _trimmed_states(frozen) if trimmed else _states(frozen)
    tap = FeatureTap(states=states, state="own", pool=lambda state, _: state)
    length = None if trimmed else context
    with torch.no_grad():
        probe_ids = torch.zeros(1, context, dtype=torch.long, device=device)
        dim = int(_first(frozen(probe_ids)).shape[1])
    encoder = TextEncoder(
        spec=spec,
        module=frozen,
        tokenize=tokenize,
        forward=tap,
        pad_id=0,
        max_tokens=context,
        row_shape=(dim,),
        fingerprint=fingerprint,
        device=device,
        length=length,
    )
    return [encoder]


def shape_open_clip(spec: EncoderSpec, device: str = "meta") -> Any:
    """Build one tower without its weights: none on the meta device, else random ones.

    Raises EncoderError as `load_open_clip_image` does.
    """
    _only_own([spec])
    model = _build(spec, device)
    if spec.modality == "image":
        return model.visual
    if hasattr(model.text, "config"):
        raise EncoderError(
            f"encoder {spec}: its text tower is a model of transformers, which needs values to "
            "run; plan with that model as hf:"
        )
    return model.text


def shape_size(spec: EncoderSpec) -> tuple[int, int]:
    """Return (height, width) of the pixels that the model's preprocessing gives."""
    size = _image_config(_build(spec, "meta"), spec)["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def shape_features(spec: EncoderSpec, module: LibraryModel) -> Callable[..., Tensor]:
    """Return what extraction takes of a shape: (pixels,) or (ids, mask) -> features."""
    context = getattr(module, "context_length", None) or DEFAULT_CONTEXT

    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        values = inputs[0]
        if spec.modality == "text":
            # A shape is counted and timed at the whole context, whichever texts there are.
            values = torch.nn.functional.pad(values, (0, context - values.shape[1]))
        return {"own": _first(module(values))}

    return FeatureTap(states=states, state="own", pool=lambda state, _: state)


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
        tensor_form=_tensor_form(config),
    )


def _only_own(specs: Sequence[EncoderSpec]) -> Sequence[EncoderSpec]:
    """Return the specs unchanged; refuse a cut other than the model's own output."""
    for spec in specs:
        if spec.pooling != "default" or spec.layer is not None:
            raise EncoderError(
                f"encoder {spec}: of open_clip models only the output can be taken; leave the "
                "cut off"
            )
    return specs


def _folder(spec: EncoderSpec) -> Path | None:
    """Return the folder of a saved model or of a hub repository; None for a name of open_clip's.

    Raises:
        EncoderError: as `resolve_folder`; or its configuration asks for code of a repository.
    """
    if spec.folder is None and not spec.name.startswith(HUB_PREFIX):
        return None
    repository = spec.name.removeprefix(HUB_PREFIX)
    folder = resolve_folder(spec, WEIGHT_FILES, repository=repository)
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
    name, _, tag = spec.name.partition("/")
    _require_known(spec, name=name, tag=tag, open_clip=_library())
    return {"model_name": name, "pretrained": tag}


def _open(spec: EncoderSpec, source: dict[str, Any], **options: Any) -> LibraryModel:
    open_clip = _library()
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


def _library() -> Any:
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    return open_clip


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
    return _library().get_model_config(spec.name.partition("/")[0]) or {}


def _tokenizer(spec: EncoderSpec, folder: Path | None) -> Tokenizer:
    """Open the tokenizer: the one beside the model, or the one that its configuration names.

    Raises:
        EncoderError: it cannot be reached, or it has no token for padding.
    """
    open_clip = _library()
    text_config: Json = _described(spec, folder).get("text_cfg") or {}
    named = text_config.get("hf_tokenizer_name")
    if not named:
        source = spec.name.partition("/")[0] if folder is None else f"local-dir:{folder}"
        return open_clip.get_tokenizer(source)
    is_beside = folder is not None and any(any(folder.glob(name)) for name in TOKENIZER_FILES)
    try:
        tokenizer = open_clip.tokenizer.HFTokenizer(
            str(folder if is_beside else download(spec, repository=named)),
            context_length=text_config.get("context_length", DEFAULT_CONTEXT),
            tokenizer_mode=text_config.get("tokenizer_mode"),
            trust_remote_code=False,
            **text_config.get("tokenizer_kwargs", {}),
        )
        # Every text is padded to the context, which a tokenizer without a pad token refuses.
        tokenizer(["a"])
    except Exception as error:  # the hub client and transformers share no base class of errors
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(
            f"encoder {spec}: its tokenizer {named} cannot be used ({reason}); save the tokenizer "
            "beside the model and give open_clip:/folder"
        ) from error
    return tokenizer


def _states(tower: LibraryModel) -> States:
    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        return {"own": _first(tower(inputs[0]))}

    return states


def _first(output: Any) -> Tensor:
    """Return the embedding; CoCa's towers return their tokens beside it."""
    embedding: Tensor = output[0] if isinstance(output, tuple) else output
    return embedding


def _trimmed_states(tower: LibraryModel) -> States:
    """Return the forward pass of a tower for texts shorter than its context."""
    mask = tower.attn_mask

    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        ids = inputs[0]
        length = ids.shape[1]
        # open_clip cuts the positions to the text's length, but not the causal mask.
        buffers = {"attn_mask": mask[:length, :length]}
        return {"own": _first(torch.func.functional_call(tower, buffers, (ids,)))}

    return states


def _tokenize(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context: int,
    trimmed: bool,
    eos_id: int | None,
) -> Tokens:
    """Return the ids of each text, without padding if `trimmed`, and count the truncated texts."""
    if not texts:
        return Tokens(ids=[], n_truncated=0)
    ids = tokenizer(list(texts), context_length=context)
    n_truncated = _count_truncated(tokenizer, texts=texts, ids=ids, context=context)
    rows: list[list[int]] = []
    for row in ids:
        # The end-of-text token has the highest id, unless the tower names another one.
        end = row.argmax() if eos_id is None else (row == eos_id).int().argmax()
        n_tokens = int(end) + 1 if trimmed else len(row)
        rows.append(row[:n_tokens].tolist())
    return Tokens(ids=rows, n_truncated=n_truncated)


def _count_truncated(tokenizer: Tokenizer, texts: Sequence[str], ids: Tensor, context: int) -> int:
    """Count the texts that have more tokens than the context.

    Args:
        ids: [n, context], the tokens of each text, padded.
    """
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        # open_clip's own tokenizer pads with 0 and adds a token at both ends.
        full_texts = [text for text, last in zip(texts, ids[:, -1], strict=True) if last]
        return sum(len(tokenizer.encode(text)) + 2 > context for text in full_texts)
    # Only the library's own tokenizer knows its padding, so every text is tokenized whole.
    clean = getattr(tokenizer, "clean_fn", _clean_siglip)
    cleaned = [clean(text) for text in texts]
    adds_class = getattr(tokenizer, "tokenizer_mode", "") == "clips"
    whole = inner(cleaned, add_special_tokens=not adds_class, truncation=False, verbose=False)
    n_added = 3 if adds_class else 0
    return sum(len(row) + n_added > context for row in whole["input_ids"])


def _clean_siglip(text: str) -> str:
    """Clean a text as open_clip's tokenizer of SigLIP does within its call."""
    from open_clip.tokenizer import basic_clean, canonicalize_text

    cleaned: str = canonicalize_text(basic_clean(text))
    return cleaned


def _digest(tokenizer: Tokenizer) -> str:
    """Hash the tokenizer: its vocabulary or tokenizer.json, and how text is cleaned."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        content = inner.backend_tokenizer.to_str()
    else:
        content = json.dumps(sorted(tokenizer.encoder.items()))
    clean_function = getattr(tokenizer, "clean_fn", None)
    clean_name = getattr(clean_function, "__name__", "")
    return content_hash(f"{type(tokenizer).__name__}\0{clean_name}\0{content}")


def _architecture(model: LibraryModel, spec: EncoderSpec, folder: Path | None) -> Json:
    """Return the class and what the weights do not show: the model's configuration, if known."""
    described = _described(spec, folder) or {"name": spec.name}
    return {"class": type(model).__name__, "config": described}


def _tensor_form(config: dict[str, Any]) -> TensorPreprocess | None:
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
