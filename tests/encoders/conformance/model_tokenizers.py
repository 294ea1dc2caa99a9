"""Byte-level tokenizers in the manner of each family: every text has tokens, one for each byte."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Style:
    """What a family puts around a text."""

    specials: tuple[str, ...]
    """In the order of their ids, which begin at 0."""
    template: str | None
    """Where the text is $A; None: nothing is added."""
    names: dict[str, str] = field(default_factory=dict)
    last: tuple[str, ...] = ()
    """Special tokens with the highest ids."""
    padding_side: str = "right"


STYLES = {
    "bert": Style(
        specials=("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
        template="[CLS] $A [SEP]",
        names={"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    ),
    "roberta": Style(
        specials=("<s>", "<pad>", "</s>", "<unk>"),
        template="<s> $A </s>",
        names={
            "pad_token": "<pad>",
            "cls_token": "<s>",
            "sep_token": "</s>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
    ),
    "t5": Style(
        specials=("<pad>", "</s>", "<unk>"),
        template="$A </s>",
        names={"pad_token": "<pad>", "eos_token": "</s>"},
    ),
    "qwen": Style(
        specials=("<|endoftext|>", "<|im_end|>"),
        template="$A <|endoftext|>",
        names={"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        padding_side="left",
    ),
    "llama": Style(
        specials=("<unk>", "<s>", "</s>"),
        template="<s> $A",
        names={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"},
        padding_side="left",
    ),
    "gpt2": Style(
        specials=("<|endoftext|>",),
        template=None,
        names={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "clip": Style(
        specials=(),
        template="<|startoftext|> $A <|endoftext|>",
        names={
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
        last=("<|startoftext|>", "<|endoftext|>"),
    ),
}
N_TOKENS = 300
"""More than any style has: the width of every table of tokens."""


def save_tokenizer(
    folder: Path,
    style_name: str,
    max_length: int | None,
) -> PreTrainedTokenizerFast:
    """Write the tokenizer of a style to a folder."""
    style = STYLES[style_name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ordered = [*style.specials, *alphabet, *style.last]
    ids = {token: number for number, token in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*style.specials, *style.last])
    if style.template is not None:
        special_ids = [(token, ids[token]) for token in (*style.specials, *style.last)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=style.template,
            special_tokens=special_ids,
        )
    options: dict[str, Any] = {} if max_length is None else {"model_max_length": max_length}
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side=style.padding_side,
        **style.names,
        **options,
    )
    saved.save_pretrained(folder)
    return saved
