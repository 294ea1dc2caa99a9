"""Members of a population end where fits of their own end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from populations import CPU, DEV, TRAIN, distance, losses, make, pairs, solo, together, weights

from apecache.errors import RunError
from apecache.heads.build import build_head
from apecache.heads.head import HeadSpec
from apecache.runs.checkpoint import load_checkpoint, save_checkpoint
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.population import (
    Population,
    member_bytes,
    members_state,
    restore_members,
    split_members,
    train_together,
)
from apecache.sweeps.population.stacked_heads import StackedHeads, structure_of
from apecache.train.fit import HeadFit, StepCount, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(i: int) -> list[str]:
    """Sixteen members that differ in all that may differ."""
    return [
        f"optimizer.lr={1e-4 * 1.4**i}",
        f"optimizer.weight_decay={0.05 * (i % 4)}",
        f"optimizer.betas=[{0.8 + 0.01 * i}, {0.95 + 0.003 * i}]",
        f"loss.temperature={0.03 + 0.01 * i}",
        f"image.dropout={0.1 * (i % 3)}",
        f"text.input_dropout={0.05 * (i % 5)}",
        f"augmentation.noise={0.1 * (i % 2)}",
        f"optimizer.clip={float(i % 3 == 2)}",
        f"schedule.warmup={0.05 * (i % 4)}",
    ]


MLP = ["image.kind=mlp", "image.width=16", "image.depth=2", "schedule.epochs=20"]


@pytest.mark.slow
def test_sixteen_different_members_equal_their_solo_runs_after_a_hundred_steps() -> None:
    cases = [[*MLP, *settings_of(i)] for i in range(16)]
    for seed, member in enumerate(together(cases)):
        alone = solo(cases[seed], seed)
        assert member.step == alone.step == 100
        assert distance(member, alone) < 1e-5
        assert losses(member) == pytest.approx(losses(alone), rel=1e-4)
        assert member.best.epoch == alone.best.epoch


def test_other_draws_of_dropout_are_seen() -> None:
    """The control of the test above: what it compares does depend on the random numbers."""
    case = [*MLP, "image.dropout=0.3"]
    member, _ = make(case, 0)
    other, plan = make(case, 0)
    train_together(
        [member, other],
        streams=MemberGenerators.seeded([1, 2], CPU),
        train=TRAIN,
        dev=DEV,
        plan=plan,
        n_epochs=5,
    )
    assert distance(member, other) > 1e-3


STRUCTURES = {
    # Adam would blow up the rounding of the biases before the norm, whose true gradient is zero
    "batch norm": [
        "image.kind=mlp",
        "image.residual=false",
        "image.norm=batch",
        "image.width=16",
        "optimizer.kind=sgd",
    ],
    "gated": ["text.kind=gated", "text.dropout=0.2", "text.skip=true"],
    "fusemix": ["image.kind=fusemix", "image.dropout=0.1", "image.expansion=2.0"],
    "identity": ["image.kind=identity", "image.dim=12", "text.dim=12"],
    "closed form": ["init=cca", "closed_form.ridge=[0.1]"],
    "sigmoid": ["loss.kind=sigmoid", "loss.temperature=0.1"],
    "sigmoid of two captions, accumulated": [
        "loss.kind=sigmoid",
        "loss.temperature=0.1",
        "loss.captions=2",
        "schedule.accumulate=2",
    ],
    "captions": ["loss.captions=2"],
    "structure": ["loss.structure=1.0", "loss.structure_warmup=3"],
    "mixup": ["augmentation.mixup=0.5"],
    "accumulated": ["schedule.accumulate=2"],
    "averaged": ["optimizer.ema=0.9"],
    "lion": ["optimizer.kind=lion", "optimizer.lr=0.001"],
    "sgd": ["optimizer.kind=sgd"],
    "fixed temperature": ["loss.learnable=false"],
    "decayed temperature": [
        "loss.temperature_parameter=temperature",
        "optimizer.decay_scalars=true",
    ],
    "temperature itself": ["loss.temperature_parameter=temperature", "optimizer.kind=sgd"],
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_and_loss_equals_its_solo_runs(name: str) -> None:
    cases = [
        ["schedule.epochs=3", *STRUCTURES[name], f"optimizer.weight_decay={0.1 * i}"]
        for i in range(3)
    ]
    for seed, member in enumerate(together(cases)):
        alone = solo(cases[seed], seed)
        assert distance(member, alone) < 1e-5
        assert member.history[-1]["dev"] == alone.history[-1]["dev"]
        if member.average is not None and alone.average is not None:
            torch.testing.assert_close(member.average, alone.average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in STRUCTURES if name != "mixup"] + ["plain", "clipped", "mlp"]
)
def test_few_launches_change_no_member_without_dropout(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on accelerators: logits, optimizer and masks of all members together."""
    monkeypatch.setattr("apecache.sweeps.population.population.is_accelerator", lambda _: True)
    more = {"clipped": ["optimizer.clip=1.0"], "mlp": MLP[:3]}
    structure = STRUCTURES.get(name, more.get(name, []))
    still = ["image.dropout=0", "text.dropout=0", "augmentation.noise=0"]
    cases = []
    for i in range(3):
        settings = [f"optimizer.weight_decay={0.1 * i}", f"optimizer.lr={0.01 * (i + 1)}"]
        cases.append(["schedule.epochs=3", *structure, *still, *settings])
    for seed, member in enumerate(together(cases)):
        alone = solo(cases[seed], seed)
        # Another order of operations: Adam amplifies the last digits of small gradients.
        assert distance(member, alone) < 1e-4
        assert member.history[-1]["dev"] == alone.history[-1]["dev"]


