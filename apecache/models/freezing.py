"""Freeze the parameters of towers by rules over their named parts; the first match wins.

- `embeddings`: everything before the first block, with its norm. `patch_embedding`,
  `token_embedding`, `position`, `cls`, `registers` and `token_types` are parts of it.
- `blocks`: all blocks, the final norm, and the model's own pooler.
- `norms`: all normalizations. `biases`: every parameter named bias.
- `adapters`: adapters, which match no other name but `all`.

A slice counts blocks. One with an open end includes the final norm. Of norms and biases, one with
an open beginning includes those of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from apecache.encoders.module_places import EMBEDDING_PLACES
from apecache.encoders.tower import Cut, Tower
from apecache.encoders.tower_parameters import TowerParameter
from apecache.errors import RecipeError
from apecache.fingerprint import Modality
from apecache.recipes.sections import PART_NAMES, Rule, Selector, TowersSpec, parse_selector


@dataclass(frozen=True, kw_only=True)
class FreezeDecision:
    """Hold what was decided about one parameter."""

    side: Modality
    part: TowerParameter
    rule: str
    """The rule that decided; empty if none matched."""
    train: bool
    lr: float
    """Factor of the learning rate."""


@dataclass(frozen=True, kw_only=True)
class TowerCut:
    """Hold the highest cut below which nothing trains."""

    cut: Cut | None
    """None: the inputs themselves."""
    reason: str


def freeze_towers(
    sides: Sequence[tuple[Tower, nn.Module]],
    spec: TowersSpec,
) -> tuple[FreezeDecision, ...]:
    """Switch every parameter of towers and heads on or off as the rules say.

    Where the rules treat the CLS row of a token table differently from the table, the row is split
    off (`Tower.split_cls`).

    Args:
        sides: towers with their heads.

    Returns:
        One match for each parameter, side after side.

    Raises:
        RecipeError: a rule matches no part of these towers; the message names the parts they have.
    """
    # An earlier call may have split a row off that the rules now treat like its table.
    for tower, _ in sides:
        tower.join_cls()
    tower_parts: list[tuple[Tower, TowerParameter]] = []
    for tower, head in sides:
        tower_parts += [(tower, tower_part) for tower_part in tower.parts()]
        tower_parts += [(tower, head_part) for head_part in _head_parts(head)]
    _require_matches(spec.all_rules, tower_parts)
    decided = [_decide(tower, tower_part, spec) for tower, tower_part in tower_parts]
    matches: list[FreezeDecision] = []
    for tower, head in sides:
        matches += _apply(tower, head, decided)
    return tuple(matches)


def trained_parameters(
    tower: Tower,
    head: nn.Module,
    matches: Sequence[FreezeDecision],
) -> list[tuple[nn.Parameter, float]]:
    """Return (parameter, factor of the learning rate) for all that trains in one side.

    Each parameter is listed once.
    """
    trained: dict[nn.Parameter, float] = {}
    for match in matches:
        if match.train and match.side == tower.modality:
            # A table and its CLS row may be two matches of one parameter.
            trained[_parameter(tower, head, match.part)] = match.lr
    return list(trained.items())


def spared_parameters(
    tower: Tower,
    matches: Sequence[FreezeDecision],
    sections: Sequence[str],
) -> list[nn.Parameter]:
    """Return the trained parameters of one tower that belong to these parts of it."""
    return [
        tower.parameter(match.part)
        for match in matches
        if match.train and match.side == tower.modality and match.part.section in sections
    ]


def freeze_head(
    side: Modality,
    head: nn.Module,
    spec: TowersSpec,
) -> list[tuple[nn.Parameter, float]]:
    """Freeze or train the head of a side whose tower's output is cached.

    Only the rules for heads count.

    Returns:
        (parameter, factor of the learning rate) for all that trains.
    """
    head_rule = _find_head_rule(side, spec.all_rules)
    head.requires_grad_(head_rule is None or head_rule.train)
    lr = head_rule.lr if head_rule else 1.0
    return [(parameter, lr) for parameter in head.parameters() if parameter.requires_grad]


def _find_head_rule(side: Modality, rules: Sequence[Rule]) -> Rule | None:
    for rule in rules:
        selector = parse_selector(rule.part)
        if selector.name in ("head", "all") and selector.side in (None, side):
            return rule
    return None


def count_trained(matches: Sequence[FreezeDecision]) -> int:
    """Count the numbers that train."""
    return sum(match.part.count for match in matches if match.train)


def find_cut(matches: Sequence[FreezeDecision], tower: Tower) -> TowerCut:
    """Find where one side can be cut, from its matches."""
    trained_parts: list[TowerParameter] = []
    for match in matches:
        # The head lies above every cut.
        is_in_tower = match.side == tower.modality and match.part.section != "head"
        if match.train and is_in_tower:
            trained_parts.append(match.part)
    if not trained_parts:
        return TowerCut(
            cut="pooled",
            reason="nothing within the tower trains: its pooled output is computed once",
        )
    depth = min(trained_part.depth for trained_part in trained_parts)
    if depth == -1:
        return TowerCut(cut=None, reason=_why_none(trained_parts, tower))
    if depth > 0 and tower.sees_padding:
        return TowerCut(
            cut=None,
            reason=("its tokens depend on the padding of the text, which cached tokens leave out"),
        )
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


def _why_none(trained: Sequence[TowerParameter], tower: Tower) -> str:
    """Say why nothing can be cached if an embedding trains."""
    names = ", ".join(
        sorted({trained_part.section for trained_part in trained if trained_part.depth == -1})
    )
    if all(trained_part.depth == -1 for trained_part in trained):
        return (
            f"{names} at the very bottom trains, so nothing can be cached: the {tower.n_blocks} "
            "frozen blocks above "
            "still have to be run, and the gradient goes back through all of them"
        )
    return (
        f"{names} at the very bottom trains, so nothing can be cached: every activation "
        "changes with every step"
    )


def _decide(tower: Tower, tower_part: TowerParameter, spec: TowersSpec) -> FreezeDecision:
    """Apply the first rule that matches a part; without one the towers are frozen, heads train."""
    for rule in spec.all_rules:
        if _fits(parse_selector(rule.part), tower_part, tower):
            # Layer-wise decay: the lower a part lies, the smaller its learning rate.
            height = 0 if tower_part.section == "head" else tower.n_blocks - tower_part.depth
            return FreezeDecision(
                side=tower.modality,
                part=tower_part,
                rule=rule.part,
                train=rule.train,
                lr=rule.lr * spec.lr_decay**height,
            )
    return FreezeDecision(
        side=tower.modality,
        part=tower_part,
        rule="",
        train=tower_part.section == "head",
        lr=1.0,
    )


def _apply(
    tower: Tower,
    head: nn.Module,
    decided: Sequence[FreezeDecision],
) -> list[FreezeDecision]:
    """Switch the parameters of one side as decided, and return the matches of that side."""
    side_matches = [match for match in decided if match.side == tower.modality]
    table = next((m for m in side_matches if m.part.section == "token_embedding"), None)
    row = next((m for m in side_matches if m.part.name.endswith("[cls]")), None)
    if table and row and (table.train, table.lr) != (row.train, row.lr):
        tower.split_cls()
        row_part = replace(row.part, name=tower.row_name)
        split_row = replace(row, part=row_part)
        side_matches = [split_row if match is row else match for match in side_matches]
    # Everything off first: parameters that are no part (poolers) have no match and stay off.
    tower.requires_grad_(False)
    head.requires_grad_(False)
    for match in side_matches:
        if match.train:
            _parameter(tower, head, match.part).requires_grad_(True)
    return side_matches


def _parameter(tower: Tower, head: nn.Module, side_part: TowerParameter) -> nn.Parameter:
    """Return the parameter of a part of a tower or of its head."""
    if side_part.section == "head":
        return head.get_parameter(side_part.name.removeprefix("head."))
    return tower.parameter(side_part)


def _head_parts(head: nn.Module) -> list[TowerParameter]:
    head_parts: list[TowerParameter] = []
    for name, parameter in head.named_parameters():
        head_part = TowerParameter(
            name=f"head.{name}",
            section="head",
            depth=-1,
            count=parameter.numel(),
            norm=False,
            bias=False,
        )
        head_parts.append(head_part)
    return head_parts


def _fits(selector: Selector, side_part: TowerParameter, tower: Tower) -> bool:
    """Tell whether a selector matches a part of a tower or of its head."""
    if selector.side not in (None, tower.modality):
        return False
    part_place = side_part.section
    if part_place == "whole":
        # It is frozen, or for comparison trains as a whole: embeddings and blocks alike.
        return selector.name in ("all", "embeddings", "blocks")
    is_within = _within(selector, side_part.depth, tower.n_blocks)
    match selector.name:
        case "all":
            return True
        case "head":
            return part_place == "head"
        case "adapters":
            return part_place == "adapter" and is_within
        case "embeddings":
            return part_place in EMBEDDING_PLACES
        case "blocks":
            return part_place in ("block", "final_norm", "pooler") and is_within
        case "norms" | "biases":
            is_selected = side_part.norm if selector.name == "norms" else side_part.bias
            is_below = side_part.depth == -1 and selector.start is None
            is_library_part = part_place not in ("adapter", "head")
            return is_selected and is_library_part and (is_below or is_within)
        case _:
            return part_place == selector.name


def _within(selector: Selector, depth: int, n_blocks: int) -> bool:
    """Tell whether the selector's slice holds that depth."""
    if depth == n_blocks:
        # The final norm belongs to slices with an open end.
        return selector.stop is None and not selector.single
    return depth in range(n_blocks)[selector.start : selector.stop]


