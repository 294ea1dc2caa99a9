"""Load sentence-transformers models, with all of their modules and prompts."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apecache.encoders.encoder import FeatureTap, State, TextEncoder, Tokens, freeze
from apecache.encoders.fingerprint import build_fingerprint, digest_module
from apecache.encoders.from_transformers import NO_LIMIT, UNKNOWN_LENGTH
from apecache.encoders.library_types import LibraryModel, Tokenizer
from apecache.encoders.snapshot import cannot_open, read_modules, refuse_code, resolve_folder
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tokenizing import digest_tokenizer, tokenize_with
from apecache.encoders.tower import count_positions
from apecache.errors import EncoderError, MissingExtraError
from apecache.fingerprint import Json

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
    for cut in specs:
        if cut.pooling != "default" or cut.layer is not None:
            raise EncoderError(
                f"encoder {cut}: st: gives the model's own output; for other cuts take hf:"
            )
    (spec,) = specs
    folder = resolve_folder(spec, WEIGHT_FILES, MODULE_FILES)
    _require_modules(spec, folder)
    model = _open(spec, folder)
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

    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        features: dict[str, Any] = {"input_ids": inputs[0], "attention_mask": inputs[1]}
        if n_prompt_tokens:
            features["prompt_length"] = n_prompt_tokens
        output = frozen(features)
        return {"own": output["sentence_embedding"]}

    def tokenize(texts: Sequence[str]) -> Tokens:
        prefixed = [prefix + text for text in texts]
        return tokenize_with(tokenizer, prefixed, max_tokens)

    tap = FeatureTap(states=states, state="own", pool=lambda state, _: state)
    dim = int(model.get_embedding_dimension())
    pad_id = int(tokenizer.pad_token_id or 0)
    encoder = TextEncoder(
        spec=spec,
        module=frozen,
        tokenize=tokenize,
        forward=tap,
        pad_id=pad_id,
        max_tokens=max_tokens,
        row_shape=(dim,),
        fingerprint=fingerprint,
        device=device,
    )
    return [encoder]


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
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    n_positions = None if config is None else count_positions(config)
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