def test_members_that_share_an_optimizer_keep_their_states_when_the_stack_shrinks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apecache.sweeps.population.population.is_accelerator", lambda _: True)
    patience = ["schedule.epochs=12", "schedule.patience=1"]
    cases = [[*patience, "optimizer.lr=0.3"], [*patience[:1], "optimizer.lr=0.02"]]
    members = together(cases)
    alone = [solo(case, seed) for seed, case in enumerate(cases)]
    assert members[0].epoch < members[1].epoch == 12
    assert all(distance(m, a) < 1e-4 for m, a in zip(members, alone, strict=True))
    for member, expected in zip(members, alone, strict=True):
        assert member.optimizer is not None
        assert expected.optimizer is not None
        ours = member.optimizer.state_dict()["state"]
        theirs = expected.optimizer.state_dict()["state"]
        for number, state in theirs.items():
            torch.testing.assert_close(ours[number], state, rtol=1e-3, atol=1e-6)


def test_one_draw_of_masks_drops_the_shares_of_each_member() -> None:
    heads = []
    for share in (0.0, 0.25, 0.75):
        spec = HeadSpec(kind="linear", dim=4, input_dropout=share, standardize=False)
        heads.append(build_head(spec, 400, 4))
    stacked = StackedHeads(heads, None)
    dropout: Any = stacked._head.dropout
    dropped = dropout.forward(torch.ones(3, 200, 400))
    for seen, share in zip(dropped, (0.0, 0.25, 0.75), strict=True):
        assert float((seen == 0).float().mean()) == pytest.approx(share, abs=0.01)
        # What stays is scaled up, so that the mean stays.
        assert float(seen.mean()) == pytest.approx(1.0, abs=0.02)


def test_several_heads_side_by_side_are_stacked_too() -> None:
    part = "[{kind='linear', dim=8}, {kind='mlp', dim=4, width=8, dropout=0.1}]"
    sides = [
        text
        for side in ("image", "text")
        for text in (f"{side}.kind=ensemble", f"{side}.parts={part}")
    ]
    cases = [["schedule.epochs=3", *sides, f"optimizer.lr={lr}"] for lr in (1e-2, 1e-3)]
    for seed, member in enumerate(together(cases)):
        assert distance(member, solo(cases[seed], seed)) < 1e-5


def test_images_of_equal_content_are_grouped_as_in_a_solo_run() -> None:
    train = pairs(160, 0, content=True)
    cases = [["schedule.epochs=2"]] * 2
    for seed, member in enumerate(together(cases, train=train)):
        assert distance(member, solo(cases[seed], seed, train)) < 1e-5


