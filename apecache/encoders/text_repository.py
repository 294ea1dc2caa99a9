"""Read what a text encoder's repository says of its use: pooling, prompt, length, lower case.

What it says is obeyed or refused. Where it says nothing, the architecture's convention decides.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from apecache.encoders.library_types import ModelConfig
from apecache.encoders.snapshot import CARD, is_whole, read_json, read_modules, repository_of
from apecache.encoders.spec import EncoderSpec, Pooling
from apecache.errors import EncoderError

CHOICES = "cls, mean, last or max"
POOLING_NAMES: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "lasttoken": "last",
}
"""Poolings of sentence-transformers that `hf:` has too."""
POOLING_FLAGS: dict[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older form of the same: a flag for each pooling."""
HARMLESS_MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")
"""Modules that change no direction of the pooled vector."""
LENGTH_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
E5_NAME = re.compile(r"(multilingual-)?e5-(small|base|large)\b", re.IGNORECASE)
E5_CARD = 'should start with "query: " or "passage: "'
MEAN_TYPES = ("t5", "mt5", "umt5")
"""Encoders without a masked language model whose tokens are averaged (Ni et al. 2022)."""
CONTRASTIVE_TYPES = (
    "clip_text_model",
    "metaclip_2_text_model",
    "siglip_text_model",
    "siglip2_text_model",
)


@dataclass(frozen=True, kw_only=True)
class TextUse:
    """Hold how a repository says that its text encoder is to be used."""

    pooling: Pooling | None
    """None: the repository does not say."""
    refusal: str | None
    """Why the repository's own sentence vector cannot be given; None: it can."""
    prompt: str
    """Put before every text; empty: none."""
    is_prompt_pooled: bool
    """Whether the prompt's tokens belong to the pooled ones."""
    max_tokens: int | None
    """None: the repository does not say."""
    lower_case: bool


def read_text_use(spec: EncoderSpec, folder: Path) -> TextUse:
    """Read the files of sentence-transformers in a folder, and the model card.

    Raises:
        EncoderError: a file is not what the library writes.
    """
    modules = read_modules(folder, spec)
    pooling_folder = "1_Pooling"
    refusal = None
    has_pooling = not modules
    for module in modules:
        class_name = str(module.get("type", "")).rpartition(".")[2]
        module_folder = str(module.get("path", ""))
        if class_name == "Pooling":
            pooling_folder = module_folder
            has_pooling = True
        elif class_name not in HARMLESS_MODULES and refusal is None:
            refusal = f"its sentence vector needs the module {module_folder or class_name}"
    if not has_pooling and refusal is None:
        refusal = "its modules.json names no pooling"
    described = read_json(folder / pooling_folder / "config.json", spec)
    pooling = None
    if described or (folder / pooling_folder / "config.json").is_file():
        pooling = _saved_pooling(described)
        if pooling is None and refusal is None:
            refusal = f"its pooling {_pooling_words(described)} is not supported"
    saved_length, lower_case = _saved_length(spec, folder)
    return TextUse(
        pooling=pooling,
        refusal=refusal,
        prompt=_prompt(spec, folder),
        is_prompt_pooled=described.get("include_prompt") is not False,
        max_tokens=saved_length,
        lower_case=lower_case,
    )


def resolve_pooling(spec: EncoderSpec, folder: Path, use: TextUse, config: ModelConfig) -> Pooling:
    """Return the spec's pooling, else the repository's, else the architecture's convention.

    The convention is the last token of causal decoders, and the masked mean of encoders that are
    trained on masked words, and of T5.

    Raises:
        EncoderError: the repository asks for something else than a pooling, or it says nothing
            and there is no convention.
    """
    if spec.pooling != "default":
        return spec.pooling
    if use.refusal is not None:
        raise EncoderError(
            f"encoder {spec}: {use.refusal}; take st:{spec.name}, or give --text-cut {CHOICES}"
        )
    if use.pooling is not None:
        return use.pooling
    if not is_whole(spec, folder):
        raise EncoderError(
            f"encoder {spec}: the local cache holds only some of its files, so its pooling is not "
            f"known; run once online, or give --text-cut {CHOICES}"
        )
    convention = _convention(config)
    if convention is None:
        raise EncoderError(
            f"encoder {spec}: neither its files nor a convention for {config.model_type} says how "
            f"its tokens are pooled; give --text-cut {CHOICES}"
        )
    return convention


