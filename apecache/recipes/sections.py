"""Describe what trains within the towers: freezing rules, their shorthand, adapters.

No tower is needed to read these sections of a recipe. `models/freezing.py` and `models/adapters.py`
apply them.
"""

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from apecache.errors import RecipeError, nearest
from apecache.fingerprint import Modality
from apecache.settings import Settings

SLICED = ("blocks", "norms", "biases", "adapters")
"""Parts of which every block has some, so that an index may follow."""
PART_NAMES = (
    "all",
    "embeddings",
    "patch_embedding",
    "token_embedding",
    "position",
    "cls",
    "registers",
    "token_types",
    *SLICED,
    "final_norm",
    "head",
)
_SELECTOR = re.compile(r"(?:(image|text)\.)?([a-z_]+)(?:\[(-?\d+)?(:)?(-?\d+)?\])?")
# Vuf-Tuu, and the paper's V_u^f T_u^u, with or without LaTeX's braces and dollar signs.
_ASCII = re.compile(r"V([ufc])([uf])-T([ufc])([uf])")
_MATHS = re.compile(r"\$?V_\{?([ufc])\}?\^\{?([uf])\}?\s*T_\{?([ufc])\}?\^\{?([uf])\}?\$?")


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Name the parameters of a rule: `norms[6:]` is ("norms", 6, None) of both sides."""

    side: Modality | None
    """None: both."""
    name: str
    start: int | None = None
    """First block; None: from the first one."""
    stop: int | None = None
    """Block after the last; None: to the last one."""
    single: bool = False
    """Whether one index was given. The last block, `[-1]`, has `stop` None."""


def parse_selector(text: str) -> Selector:
    """Read a selector.

    Args:
        text: `[image.|text.]NAME`; for blocks, norms, biases and adapters also with an index as in
            `[3]`, `[-1]`, `[2:5]`, `[-3:]`, `[:6]`.

    Raises:
        ValueError: not of that form, an unknown name (with the nearest ones), an index where none
            can be.
    """
    match = _SELECTOR.fullmatch(text.strip())
    if not match:
        raise ValueError(
            f"part {text!r} is not of the form [image.|text.]NAME[start:stop], as in "
            "text.blocks[-3:]"
        )
    side, name, first, colon, last = match.groups()
    if name not in PART_NAMES:
        raise ValueError(
            f"no part {name!r}; there are {', '.join(PART_NAMES)}{nearest(name, PART_NAMES)}"
        )
    if text.strip().endswith("]") and name not in SLICED:
        raise ValueError(f"part {text!r}: only {', '.join(SLICED)} take an index")
    start = None if first is None else int(first)
    stop = None if last is None else int(last)
    single = first is not None and colon is None
    if single:
        # The block after [-1] would be 0, which means the first one.
        stop = None if start == -1 else (start or 0) + 1
    elif text.strip().endswith("]") and colon is None:
        raise ValueError(f"part {text!r}: the index is empty")
    modality: Modality | None = None
    if side:
        modality = "image" if side == "image" else "text"
    return Selector(
        side=modality,
        name=name,
        start=start,
        stop=stop,
        single=single,
    )


class Rule(Settings):
    """Decide whether parameters train. Of several rules, the first that fits a parameter counts."""

    part: str
    """A selector, see `parse_selector`."""
    train: bool = True
    lr: float = Field(default=1.0, gt=0)
    """Factor of the learning rate."""
    optional: bool = False
    """Whether towers without such a part are accepted."""

    @field_validator("part")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse_selector(text)
        return text


class AdapterSpec(Settings):
    """Put new modules into a tower."""

    kind: Literal["layerwise", "deep", "lora"]
    """`layerwise`: two residual bottlenecks in every block (LilT, section 2.2). `deep`: one more
    block, randomly initialized (LilT, section 2.2). `lora`: an update of low rank of linear layers
    in every block (Hu et al., 2021, section 4)."""
    reduction: int = Field(default=4, ge=1)
    """`layerwise`: the bottlenecks are dim / `reduction` wide."""
    rank: int = Field(default=8, ge=1)
    """`lora`: of the update."""
    alpha: float = Field(default=16.0, gt=0)
    """`lora`: the update is scaled by `alpha` / `rank`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[Literal["attention", "mlp"], ...] = Field(default=("attention",), min_length=1)
    """`lora`: whose linear layers are updated."""