def test_a_member_that_stops_early_leaves_the_stack_and_equals_its_solo_run() -> None:
    patience = ["schedule.epochs=12", "schedule.patience=1"]
    cases = [
        [*patience, "optimizer.lr=0.3"],
        [*patience, "optimizer.lr=0.3"],
        [*patience[:1], "optimizer.lr=0.02"],
    ]
    members = together(cases)
    alone = [solo(case, seed) for seed, case in enumerate(cases)]
    assert [m.epoch for m in members] == [a.epoch for a in alone]
    assert members[0].epoch < members[2].epoch == 12
    assert all(distance(m, a) < 1e-5 for m, a in zip(members, alone, strict=True))


def test_dropped_members_keep_their_weights_and_the_stack_shrinks() -> None:
    made = [make(["schedule.epochs=6"], seed) for seed in range(4)]
    members = [training for training, _ in made]
    plan = made[0][1]
    with seeded(0, CPU):
        population = Population(members, MemberGenerators.seeded([1, 2, 3, 4], CPU), plan)
        for _ in range(2):
            population.epoch(TRAIN, DEV)
        before = {i: weights(members[i]) for i in (0, 2)}
        population.drop([0, 2])
        sizes = [len(stack.value) for group in population.groups for stack in group.heads[0].joined]
        assert sizes == [2] * len(sizes)
        for _ in range(4):
            population.epoch(TRAIN, DEV)
    for i in (0, 2):
        assert members[i].epoch == 2
        assert all(
            torch.equal(weights(members[i])[name], value) for name, value in before[i].items()
        )
    for i in (1, 3):
        assert members[i].epoch == 6
        assert distance(members[i], solo(["schedule.epochs=6"], i)) < 1e-5


def test_a_member_whose_loss_is_not_finite_leaves_and_disturbs_no_other() -> None:
    cases = [["optimizer.lr=3e38", "schedule.warmup=0"], ["optimizer.lr=0.02", "schedule.warmup=0"]]
    made = [make(settings, seed) for seed, settings in enumerate(cases)]
    members = [training for training, _ in made]
    failures = train_together(
        members,
        streams=MemberGenerators.seeded([1, 2], CPU),
        train=TRAIN,
        dev=DEV,
        plan=made[0][1],
        n_epochs=1000,
    )
    assert list(failures) == [0]
    assert "not finite at step 2" in failures[0]
    assert distance(members[1], solo(cases[1], 1)) < 1e-5


def test_a_population_that_is_cut_in_two_goes_on_as_if_whole() -> None:
    cases = [[*MLP, "schedule.epochs=6", "image.dropout=0.2"]] * 2
    whole = together(cases)
    made = [make(settings, seed) for seed, settings in enumerate(cases)]
    members = [m for m, _ in made]
    plan = made[0][1]
    streams = MemberGenerators.seeded([1, 2], CPU)
    train_together(members, streams=streams, train=TRAIN, dev=DEV, plan=plan, n_epochs=2)
    tensors = []
    states = []
    for i, member in enumerate(members):
        with streams.use(i):
            tensors.append({name: t.clone() for name, t in member.tensors().items()})
            states.append(member.state())
    again = [make(settings, 7)[0] for settings in cases]  # another beginning, all of it replaced
    later = MemberGenerators.seeded([8, 9], CPU)
    for i, member in enumerate(again):
        with later.use(i):
            member.restore(tensors[i], states[i])
    train_together(again, streams=later, train=TRAIN, dev=DEV, plan=plan, n_epochs=1000)
    for member, expected in zip(again, whole, strict=True):
        assert all(
            torch.equal(weights(member)[name], value) for name, value in weights(expected).items()
        )


