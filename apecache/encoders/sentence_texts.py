"""Tokenize texts as sentence-transformers does for a model, and take its tokens or its vector."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apecache.encoders.encoder import FeatureTap, State, States, Tokens, pool_tokens
from apecache.encoders.layers import caught, resolve_layer
from apecache.encoders.library_types import LibraryModel, Tokenizer
from apecache.encoders.spec import EncoderSpec, no_class_token
from apecache.encoders.text_repository import has_class_token
from apecache.encoders.tokenizing import digest_tokenizer, tokenize_with
from apecache.encoders.tower import count_positions
from apecache.errors import EncoderError
from apecache.fingerprint import Json, content_hash

NO_LIMIT = 10**9
"""Tokenizers without a limit of their own name a greater one than this."""
UNKNOWN_LENGTH = 512
"""Tokens where neither the files nor the positions set a limit."""
STATIC_LENGTH = 100_000
"""Tokens of a text for static word vectors, which have no positions."""


@dataclass(frozen=True, kw_only=True)
class SentenceTexts:
    """Hold how a model's texts become token ids."""

    tokenize: Callable[[Sequence[str]], Tokens]
    pad_id: int
    max_tokens: int
    n_unpooled: int
    """Leading tokens that the pooling leaves out."""
    identity: Json
    """For the fingerprint."""


def open_sentences(spec: EncoderSpec, model: LibraryModel, prefix: str) -> SentenceTexts:
    """Return the tokenizer of a model of sentence-transformers.

    Raises:
        EncoderError: its tokenizer cannot be fingerprinted.
    """
    tokenizer: Tokenizer = getattr(model, "tokenizer", None)
    if is_static(model):
        return _static_texts(spec, tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise EncoderError(
            f"encoder {spec}: its tokenizer has no tokenizer.json, so it cannot be fingerprinted"
        )
    max_tokens = _max_tokens(spec, model)
    return SentenceTexts(
        tokenize=lambda texts: tokenize_with(tokenizer, texts, max_tokens),
        pad_id=int(tokenizer.pad_token_id or 0),
        max_tokens=max_tokens,
        n_unpooled=_count_unpooled(model, tokenizer, prefix),
        identity={"tokenizer": digest_tokenizer(tokenizer), "max_tokens": max_tokens},
    )


def is_static(model: LibraryModel) -> bool:
    """Tell whether a model is a table of word vectors (model2vec)."""
    return type(model[0]).__name__ == "StaticEmbedding"


def _static_texts(spec: EncoderSpec, tokenizer: Tokenizer) -> SentenceTexts:
    max_tokens = spec.max_tokens or STATIC_LENGTH

    def tokenize(texts: Sequence[str]) -> Tokens:
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [row.ids[:max_tokens] for row in encoded]
        return Tokens(ids=rows, n_truncated=sum(len(row.ids) > max_tokens for row in encoded))

    content = json.loads(tokenizer.to_str())
    # Calls may switch truncation and padding on: they say nothing about the tokenizer.
    tokenizer_content = {
        key: value for key, value in content.items() if key not in ("truncation", "padding")
    }
    digest = content_hash(json.dumps(tokenizer_content, sort_keys=True, ensure_ascii=False))
    return SentenceTexts(
        tokenize=tokenize,
        pad_id=0,
        max_tokens=max_tokens,
        n_unpooled=0,
        identity={"tokenizer": digest, "max_tokens": max_tokens},
    )


def transformer_config(model: LibraryModel) -> Any:
    """Return the configuration of the model's transformer; None without one."""
    return getattr(getattr(model[0], "auto_model", None), "config", None)


def _max_tokens(spec: EncoderSpec, model: LibraryModel) -> int:
    """Return the spec's limit, else the model's own, but not more than it has positions for."""
    config = transformer_config(model)
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


def sentence_states(model: LibraryModel, spec: EncoderSpec, n_unpooled: int) -> States:
    """Return one forward pass of a model; all cuts of the model share it."""

    def states(inputs: tuple[Tensor, ...], requested: Collection[State]) -> dict[State, Tensor]:
        ids, mask = inputs
        if is_static(model):
            return {"own": model(_in_one_row(ids, mask))["sentence_embedding"]}
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if n_unpooled:
            features["prompt_length"] = n_unpooled
        transformer = getattr(model[0], "auto_model", None)
        output, tokens_by_state = caught(
            model if transformer is None else transformer,
            spec=spec,
            states=requested,
            run=lambda: model(features),
        )
        tokens_by_state["own"] = output["sentence_embedding"]
        if "end" in requested:
            tokens_by_state["end"] = output["token_embeddings"]
        return tokens_by_state

    return states


def _in_one_row(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return all tokens one after another, and where each text begins."""
    lengths = mask.sum(1)
    return {"input_ids": ids[mask != 0], "offsets": lengths.cumsum(0) - lengths}


def sentence_tap(
    states: States,
    model: LibraryModel,
    cut: EncoderSpec,
    n_unpooled: int,
) -> FeatureTap:
    """Return the features of a cut.

    Raises:
        EncoderError: the model has no tokens, no such layer, or no CLS token.
    """
    if cut.pooling == "default":
        return FeatureTap(states=states, state="own", pool=lambda state, _: state)
    config = transformer_config(model)
    if config is None or getattr(model[0], "module_output_name", "") == "sentence_embedding":
        raise EncoderError(
            f"encoder {cut}: its first module gives no tokens; leave --text-cut off, or take hf:"
        )
    if "cls" in cut.pooling and not has_class_token(config):
        raise no_class_token(f"encoder {cut}", "text")

    def pool(state: Tensor, mask: Tensor | None) -> Tensor:
        pooled_mask = mask
        if mask is not None and n_unpooled and cut.pooling in ("mean", "max"):
            pooled_mask = mask.clone()
            pooled_mask[:, :n_unpooled] = 0
        return pool_tokens(state, mask=pooled_mask, pooling=cut.pooling)

    layer = resolve_layer(model[0].auto_model, cut)
    return FeatureTap(states=states, state=layer, pool=pool)


class SentenceShape(torch.nn.Module):
    """Stand for a model of sentence-transformers without its weights: transformer, then layers."""

    transformer: LibraryModel

    def __init__(self, transformer: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.transformer = transformer
        self.layers = torch.nn.ModuleList(layers)