class TowersSpec(Settings):
    """Choose what trains within the towers.

    `rules` decide first, then `freezing`. Of all else the heads train and the towers are frozen.
    """

    freezing: str = "Vff-Tff"
    """A shorthand, see `shorthand_rules`."""
    rules: tuple[Rule, ...] = ()
    image_adapter: AdapterSpec | None = None
    text_adapter: AdapterSpec | None = None
    image_pooling: Literal["default", "cls", "mean", "max", "cls+mean"] = "default"
    """`default`: that of the encoder."""
    text_pooling: Literal["default", "cls", "mean", "max", "last", "cls+mean"] = "default"
    """The same for texts; `last` is the last token, of causal decoders."""
    lr_decay: float = Field(default=1.0, gt=0, le=1)
    """The learning rate of a block is that of the block above times this."""
    checkpointing: bool = False
    """Run blocks again in the backward pass instead of keeping their activations."""

    @field_validator("freezing")
    @classmethod
    def _readable(cls, text: str) -> str:
        shorthand_rules(text)
        return text

    @property
    def all_rules(self) -> tuple[Rule, ...]:
        """Return `rules`, then those of `freezing`."""
        return (*self.rules, *shorthand_rules(self.freezing))

    def adapter(self, side: Modality) -> AdapterSpec | None:
        """Return the adapter of a side; None: it has none."""
        return self.image_adapter if side == "image" else self.text_adapter

    def is_frozen(self, side: Modality) -> bool:
        """Tell whether a tower surely stays as it is, without adapters: it can be any encoder."""
        return not self.may_train(side) and self.adapter(side) is None

    def may_train(self, side: Modality) -> bool:
        """Tell whether anything but the head of that side could train.

        False is certain. With True nothing may train after all: a rule may name a part that the
        tower lacks, or that an earlier rule freezes.
        """
        for rule in self.all_rules:
            selector = parse_selector(rule.part)
            is_of_side = selector.side in (None, side)
            if rule.train and is_of_side and selector.name != "head":
                return True
        return False

    @property
    def freezes_heads(self) -> bool:
        """Tell whether a rule freezes a head."""
        # A shorthand names no heads, so `rules` alone can.
        return any(
            not rule.train and parse_selector(rule.part).name in ("head", "all")
            for rule in self.rules
        )


class SharedSpec(Settings):
    """Put one pre-norm transformer block for both modalities, randomly initialized, on the towers.

    The towers lose their upper blocks. This is the shared encoder of recipe `shared-encoder`.
    """

    image_blocks: int = Field(default=6, ge=1)
    """Blocks that the image tower keeps, from the first on."""
    text_blocks: int = Field(default=6, ge=1)
    """The same for the text tower."""
    n_heads: int = Field(default=0, ge=0)
    """0: one per 64 features."""
    expansion: int = Field(default=4, ge=1)
    """Width of the feed-forward layer over the block's width."""
    layer_scale: float = Field(default=0.2, gt=0)
    """Of the block's two branches at the start."""
    type_scale: float = Field(default=1e-5, gt=0)
    """Of the embedding that marks the modality."""


class DistillationSpec(Settings):
    """Teach both modalities of a shared encoder a teacher's cached image features.

    The loss of the distillation is added to the contrastive loss, unweighted.
    """

    kind: Literal["contrastive", "mse", "classes"] = "contrastive"
    """`contrastive`: find the feature of the same image among those of the batch and the bank, all
    L2-normalized. `mse`: predict the feature. `classes`: predict the teacher's distribution over
    its classes, which timm's classifier computes from the teacher's pooled features."""
    teacher: str = ""
    """Name of image features in the store; empty: the only ones with the cut `cls@-1`; for
    `classes` the only ones with the encoder's own pooling."""
    bank: int = Field(default=65536, ge=0)
    """`contrastive`: how many of the last features are kept beside those of the batch."""
    temperature: float = Field(default=0.07, gt=0)
    """`contrastive`: divides the similarities; it is fixed."""


def shorthand_rules(text: str) -> tuple[Rule, ...]:
    """Read a freezing shorthand as rules (To freeze or not to freeze, section 3).

    `V_u^f T_u^u` and `Vuf-Tuu` mean the same; V is the image tower and T the text tower. The first
    letter (lower index) is for the embeddings with positions, CLS and their norm; the second (upper
    index) for the blocks with the final norm. u trains, f is frozen; c as first letter: of the
    embeddings only the CLS vector trains.

    Raises:
        ValueError: anything else.
    """
    match = _match_shorthand(text)
    if not match:
        raise ValueError(
            f"{text!r} is not a freezing shorthand; expected one like Vuf-Tuu or V_u^f T_u^u"
        )
    image_embeddings, image_blocks, text_embeddings, text_blocks = match.groups()
    image_rules = _side_rules("image", image_embeddings, image_blocks)
    text_rules = _side_rules("text", text_embeddings, text_blocks)
    return (*image_rules, *text_rules)


def _match_shorthand(text: str) -> re.Match[str] | None:
    return _ASCII.fullmatch(text.strip()) or _MATHS.fullmatch(text.strip())


def _side_rules(side: Modality, embeddings: str, blocks: str) -> tuple[Rule, ...]:
    embedding_rule = Rule(part=f"{side}.embeddings", train=embeddings == "u")
    block_rule = Rule(part=f"{side}.blocks", train=blocks == "u")
    if embeddings != "c":
        return (embedding_rule, block_rule)
    # Before the embeddings, of which CLS is one: the first rule that fits counts.
    return (Rule(part=f"{side}.cls"), embedding_rule, block_rule)


def is_shorthand(text: str) -> bool:
    """Tell whether a text is a freezing shorthand, in either form."""
    return bool(_match_shorthand(text))


def shorthand_names() -> list[str]:
    """Return all ASCII shorthands: the 16 of the paper, and those with CLS alone."""
    sides = [lower + upper for lower in "ufc" for upper in "uf"]
    return [f"V{image}-T{text}" for image in sides for text in sides]


def require_shorthand(text: str) -> str:
    """Return a shorthand, given in either form, in ASCII.

    Raises:
        RecipeError: the text is not a shorthand; the message has the nearest one.
    """
    try:
        shorthand_rules(text)
    except ValueError as error:
        recipe_names = [f"freeze/{name}" for name in shorthand_names()]
        hint = nearest(f"freeze/{text}", recipe_names)
        raise RecipeError(f"freeze/{text}: {error}{hint}") from None
    match = _match_shorthand(text)
    assert match is not None
    return "V{}{}-T{}{}".format(*match.groups())
