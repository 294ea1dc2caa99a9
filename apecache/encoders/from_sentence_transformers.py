"""Load sentence-transformers models, with all of their modules and prompts."""

import json
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from apecache.encoders.encoder import (
    FeatureTap,
    State,
    TextEncoder,
    Tokens,
    build_fingerprint,
    digest_module,
    freeze,
)
from apecache.encoders.from_transformers import digest_tokenizer, tokenize_with
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, MissingExtraError
from apecache.fingerprint import Json


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
    model = _open(spec)
    tokenizer: Any = getattr(model, "tokenizer", None)
    if not getattr(tokenizer, "is_fast", False):
        raise EncoderError(
            f"encoder {spec}: its tokenizer has no tokenizer.json, so it cannot be fingerprinted"
        )
    max_tokens = min(spec.max_tokens or 512, int(model.max_seq_length or 512))
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
    fingerprint = build_fingerprint(
        spec,
        weights=digest_module(model),
        architecture=_architecture(model),
        inputs=inputs,
    )
    frozen: Any = freeze(model, spec, device)

    def states(inputs: tuple[Tensor, ...], _: Collection[State]) -> dict[State, Tensor]:
        output = frozen({"input_ids": inputs[0], "attention_mask": inputs[1]})
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


def _open(spec: EncoderSpec) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtraError("sentence_transformers", "sentence-transformers") from None
    try:
        return SentenceTransformer(
            str(spec.folder or spec.name),
            device="cpu",
            trust_remote_code=False,
            revision=spec.revision,
        )
    except Exception as error:
        # The hub client, safetensors and transformers share no base class of errors.
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(
            f"encoder {spec} cannot be opened ({reason}); or give st:/folder"
        ) from error


def _architecture(model: Any) -> Json:
    """Return every module with its settings.

    The same weights under another pooling give other features.
    """
    return [_described(module) for module in model]


def _described(module: Any) -> Json:
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
