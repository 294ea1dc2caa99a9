"""Several processes that fill one store at the same time."""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.injection.kill import check
from benchmarks.reliability.injection.tower import MODALITIES, Towers, TowerSpec, run, tree

WRITERS = 4


@dataclass(kw_only=True)
class WritersResult:
    rounds: int = 0
    commits: int = 0
    killed: int = 0
    wrong: list[str] = field(default_factory=list)


def crowded_rounds(
    towers: Towers,
    folder: Path,
    spec: TowerSpec,
    rounds: int,
    seed: int,
) -> WritersResult:
    """Rounds of four kinds in turn: all writers do all shards; each its own; each a half; and one
    is killed."""
    chance = random.Random(seed)
    result = WritersResult()
    run(folder / "reference", spec)
    wanted = tree(folder / "reference")
    for number in range(rounds):
        store = folder / f"{number}"
        kind = ("same", "disjoint", "overlapping", "one killed")[number % 4]
        runs: list[dict[str, Any]] = [
            {
                "store": store,
                "spec": spec,
                "unsynced": number % 8 < 4,
                "shards": _shares(spec, kind=kind, writer=writer, chance=chance),
            }
            for writer in range(WRITERS)
        ]
        if kind == "one killed":
            runs[0]["kill"] = {
                "nth": chance.randrange(1, 400),
                "when": chance.choice(["before", "halfway", "after"]),
            }
        answers = towers.start(*runs)
        result.rounds += 1
        result.commits += sum(len(answer["done"]) for answer in answers)
        result.killed += sum(answer["killed"] for answer in answers)
        wrong = [answer["error"] for answer in answers if answer["error"]] + check(
            store,
            spec,
            {},
            begun=1,
        )
        again = run(store, spec)
        wrong += [f"left undone: {again}"] if again else []
        wrong += ["the store differs from that of one writer"] if tree(store) != wanted else []
        result.wrong += [f"round {number}, {kind}: {what}" for what in wrong]
        shutil.rmtree(store)
    return result


def edited_rounds(
    towers: Towers,
    folder: Path,
    spec: TowerSpec,
    rounds: int,
    seed: int,
) -> WritersResult:
    """Rounds in which all writers make the same store and edit its table, and one may be killed."""
    chance = random.Random(seed)
    result = WritersResult()
    run(folder / "reference", spec)
    wanted = tree(folder / "reference")
    for number in range(rounds):
        store = folder / f"edited-{number}"
        runs: list[dict[str, Any]] = [{"store": store, "spec": spec} for _ in range(WRITERS)]
        if number % 2:
            nth = chance.randrange(1, 600)
            runs[0]["kill"] = {"nth": nth, "when": chance.choice(["before", "halfway", "after"])}
        answers = towers.start(*runs)
        result.rounds += 1
        result.commits += sum(len(answer["done"]) for answer in answers)
        result.killed += sum(answer["killed"] for answer in answers)
        wrong = [answer["error"] for answer in answers if answer["error"]]
        wrong += check(store, spec, {}, begun=1)
        again = run(store, spec)
        wrong += [f"left undone: {again}"] if again else []
        wrong += ["the store differs from that of one writer"] if tree(store) != wanted else []
        result.wrong += [f"round {number}: {what}" for what in wrong]
        shutil.rmtree(store)
    return result


def _shares(spec: TowerSpec, kind: str, writer: int, chance: random.Random) -> dict[str, list[int]]:
    """Every shard falls to somebody who is not killed."""
    shares = {}
    for modality in MODALITIES:
        shards = list(range(spec.layout(modality).n_shards))
        if kind == "disjoint":
            shards = shards[writer::WRITERS]
        elif kind == "overlapping":
            shards = [shard for shard in shards if (shard + writer) % WRITERS < 2]
        shares[modality] = chance.sample(shards, len(shards))
    return shares
