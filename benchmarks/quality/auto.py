"""What `apecache auto` finds in a given time, against the default recipe.

    python -m benchmarks.quality.auto --store flickr8k/store --work w --budget 15m
    python -m benchmarks.quality.auto --quick            # made-up features and no time, for a smoke test

The search and three seeds of `projection` train on the same images. The winner is measured on val, which
nothing trained or chose on, and compared with `projection` by a paired interval. The decisions of the
search, on images of the training split that were kept aside, stand in the last rows.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from apecache.auto.budget import parse_duration
from apecache.auto.ladder import AutoReport, AutoSpec, auto_heads
from apecache.evaluate.comparison import compare_hits
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.protocols import retrieval_hits
from apecache.metrics.statistics import RetrievalHits
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import DESCRIPTION, load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.quality.heads import made_up
from benchmarks.record import Goal, print_goals, print_table, write_result

METRIC = "mean R@1"
DEFAULT = "projection"


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        store = FeatureStore.open(made_up(work) if options.quick else options.store)
        splits = SplitSpec(dev="dev" if options.quick else None)
        spec = AutoSpec(
            budget_seconds=parse_duration(options.budget),
            image_features=tuple(options.image_features),
            text_features=tuple(options.text_features),
            splits=splits,
            device="cpu",
        )
        report = auto_heads(store, work / "search", spec)
        rows = compared(store, report, splits=splits, options=options, work=work)
    print_table(rows)
    met = [
        Goal(
            name=f"auto ({report.chosen}): lower end of the difference to {DEFAULT}, mean R@1 on val",
            value=rows[0]["low"],
            target=0.0,
            better="higher",
        )
    ]
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result("quality-auto", goals=met, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A search against the default recipe.")
    parser.add_argument("--store", type=Path, help="a complete store with splits train and val")
    parser.add_argument("--image-features", nargs="+", default=[])
    parser.add_argument("--text-features", nargs="+", default=[])
    parser.add_argument("--budget", default="15m")
    parser.add_argument("--seeds", type=int, default=3, help="fits of the default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep the search and the runs in")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
        options.budget = "1s"
    elif not options.store:
        parser.error("--store is needed (or --quick)")
    return options


def compared(
    store: FeatureStore,
    report: AutoReport,
    splits: SplitSpec,
    options: argparse.Namespace,
    work: Path,
) -> list[dict[str, Any]]:
    """The winner beside the default on its first choice of features, then rungs and decisions."""
    image = store.array("image", (options.image_features or [None])[0])
    text = store.array("text", (options.text_features or [None])[0])
    answers: list[RetrievalHits] = []
    for seed in range(options.seeds):
        run = work / "runs" / f"{DEFAULT}-{seed}"
        if not (run / DESCRIPTION).is_file():
            run.parent.mkdir(parents=True, exist_ok=True)
            spec = FitSpec(image.name, text.name, splits=splits, seed=seed, device="cpu")
            fit_head(store, recipe=load_recipe(DEFAULT), out=run, spec=spec)
        answers.append(answered(run, store))
    winner = [answered(report.run, store)]
    difference = compare_hits(winner, answers, metric=METRIC, chance=0.0)
    first: dict[str, Any] = {
        "case": "auto",
        "chosen": report.chosen,
        METRIC: round(difference.value_a, 2),
        DEFAULT: round(difference.value_b, 2),
        "paired": round(difference.difference, 2),
        "low": round(difference.low, 2),
        "high": round(difference.high, 2),
        "seconds": round(report.spent_seconds),
        "seeds of the default": options.seeds,
        "n_images": winner[0].n_images,
    }
    rungs = [
        {"case": rung.name, "chosen": rung.outcome, "seconds": round(rung.seconds)}
        for rung in report.rungs
        if rung.name not in ("decision", "refit")
    ]
    decisions = [
        {
            "case": "decision",
            "chosen": f"{decision.candidate} against {decision.against}",
            "paired": round(decision.difference.difference, 2),
            "low": round(decision.difference.low, 2),
            "high": round(decision.difference.high, 2),
            "level": round(decision.level, 4),
            "replaced": decision.replaced,
        }
        for decision in report.decisions
    ]
    return [first, *rungs, *decisions]


def answered(run: Path, store: FeatureStore) -> RetrievalHits:
    """The answers of a run on val."""
    embedded = embed_store(load_heads(run), store, "val")
    return retrieval_hits(
        embedded.image,
        embedded.text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )


if __name__ == "__main__":
    main()
