"""Tokenize texts as open_clip does for a model, and find where each text ends."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from apecache.encoders.encoder import Tokens
from apecache.encoders.library_types import LibraryModel, Tokenizer
from apecache.encoders.snapshot import download
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError, MissingExtraError
from apecache.fingerprint import content_hash

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "*.model")
DEFAULT_CONTEXT = 77
"""Tokens of a text where open_clip's configuration names no number."""


def open_library() -> Any:
    """Import open_clip. Raises MissingExtraError if it is not installed."""
    try:
        import open_clip
    except ImportError:
        raise MissingExtraError("open_clip", "open-clip") from None
    return open_clip


def open_text_tokenizer(
    spec: EncoderSpec,
    folder: Path | None,
    text_config: dict[str, Any],
) -> Tokenizer:
    """Open the tokenizer: the one beside the model, or the one that its configuration names.

    Args:
        folder: with the model's files; None for a name of open_clip's own.
        text_config: the configuration of the text tower.

    Raises:
        EncoderError: it cannot be reached, or it has no token for padding.
    """
    open_clip = open_library()
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


@dataclass(frozen=True, kw_only=True)
class TextEnding:
    """Say where a text ends within its context, for towers that never see what comes after."""

    by: Literal["argmax", "eos", "padding"] | None
    """The highest id, the token `eos_id`, or the first of the padding; None: the tower sees its
    padding, so a text is the whole context."""
    eos_id: int | None = None
    pad_id: int = 0


def find_ending(tower: LibraryModel) -> TextEnding:
    """Find out how a tower treats its padding.

    A causal tower that pools at the end-of-text token never sees the padding after it, and a tower
    of transformers masks it, so batches are padded to their longest caption only. Any other tower
    gets the whole context. CoCa appends a token of its own after the padding.
    """
    config = getattr(tower, "config", None)
    if config is not None:
        # The tower finds its padding by the id.
        pad_id = config.pad_token_id
        return TextEnding(by="padding", pad_id=int(pad_id)) if pad_id is not None else WHOLE_CONTEXT
    is_causal = getattr(tower, "attn_mask", None) is not None
    pool_type = getattr(tower, "pool_type", "")
    has_class = getattr(tower, "cls_emb", None) is not None
    if has_class or not is_causal:
        return WHOLE_CONTEXT
    match pool_type:
        case "argmax":
            return TextEnding(by="argmax")
        case "eos":
            return TextEnding(by="eos", eos_id=int(tower.eos_id))
        case _:
            return WHOLE_CONTEXT


WHOLE_CONTEXT = TextEnding(by=None)


def tokenize_texts(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    context: int,
    ending: TextEnding,
) -> Tokens:
    """Return the ids of each text up to its end, and count the truncated texts."""
    if not texts:
        return Tokens(ids=[], n_truncated=0)
    ids = tokenizer(list(texts), context_length=context)
    n_truncated = _count_truncated(tokenizer, texts=texts, ids=ids, context=context)
    rows = [row[: _count_tokens(row, ending)].tolist() for row in ids]
    return Tokens(ids=rows, n_truncated=n_truncated)


def _count_tokens(row: Tensor, ending: TextEnding) -> int:
    """Count the tokens of one padded text [context]; at least one."""
    match ending.by:
        case "argmax":
            return int(row.argmax()) + 1
        case "eos":
            is_end: Tensor = row.eq(ending.eos_id)  # type: ignore[arg-type]
            return int(is_end.int().argmax()) + 1
        case "padding":
            positions = (row != ending.pad_id).nonzero()
            return int(positions.max()) + 1 if len(positions) else 1
        case None:
            return len(row)


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
    untruncated = inner(cleaned, add_special_tokens=not adds_class, truncation=False, verbose=False)
    n_added = 3 if adds_class else 0
    return sum(len(row) + n_added > context for row in untruncated["input_ids"])


def _clean_siglip(text: str) -> str:
    """Clean a text as open_clip's tokenizer of SigLIP does within its call."""
    from open_clip.tokenizer import basic_clean, canonicalize_text

    cleaned: str = canonicalize_text(basic_clean(text))
    return cleaned


def digest_texts(tokenizer: Tokenizer) -> str:
    """Hash the tokenizer: its vocabulary or tokenizer.json, and how text is cleaned."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        content = inner.backend_tokenizer.to_str()
    else:
        content = json.dumps(sorted(tokenizer.encoder.items()))
    clean_function = getattr(tokenizer, "clean_fn", None)
    clean_name = getattr(clean_function, "__name__", "")
    return content_hash(f"{type(tokenizer).__name__}\0{clean_name}\0{content}")