@pytest.mark.parametrize("slab_bytes", [1, 2**14])
def test_the_size_of_slabs_changes_no_member(
    slab_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("apecache.sweeps.population.population.SLAB_BYTES", slab_bytes)
    cases = [[*MLP, *settings_of(i), "schedule.epochs=6", "optimizer.lr=0.01"] for i in range(3)]
    for seed, member in enumerate(together(cases)):
        assert distance(member, solo(cases[seed], seed)) < 1e-5


def test_features_are_standardized_once_only_where_all_heads_see_them_alike() -> None:
    members = [make([], seed)[0] for seed in range(3)]
    plan = make([], 0)[1]
    population = Population(members, MemberGenerators.seeded([1, 2, 3], CPU), plan)
    assert population._standardized(TRAIN) is population._standardized(TRAIN) is not TRAIN
    for settings in (
        ["image.standardize=false"],
        ["augmentation.noise=0.1"],
        ["loss.structure=1.0"],
    ):
        other = [*members[:2], make(settings, 2)[0]]
        assert (
            Population(other, MemberGenerators.seeded([1, 2, 3], CPU), plan)._standardized(TRAIN)
            is TRAIN
        )


@pytest.mark.parametrize("count", [1, 3])
def test_a_killed_population_goes_on_from_its_checkpoint_failed_members_included(
    count: int,
    tmp_path: Path,
) -> None:
    cases = [
        ["schedule.warmup=0", "schedule.epochs=6", f"optimizer.lr={lr}"]
        for lr in (0.02, 3e38, 0.01)
    ][:count]

    def fresh(first_seed: int) -> tuple[list[HeadFit], MemberGenerators, StepCount]:
        made = [make(settings, first_seed + seed) for seed, settings in enumerate(cases)]
        return (
            [m for m, _ in made],
            MemberGenerators.seeded([first_seed + s + 1 for s in range(count)], CPU),
            made[0][1],
        )

    members, streams, plan = fresh(0)
    whole = train_together(members, streams=streams, train=TRAIN, dev=DEV, plan=plan, n_epochs=1000)

    def stop_after_three() -> None:
        save_checkpoint(tmp_path, *members_state(broken, going))
        if broken[0].epoch == 3:
            raise KeyboardInterrupt

    broken, going, _ = fresh(0)
    with pytest.raises(KeyboardInterrupt):
        train_together(
            broken,
            streams=going,
            train=TRAIN,
            dev=DEV,
            plan=plan,
            n_epochs=1000,
            save=stop_after_three,
        )
    again, streams, _ = fresh(50)
    restore_members(again, streams, *load_checkpoint(tmp_path))
    assert again[0].epoch == 3
    assert (
        train_together(again, streams=streams, train=TRAIN, dev=DEV, plan=plan, n_epochs=1000)
        == whole
    )
    for i in set(range(count)) - set(whole):
        assert all(
            torch.equal(weights(again[i])[name], value)
            for name, value in weights(members[i]).items()
        )
    assert list(whole) == [1][: count - 1]
    with pytest.raises(RunError, match="not one of these members"):
        restore_members([*again, *again], streams, *load_checkpoint(tmp_path))


def test_members_that_differ_in_structure_or_steps_are_set_apart() -> None:
    different = [
        [],
        ["image.kind=mlp"],
        ["schedule.batch_size=16"],
        ["schedule.epochs=7"],
        ["optimizer.lr=0.5"],
    ]
    made = [make(settings, 0) for settings in different]
    members = [m for m, _ in made]
    plans = [p for _, p in made]
    assert split_members(members, plans=plans, train=TRAIN, most=16, max_bytes=2**40) == [
        [0, 4],
        [1],
        [2],
        [3],
    ]
    logits, each = member_bytes(members[0], TRAIN)
    many = [make([], seed) for seed in range(7)]
    split: Any = split_members(
        [m for m, _ in many],
        plans=[p for _, p in many],
        train=TRAIN,
        most=16,
        max_bytes=logits + 3 * each,
    )
    assert split == [[0, 1, 2], [3, 4, 5], [6]]
    assert split_members(
        [m for m, _ in many],
        plans=[p for _, p in many],
        train=TRAIN,
        most=5,
        max_bytes=2**40,
    ) == [[0, 1, 2, 3, 4], [5, 6]]
    assert (
        len(
            split_members(
                [m for m, _ in many],
                plans=[p for _, p in many],
                train=TRAIN,
                most=16,
                max_bytes=0,
            )
        )
        == 7
    )


def test_dictionaries_train_alone() -> None:
    assert structure_of(build_head(HeadSpec(kind="dictionary", dim=4), 12, 4)) is None
