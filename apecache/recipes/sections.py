"""The part of a recipe that says what trains within the towers: freezing rules, their shorthand,
adapters.

Pure text: no tower is needed to read it. `recipes/freezing.py` and `recipes/adapters.py` do what it
says.
"""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from apecache.errors import RecipeError, nearest
from apecache.fingerprint import Modality
from apecache.settings import Settings

SLICED = ("blocks", "norms", "biases", "adapters")
PART_NAMES = (
    *(
        "all",
        "embeddings",
        "patch_embedding",
        "token_embedding",
        "position",
        "cls",
        "registers",
        "token_types",
    ),
    *(*SLICED, "final_norm", "head"),
)
_SELECTOR = re.compile(r"(?:(image|text)\.)?([a-z_]+)(?:\[(-?\d+)?(:)?(-?\d+)?\])?")
_ASCII = re.compile(r"V([ufc])([uf])-T([ufc])([uf])")
_MATHS = re.compile(r"\$?V_\{?([ufc])\}?\^\{?([uf])\}?\s*T_\{?([ufc])\}?\^\{?([uf])\}?\$?")


@dataclass(frozen=True, kw_only=True)
class Selector:
    """What a rule names: `norms[6:]` is ("norms", 6, None) of both sides. `start`, `stop` None:
    open ends, but for a `single` block counted from the end."""

    side: Modality | None
    name: str
    start: int | None = None
    stop: int | None = None
    single: bool = False


def parse_selector(text: str) -> Selector:
    """`[image.|text.]NAME`, for blocks, norms, biases and adapters also with `[3]`, `[-1]`,
    `[2:5]`, `[-3:]`, `[:6]`.

    Raises:
        ValueError: not of that form, an unknown name (with the nearest ones), an index where none
            can be.
    """
    found = _SELECTOR.fullmatch(text.strip())
    if not found:
        raise ValueError(
            f"part {text!r} is not of the form [image.|text.]NAME[start:stop], as in "
            "text.blocks[-3:]"
        )
    side, name, first, colon, last = found.groups()
    if name not in PART_NAMES:
        raise ValueError(
            f"no part {name!r}; there are {', '.join(PART_NAMES)}{nearest(name, PART_NAMES)}"
        )
    if text.strip().endswith("]") and name not in SLICED:
        raise ValueError(f"part {text!r}: only {', '.join(SLICED)} take an index")
    start, stop = (None if index is None else int(index) for index in (first, last))
    single = first is not None and colon is None
    if single:
        stop = None if start == -1 else (start or 0) + 1
    elif text.strip().endswith("]") and colon is None:
        raise ValueError(f"part {text!r}: the index is empty")
    return Selector(
        side="image" if side == "image" else "text" if side else None,
        name=name,
        start=start,
        stop=stop,
        single=single,
    )


class Rule(Settings):
    """The first rule that fits a parameter decides: whether it trains, with `lr` times the learning
    rate."""

    part: str
    train: bool = True
    lr: float = Field(default=1.0, gt=0)

    @field_validator("part")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse_selector(text)
        return text


class AdapterSpec(Settings):
    """New modules within a tower that else stays as it is.

    `layerwise`: two residual bottlenecks of width dim / `reduction` in every block (LilT, section
    2.2). `deep`: one more block, randomly initialised (LilT, section 2.2). `lora`: an update of
    rank `rank`, scaled by `alpha` / `rank`, of the linear layers of every block's `targets` (Hu et
    al., 2021, section 4).
    """

    kind: Literal["layerwise", "deep", "lora"]
    reduction: int = Field(default=4, ge=1)
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Literal["attention", "mlp"], ...] = Field(default=("attention",), min_length=1)


