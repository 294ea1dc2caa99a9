"""Freezing: rules over the named parts of a tower, the first match wins, each match is returned.

The names: `embeddings` is everything before the first block (with its norm), of which
`patch_embedding`, `token_embedding`, `position`, `cls`, `registers` and `token_types` are parts;
`blocks` goes with the final norm, `norms` are all normalisations, `biases` every parameter named
bias. A slice counts blocks; where its end is open, the final norm goes along, and for norms and
biases, where its beginning is open, the embeddings. Adapters answer only to `adapters` (and `all`),
whatever lies in them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from apecache.encoders.module_map import EMBEDDING_PLACES
from apecache.encoders.tower import TABLE_ROW, Cut, Part, Tower
from apecache.errors import RecipeError
from apecache.fingerprint import Modality
from apecache.recipes.sections import PART_NAMES, Rule, Selector, TowersSpec, parse_selector


@dataclass(frozen=True, kw_only=True)
class Match:
    """One parameter, and the rule that decided over it (empty: none did). `lr` multiplies the
    learning rate."""

    side: Modality
    part: Part
    rule: str
    train: bool
    lr: float


@dataclass(frozen=True, kw_only=True)
class TowerCut:
    """The last activation below which nothing trains, None for the inputs themselves, and why it
    lies there."""

    cut: Cut | None
    reason: str


def freeze_towers(sides: Sequence[tuple[Tower, nn.Module]], spec: TowersSpec) -> tuple[Match, ...]:
    """Switch every parameter of towers and heads on or off as the rules say; one match for each.

    Where the CLS row of a token table is treated otherwise than the table, it is laid apart
    (`Tower.split_cls`).

    Raises:
        RecipeError: a rule that fits no part of these towers, with the parts that they have.
    """
    for tower, _ in sides:
        tower.join_cls()
    parts = [
        (tower, part) for tower, head in sides for part in (*tower.parts(), *_head_parts(head))
    ]
    _require_matches(spec.all_rules, parts)
    decided = [_decide(tower, part, spec) for tower, part in parts]
    return tuple(match for tower, head in sides for match in _apply(tower, head, decided))


def trained_parameters(
    tower: Tower,
    head: nn.Module,
    matches: Sequence[Match],
) -> list[tuple[nn.Parameter, float]]:
    """(parameter, factor of the learning rate) of one side, everything that trains once."""
    chosen = {
        _parameter(tower, head, m.part): m.lr
        for m in matches
        if m.train and m.side == tower.modality
    }
    return list(chosen.items())


def freeze_head(
    side: Modality,
    head: nn.Module,
    spec: TowersSpec,
) -> list[tuple[nn.Parameter, float]]:
    """The same for a side whose tower is not at hand, its output being cached: only the rules for
    heads count."""
    named = ((rule, parse_selector(rule.part)) for rule in spec.all_rules)
    found = next(
        (
            rule
            for rule, where in named
            if where.name in ("head", "all") and where.side in (None, side)
        ),
        None,
    )
    head.requires_grad_(found is None or found.train)
    return [
        (parameter, found.lr if found else 1.0)
        for parameter in head.parameters()
        if parameter.requires_grad
    ]


def count_trained(matches: Sequence[Match]) -> int:
    return sum(match.part.count for match in matches if match.train)


def find_cut(matches: Sequence[Match], tower: Tower) -> TowerCut:
    """Where one side can be cut, from its matches."""
    mine = [
        m.part for m in matches if m.train and m.side == tower.modality and m.part.place != "head"
    ]
    if not mine:
        return TowerCut(
            cut="pooled",
            reason="nothing within the tower trains: its pooled output is computed once",
        )
    depth = min(part.depth for part in mine)
    if depth == -1:
        return TowerCut(cut=None, reason=_why_none(mine, tower))
    if depth == 0:
        return TowerCut(
            cut=None,
            reason="training begins in the first block, and below it lie only the embeddings",
        )
    if depth == tower.n_blocks:
        return TowerCut(
            cut=depth,
            reason="only what follows the last block trains: the tokens after it are computed once",
        )
    return TowerCut(
        cut=depth,
        reason=(
            f"training begins in block {depth}: the tokens after the {depth} blocks below it are "
            "kept"
        ),
    )


def _why_none(trained: Sequence[Part], tower: Tower) -> str:
    names = ", ".join(sorted({part.place for part in trained if part.depth == -1}))
    if all(part.depth == -1 for part in trained):
        return (
            f"{names} at the very bottom trains, so nothing can be cached: the {tower.n_blocks} "
            "frozen blocks above "
            "still have to be run, and the gradient goes back through all of them"
        )
    return (
        f"{names} at the very bottom trains, so nothing can be cached: every activation "
        "changes with every step"
    )


def _decide(tower: Tower, part: Part, spec: TowersSpec) -> Match:
    height = 0 if part.place == "head" else tower.n_blocks - part.depth
    for rule in spec.all_rules:
        if _fits(parse_selector(rule.part), part, tower):
            return Match(
                side=tower.modality,
                part=part,
                rule=rule.part,
                train=rule.train,
                lr=rule.lr * spec.lr_decay**height,
            )
    return Match(side=tower.modality, part=part, rule="", train=part.place == "head", lr=1.0)


def _apply(tower: Tower, head: nn.Module, decided: Sequence[Match]) -> list[Match]:
    mine = [match for match in decided if match.side == tower.modality]
    table = next((m for m in mine if m.part.place == "token_embedding"), None)
    row = next((m for m in mine if m.part.name.endswith("[cls]")), None)
    if table and row and (table.train, table.lr) != (row.train, row.lr):
        tower.split_cls()
        moved = replace(row, part=replace(row.part, name=f"embeddings.{TABLE_ROW}"))
        mine = [moved if match is row else match for match in mine]
    tower.requires_grad_(False)
    head.requires_grad_(False)
    for match in mine:
        if match.train:
            _parameter(tower, head, match.part).requires_grad_(True)
    return mine


def _parameter(tower: Tower, head: nn.Module, part: Part) -> nn.Parameter:
    return (
        head.get_parameter(part.name.removeprefix("head."))
        if part.place == "head"
        else tower.parameter(part)
    )


def _head_parts(head: nn.Module) -> list[Part]:
    return [
        Part(name=f"head.{name}", place="head", depth=-1, count=p.numel(), norm=False, bias=False)
        for name, p in head.named_parameters()
    ]


def _fits(selector: Selector, part: Part, tower: Tower) -> bool:
    if selector.side not in (None, tower.modality):
        return False
    below = part.depth == -1
    above = part.place == "final_norm"
    match selector.name:
        case "all":
            return True
        case "head" | "adapters":
            wanted = "adapter" if selector.name == "adapters" else "head"
            return part.place == wanted and (
                wanted == "head" or _within(selector, part.depth, tower.n_blocks)
            )
        case "embeddings":
            return part.place in EMBEDDING_PLACES
        case "blocks":
            return (part.place == "block" or above) and _within(
                selector,
                part.depth,
                tower.n_blocks,
            )
        case "norms" | "biases":
            kind = part.norm if selector.name == "norms" else part.bias
            inside = (below and selector.start is None) or _within(
                selector,
                part.depth,
                tower.n_blocks,
            )
            return kind and part.place not in ("adapter", "head") and inside
        case _:
            return part.place == selector.name


def _within(selector: Selector, depth: int, n_blocks: int) -> bool:
    """Whether the slice holds that depth; the final norm (depth n_blocks) belongs to slices with an
    open end."""
    if depth == n_blocks:
        return selector.stop is None and not selector.single
    return depth in range(n_blocks)[selector.start : selector.stop]


def _require_matches(rules: Sequence[Rule], parts: Sequence[tuple[Tower, Part]]) -> None:
    sides = {tower.modality for tower, _ in parts}
    for rule in rules:
        selector = parse_selector(rule.part)
        if selector.side in (None, *sides) and not any(
            _fits(selector, part, tower) for tower, part in parts
        ):
            raise RecipeError(f"rule {rule.part!r} fits nothing; {_existing(parts)}")


def _existing(parts: Sequence[tuple[Tower, Part]]) -> str:
    """The names that would fit something, for each side."""
    towers = {tower.modality: tower for tower, _ in parts}
    names = Counter(
        (tower.modality, name)
        for tower, part in parts
        for name in PART_NAMES
        if _fits(Selector(side=tower.modality, name=name), part, tower)
    )
    found = ((side, [name for name in PART_NAMES if names[side, name]]) for side in towers)
    return "; ".join(
        f"the {side} tower has {towers[side].n_blocks} blocks and {', '.join(n)}"
        for side, n in found
    )
