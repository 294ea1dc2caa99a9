"""Tokenize texts by the fast tokenizers of transformers, and identify them."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from apecache.encoders.encoder import Tokens
from apecache.encoders.library_types import Tokenizer
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.transformers_files import open_saved
from apecache.errors import EncoderError
from apecache.fingerprint import content_hash


def open_tokenizer(spec: EncoderSpec, folder: Path) -> Tokenizer:
    """Open the tokenizer. Raises EncoderError if it has no tokenizer.json, or knows no words."""
    tokenizer = open_saved(AutoTokenizer, spec, folder)
    if not getattr(tokenizer, "is_fast", False):
        raise EncoderError(
            f"encoder {spec}: its tokenizer has no tokenizer.json, so it cannot be fingerprinted"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise EncoderError(
            f"encoder {spec}: its tokenizer knows no words; save it beside the model"
        )
    return tokenizer


def has_case(tokenizer: Tokenizer) -> bool:
    """Tell whether the tokenizer itself tells capitals from small letters."""
    capitals = "ABC Hello WORLD"
    return bool(tokenizer(capitals)["input_ids"] != tokenizer(capitals.lower())["input_ids"])


def tokenize_with(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> Tokens:
    """Tokenize texts, cut to `max_tokens`, and count those that were cut."""
    if not texts:
        return Tokens(ids=[], n_truncated=0)
    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens, verbose=False)
    ids = [row or [_end_id(tokenizer)] for row in encoded["input_ids"]]
    # A full row may just fit, so the few full ones are tokenized again without truncation.
    full_texts = [text for text, row in zip(texts, ids, strict=True) if len(row) == max_tokens]
    n_truncated = 0
    if full_texts:
        untruncated = tokenizer(full_texts, truncation=False, verbose=False)
        n_truncated = sum(len(row) > max_tokens for row in untruncated["input_ids"])
    return Tokens(ids=ids, n_truncated=n_truncated)


def _end_id(tokenizer: Tokenizer) -> int:
    """Return the token that stands for an empty text, where the tokenizer adds none by itself."""
    for token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def digest_tokenizer(tokenizer: Tokenizer) -> str:
    """Hash the tokenizer's content."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Calls switch truncation and padding on and off: they say nothing about the tokenizer.
    switched = ("truncation", "padding")
    identity = {key: value for key, value in content.items() if key not in switched}
    return content_hash(json.dumps(identity, sort_keys=True, ensure_ascii=False))