class TowersSpec(Settings):
    """What trains within the towers. What neither `rules` nor, after them, `freezing` names: heads
    train, the rest is frozen. `…_pooling` default: that of the encoder. `lr_decay`: the learning
    rate of a block is that of the block above times this. `checkpointing`: blocks are run again in
    the backward pass instead of being kept in memory.
    """

    freezing: str = "Vff-Tff"
    rules: tuple[Rule, ...] = ()
    image_adapter: AdapterSpec | None = None
    text_adapter: AdapterSpec | None = None
    image_pooling: Literal["default", "cls", "mean", "max", "cls+mean"] = "default"
    text_pooling: Literal["default", "cls", "mean", "max", "cls+mean"] = "default"
    lr_decay: float = Field(default=1.0, gt=0, le=1)
    checkpointing: bool = False

    @field_validator("freezing")
    @classmethod
    def _readable(cls, text: str) -> str:
        shorthand_rules(text)
        return text

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        return (*self.rules, *shorthand_rules(self.freezing))

    def adapter(self, side: Modality) -> AdapterSpec | None:
        return self.image_adapter if side == "image" else self.text_adapter

    def may_train(self, side: Modality) -> bool:
        """Whether anything but the head of that side could train, as far as the text tells (False
        is certain)."""
        named = (
            (rule, parse_selector(rule.part))
            for rule in self.rules + shorthand_rules(self.freezing)
        )
        return any(
            rule.train and where.side in (None, side) and where.name != "head"
            for rule, where in named
        )

    @property
    def freezes_heads(self) -> bool:
        return any(
            not rule.train and parse_selector(rule.part).name in ("head", "all")
            for rule in self.rules
        )


class SharedSpec(Settings):
    """One pre-norm transformer block for both modalities, randomly initialised, above the first
    `image_blocks` and `text_blocks` of the towers, whose other blocks are taken away (the shared
    encoder of recipe `shared-encoder`).

    `n_heads` 0: one per 64 features. `expansion`: width of its feed-forward layer. `layer_scale`:
    of its two branches at the start; `type_scale`: of the embedding that tells it the modality.
    """

    image_blocks: int = Field(default=6, ge=1)
    text_blocks: int = Field(default=6, ge=1)
    n_heads: int = Field(default=0, ge=0)
    expansion: int = Field(default=4, ge=1)
    layer_scale: float = Field(default=0.2, gt=0)
    type_scale: float = Field(default=1e-5, gt=0)


class DistillationSpec(Settings):
    """What both modalities of a shared encoder learn of a teacher's cached image features; added to
    the contrastive loss, unweighted.

    `contrastive`: to find the own image's feature among the batch's and a `bank` of the last ones,
    all L2-normalised and divided by `temperature`, which is fixed; `mse`: the feature itself;
    `classes`: the teacher's distribution over its classes, which timm's classifier makes of its
    pooled features. `teacher`: name of image features in the store; empty: the only ones.
    """

    kind: Literal["contrastive", "mse", "classes"] = "contrastive"
    teacher: str = ""
    bank: int = Field(default=65536, ge=0)
    temperature: float = Field(default=0.07, gt=0)


def shorthand_rules(text: str) -> tuple[Rule, ...]:
    """`V_u^f T_u^u`, or `Vuf-Tuu`, as rules (To freeze or not to freeze, section 3).

    First letter (lower index): the embeddings with positions, CLS and their norm; second (upper
    index): the blocks with the final norm. u trains, f is frozen; c as first letter: of the
    embeddings only the CLS vector trains.

    Raises:
        ValueError: anything else.
    """
    found = _ASCII.fullmatch(text.strip()) or _MATHS.fullmatch(text.strip())
    if not found:
        raise ValueError(
            f"{text!r} is no freezing shorthand; expected one like Vuf-Tuu or V_u^f T_u^u"
        )
    letters = found.groups()
    return (*_side_rules("image", *letters[:2]), *_side_rules("text", *letters[2:]))


def _side_rules(side: Modality, embeddings: str, blocks: str) -> tuple[Rule, ...]:
    cls = (Rule(part=f"{side}.cls"),) if embeddings == "c" else ()
    rest = Rule(part=f"{side}.embeddings", train=embeddings == "u")
    return (*cls, rest, Rule(part=f"{side}.blocks", train=blocks == "u"))


def is_shorthand(text: str) -> bool:
    return bool(_ASCII.fullmatch(text.strip()) or _MATHS.fullmatch(text.strip()))


def shorthand_names() -> list[str]:
    """All ASCII shorthands: the 16 of the paper, and those with CLS alone."""
    sides = [lower + upper for lower in "ufc" for upper in "uf"]
    return [f"V{image}-T{text}" for image in sides for text in sides]


def require_shorthand(text: str) -> str:
    """The shorthand in ASCII. Raises RecipeError for anything else."""
    try:
        shorthand_rules(text)
    except ValueError as error:
        known = [f"freeze/{name}" for name in shorthand_names()]
        raise RecipeError(f"freeze/{text}: {error}{nearest(f'freeze/{text}', known)}") from None
    found = _ASCII.fullmatch(text.strip()) or _MATHS.fullmatch(text.strip())
    assert found is not None
    return "V{}{}-T{}{}".format(*found.groups())