def has_class_token(config: ModelConfig) -> bool:
    """Tell whether a text's first token stands for the text.

    T5 and SigLIP have no such token. The first token of a causal model sees nothing but itself.
    """
    without_class = (*MEAN_TYPES, *CONTRASTIVE_TYPES)
    return config.model_type not in without_class and _convention(config) != "last"


def _convention(config: ModelConfig) -> Pooling | None:
    model_type = config.model_type
    if model_type in MEAN_TYPES:
        return "mean"
    is_decoder = bool(getattr(config, "is_decoder", False))
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return None if is_decoder else "mean"
    # Some decoders are trained to look at later tokens too, as encoders do.
    looks_ahead = getattr(config, "use_bidirectional_attention", None) not in (None, False)
    is_causal = getattr(config, "is_causal", True) is not False and not looks_ahead
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and is_causal:
        return "last"
    return None


def _saved_pooling(described: dict[str, Any]) -> Pooling | None:
    """Read a pooling file in its newer form, a name, or its older one, a flag for each pooling."""
    mode = described.get("pooling_mode")
    if isinstance(mode, list) and len(mode) == 1:
        mode = mode[0]
    if mode is None:
        flags = _selected_flags(described)
        mode = POOLING_FLAGS.get(flags[0]) if len(flags) == 1 else None
    return POOLING_NAMES.get(mode) if isinstance(mode, str) else None


def pooling_names(described: dict[str, Any]) -> list[str]:
    """Return the poolings of a pooling file, in either form, by sentence-transformers' names."""
    mode = described.get("pooling_mode")
    if mode is None:
        return _selected_flags(described)
    return list(mode) if isinstance(mode, list) else str(mode).split("+")


def _selected_flags(described: dict[str, Any]) -> list[str]:
    return [key for key in described if key.startswith("pooling_mode_") and described[key] is True]


def _pooling_words(described: dict[str, Any]) -> str:
    mode = described.get("pooling_mode")
    return str(mode if mode is not None else _selected_flags(described) or "(none)")


def _saved_length(spec: EncoderSpec, folder: Path) -> tuple[int | None, bool]:
    """Return the greatest number of tokens, if the files say one, and whether to lower the case."""
    for name in LENGTH_FILES:
        described = read_json(folder / name, spec)
        if described:
            limit = described.get("max_seq_length")
            return (int(limit) if limit else None), described.get("do_lower_case") is True
    return None, False


def _prompt(spec: EncoderSpec, folder: Path) -> str:
    """Return the prompt that the repository puts before every text; empty without one."""
    described = read_json(folder / "config_sentence_transformers.json", spec)
    prompts = described.get("prompts") or {}
    default_name = described.get("default_prompt_name")
    if default_name is not None and prompts.get(default_name):
        return str(prompts[default_name])
    return "query: " if _is_e5(spec, folder) else ""


def _is_e5(spec: EncoderSpec, folder: Path) -> bool:
    """Tell whether a model was trained with E5's prefix, by its card, its config or its hub id.

    The instruct models of the same authors were trained with instructions in its place. The name
    of a local folder says nothing.
    """
    card = folder / CARD
    if card.is_file() and E5_CARD in card.read_text(encoding="utf-8", errors="replace"):
        return True
    saved_name = str(read_json(folder / "config.json", spec).get("_name_or_path") or "")
    for name in (repository_of(spec, folder) or "", saved_name):
        last_name = name.rstrip("/").rpartition("/")[2]
        if E5_NAME.match(last_name) and "instruct" not in last_name.lower():
            return True
    return False