def _require_matches(
    rules: Sequence[Rule],
    tower_parts: Sequence[tuple[Tower, TowerParameter]],
) -> None:
    """Refuse a rule that matches nothing; rules for a side that is not given are left alone."""
    sides = {tower.modality for tower, _ in tower_parts}
    for rule in rules:
        selector = parse_selector(rule.part)
        if rule.optional or selector.side not in (None, *sides):
            continue
        if not any(_fits(selector, tower_part, tower) for tower, tower_part in tower_parts):
            raise RecipeError(f"rule {rule.part!r} fits nothing; {_existing(tower_parts)}")


def _existing(tower_parts: Sequence[tuple[Tower, TowerParameter]]) -> str:
    """Name what a rule could match, for each side."""
    towers = {tower.modality: tower for tower, _ in tower_parts}
    matching: set[tuple[Modality, str]] = set()
    for tower, tower_part in tower_parts:
        for name in PART_NAMES:
            if _fits(Selector(side=tower.modality, name=name), tower_part, tower):
                matching.add((tower.modality, name))
    descriptions: list[str] = []
    for side, tower in towers.items():
        names = ", ".join(name for name in PART_NAMES if (side, name) in matching)
        descriptions.append(f"the {side} tower has {tower.n_blocks} blocks and {names}")
    return "; ".join(descriptions)
