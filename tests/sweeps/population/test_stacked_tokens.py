"""Members with heads on tokens end where fits of their own end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from populations import DEV, TRAIN, distance, losses, make, solo, together, with_tokens

from apecache.sweeps.population.population import member_bytes, split_members
from apecache.sweeps.population.stacked_heads import structure_of
from apecache.train.batches import FeaturePairs

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = with_tokens(TRAIN)
DEV_TOKENS = with_tokens(DEV)
WHOLE = replace(TOKENS, image_lengths=None, text_lengths=None)
DROPOUTS = [
    "image.dropout=0.1",
    "image.input_dropout=0.2",
    "text.dropout=0.2",
    "text.input_dropout=0.1",
]
KEY_BIASES = ("qkv.bias", "keys_values.bias")
"""The bias of keys changes no softmax: its gradient is rounding alone, which Adam amplifies."""
HEADS = {
    "transformer": [
        "image.kind=transformer",
        "image.n_heads=2",
        "image.depth=2",
        "text.kind=transformer",
        "text.n_heads=2",
        "text.depth=1",
        "text.pooling=cls",
        "image.skip=true",
    ],
    "attention": [
        "image.kind=attention",
        "image.n_heads=3",
        "text.kind=attention",
        "text.n_heads=1",
    ],
    "anchors": ["image.kind=anchors", "text.kind=anchors", "text.standardize=false"],
    "projector": [
        "image.kind=projector",
        "image.pooling=cls-and-mean",
        "text.kind=projector",
        "text.refine=true",
    ],
    "freeze-align": [
        "image.kind=freeze-align",
        "image.pooling=cls-and-mean",
        "text.kind=freeze-align",
        "text.refine=true",
        "image.standardize=false",
    ],
    "side by side": [
        "image.kind=ensemble",
        "image.parts=[{kind='anchors', dim=8}, {kind='projector', dim=4, dropout=0.1}]",
        "text.kind=ensemble",
        "text.parts=[{kind='anchors', dim=8}, {kind='attention', dim=4, n_heads=2}]",
    ],
}


def cases_of(name: str, more: Sequence[str] = ()) -> list[list[str]]:
    """Three members that differ in rates and shares."""
    dropouts = [] if name == "side by side" else DROPOUTS
    cases = []
    for i in range(3):
        settings = [f"optimizer.weight_decay={0.1 * i}", f"optimizer.lr={0.01 * (i + 1)}"]
        if dropouts:
            settings.append(f"text.dropout={0.1 * i}")
        cases.append(["schedule.epochs=3", *HEADS[name], *dropouts, *more, *settings])
    return cases


def require_equal(
    cases: Sequence[list[str]],
    train: FeaturePairs = TOKENS,
    tolerance: float = 1e-5,
) -> None:
    for seed, member in enumerate(together(cases, train=train, dev=DEV_TOKENS)):
        alone = solo(cases[seed], seed, train, DEV_TOKENS)
        assert distance(member, alone, KEY_BIASES) < tolerance
        assert losses(member) == pytest.approx(losses(alone), rel=1e-4)
        assert member.history[-1]["dev"] == alone.history[-1]["dev"]


@pytest.mark.parametrize("lengths", [True, False], ids=["padded", "whole"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_on_tokens_equal_their_solo_runs(name: str, lengths: bool) -> None:
    """Dropout included: each member draws its own masks."""
    require_equal(cases_of(name), TOKENS if lengths else WHOLE)


SETTINGS = {
    "hidden tokens": ["augmentation.token_dropout=0.3"],
    "noise": ["augmentation.noise=0.1"],
    "captions": ["loss.captions=2"],
    "structure": ["loss.structure=1.0"],
    "averaged": ["optimizer.ema=0.9"],
    "accumulated": ["schedule.accumulate=2"],
    "sigmoid": ["loss.kind=sigmoid", "loss.temperature=0.1"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_equal_their_solo_runs(name: str) -> None:
    require_equal(cases_of("freeze-align", SETTINGS[name]))


@pytest.mark.parametrize("name", ["hidden tokens", "structure", "averaged", "accumulated"])
@pytest.mark.parametrize("head", ["freeze-align", "anchors"])
def test_few_launches_change_no_member_without_dropout(
    head: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on accelerators: all members in one group, and features standardized once or not."""
    monkeypatch.setattr("apecache.sweeps.population.population.is_accelerator", lambda _: True)
    still = ["image.dropout=0", "image.input_dropout=0", "text.dropout=0", "text.input_dropout=0"]
    if name == "hidden tokens":
        still.append("augmentation.token_dropout=0")
    settings = SETTINGS[name]
    cases = [[*case, *settings, *still] for case in cases_of(head)]
    require_equal(cases, tolerance=1e-4)


def test_members_that_hide_tokens_train_beside_those_that_do_not() -> None:
    """Without lengths only some members have a mask."""
    cases = cases_of("projector")
    cases[1].append("augmentation.token_dropout=0.3")
    require_equal(cases, WHOLE)


def test_one_side_may_take_pooled_features() -> None:
    train = replace(TOKENS, text=TRAIN.text, text_lengths=None)
    dev = replace(DEV_TOKENS, text=DEV.text, text_lengths=None)
    cases = [
        ["schedule.epochs=2", *HEADS["anchors"][:1], f"optimizer.lr={lr}"] for lr in (0.1, 0.2)
    ]
    for seed, member in enumerate(together(cases, train=train, dev=dev)):
        assert distance(member, solo(cases[seed], seed, train, dev)) < 1e-5


def test_padding_that_is_not_a_number_changes_no_member() -> None:
    positions = torch.arange(TOKENS.image.shape[1])
    is_padding = positions >= torch.as_tensor(TOKENS.image_lengths).unsqueeze(1)
    damaged = TOKENS.image.masked_fill(is_padding.unsqueeze(-1), torch.nan)
    cases = cases_of("freeze-align")
    for seed, member in enumerate(
        together(cases, train=replace(TOKENS, image=damaged), dev=DEV_TOKENS)
    ):
        assert distance(member, solo(cases[seed], seed, TOKENS, DEV_TOKENS)) < 1e-5


@pytest.mark.parametrize("setting", ["image.pooling=cls", "image.n_heads=1"])
def test_heads_that_pool_or_attend_in_another_way_do_not_stack(setting: str) -> None:
    """Their parameters are equal."""
    structures = []
    for more in ([], [setting]):
        training, _ = make([*HEADS["transformer"], *more], 0, TOKENS)
        structures.append(structure_of(training.model.image))
    assert None not in structures
    assert structures[0] != structures[1]


def test_memory_of_members_grows_with_their_tokens() -> None:
    made = [make(HEADS["anchors"], seed, TOKENS) for seed in range(4)]
    members = [training for training, _ in made]
    more_tokens = replace(TOKENS, image=TOKENS.image.repeat(1, 8, 1))
    _, few = member_bytes(members[0], TOKENS)
    logits, many = member_bytes(members[0], more_tokens)
    # 28 tokens more of each image: 12 numbers in twice, and 12 and 8 of the anchors.
    assert many - few == 3 * 4 * 32 * 28 * (2 * 12 + 12 + 8)
    split: Any = split_members(
        members,
        plans=[plan for _, plan in made],
        train=more_tokens,
        most=16,
        max_bytes=logits + 2 * many,
    )
    assert split == [[0, 1], [2, 3]]
