"""What the data doctor finds when captions are exchanged on purpose, and what its keep list is worth.

    python -m benchmarks.quality.curate --store flickr8k/store --image-features … --text-features … --work w
    python -m benchmarks.quality.curate --quick            # made-up features, for a smoke test

A seeded share of the training captions is exchanged among images. `apecache.auto.curate` ranks all
training captions by each of `--detectors`: a closed form, and heads trained in each fold. Heads are
fitted on the clean pairs, on all pairs, and on those that each detector keeps. Dev captions are never
exchanged. Val is only reported.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from apecache.auto.curate import KEEP, CurateReport, CurateSpec, curate
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import DESCRIPTION, load_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.made_up_store import write_feature_store
from benchmarks.quality.heads import made_up
from benchmarks.quality.options import store_parser
from benchmarks.record import Goal, print_goals, print_table, write_result

DEV = "dev"
VAL = "val"
KEPT = "kept by"


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        store = FeatureStore.open(made_up(work) if options.quick else options.store)
        clean, _ = rewritten(store, options=options, folder=work / "clean", share=0.0)
        noisy, wrong = rewritten(store, options=options, folder=work / "noisy", share=options.share)
        cases: list[tuple[str, FeatureStore, Path | None]] = [
            ("clean", clean, None),
            ("exchanged", noisy, None),
        ]
        found: list[dict[str, Any]] = []
        for name in options.detectors:
            folder = work / f"curated-{name}"
            found.append(detected(noisy, wrong, name, folder=folder, n_folds=options.folds))
            cases.append((f"{KEPT} {name}", noisy, folder / KEEP))
        rows: list[dict[str, Any]] = []
        for name in options.recipes:
            for case, of_store, keep in cases:
                rows.append(measured(name, case, of_store, keep, options.seeds, work))
    print_table(found)
    print_table(rows)
    met = goals(found, rows)
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result("quality-curate", goals=met, rows=[*found, *rows], path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = store_parser("Average precision of planted wrong captions.")
    parser.add_argument("--share", type=float, default=0.1, help="of the captions, exchanged")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--detectors",
        nargs="+",
        default=["cca", "projection"],
        help="recipes of the heads that rank captions",
    )
    parser.add_argument("--recipes", nargs="+", default=["cca", "projection"])
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
        options.detectors = ["cca"]
        options.recipes = ["cca"]
    elif not options.store:
        parser.error("--store is needed (or --quick)")
    return options


def rewritten(
    store: FeatureStore,
    options: argparse.Namespace,
    folder: Path,
    share: float,
) -> tuple[FeatureStore, NDArray[np.bool_]]:
    """A store with the same features, named dev images, and a share of the training captions
    exchanged; bool [n_texts], which."""
    table = store.pairs
    generator = np.random.default_rng(0)
    splits = table.splits.astype(object).copy()
    train = np.flatnonzero(splits == "train")
    if DEV not in splits:
        splits[generator.choice(train, min(500, len(train) // 10), replace=False)] = DEV
    candidates = np.flatnonzero(splits[table.image_rows] == "train")
    wrong = np.zeros(len(table.captions), dtype=bool)
    wrong[generator.choice(candidates, round(share * len(candidates)), replace=False)] = True
    order = np.arange(len(table.captions))
    # Every one gets the caption of another: a shift of a random order has no fixed point.
    shuffled = generator.permutation(np.flatnonzero(wrong))
    order[shuffled] = np.roll(shuffled, 1)
    wrong = table.image_rows[order] != table.image_rows
    if not (folder / "records").is_dir():
        text = store.array("text", options.text_features).load()[order].astype(np.float16)
        image = store.array("image", options.image_features).load().astype(np.float16)
        write_feature_store(
            folder,
            image,
            text,
            table.image_rows.tolist(),
            [str(split) for split in splits],
            keys=[str(key) for key in table.keys],
            captions=[str(table.captions[row]) for row in order],
            shard_rows=4096,
        )
    return FeatureStore.open(folder), wrong


def detected(
    store: FeatureStore,
    wrong: NDArray[np.bool_],
    name: str,
    folder: Path,
    n_folds: int,
) -> dict[str, Any]:
    """The row of the detection by a recipe, from the folder if it is there."""
    path = folder / "detection.json"
    if not path.is_file():
        begin = time.process_time()
        spec = CurateSpec(recipe=name, device="cpu", n_folds=n_folds)
        report = curate(store, folder, spec)
        cpu_seconds = round(time.process_time() - begin, 1)
        row_of_recipe = {
            "case": "detection",
            "recipe": name,
            "folds": n_folds,
            **detection(report, wrong),
            "CPU seconds": cpu_seconds,
        }
        path.write_text(json.dumps(row_of_recipe))
    row: dict[str, Any] = json.loads(path.read_text())
    return row


def detection(report: CurateReport, wrong: NDArray[np.bool_]) -> dict[str, Any]:
    """How well the ranking finds the exchanged captions."""
    truth = wrong[report.text_rows]
    flagged = report.scores.posterior >= 0.5
    hits = int((flagged & truth).sum())
    return {
        "captions": len(truth),
        "exchanged": int(truth.sum()),
        "average precision": round(
            float(average_precision_score(truth, report.scores.wrong_share)), 4
        ),
        "chance": round(float(truth.mean()), 4),
        "image share alone": round(
            float(average_precision_score(truth, report.scores.image_share)), 4
        ),
        "estimated share": round(report.share_wrong, 4),
        "left out": int(flagged.sum()),
        "precision": round(hits / max(1, int(flagged.sum())), 4),
        "recall": round(hits / max(1, int(truth.sum())), 4),
    }


def measured(
    name: str,
    case: str,
    store: FeatureStore,
    keep: Path | None,
    seeds: int,
    work: Path,
) -> dict[str, Any]:
    """Mean R@1 on val over seeds."""
    recipe = load_recipe(name)
    ones: list[float] = []
    for seed in range(seeds if recipe.has_steps else 1):
        run = work / "runs" / f"{name}-{case.replace(' ', '-')}-{seed}"
        if not (run / DESCRIPTION).is_file():
            run.parent.mkdir(exist_ok=True)
            spec = FitSpec(splits=SplitSpec(dev=DEV), seed=seed, device="cpu", keep=keep)
            fit_head(store, recipe=recipe, out=run, spec=spec)
        embedded = embed_store(load_heads(run), store, VAL)
        report = retrieval_report(embedded.image, embedded.text, embedded.image_of_text)
        ones.append(report.mean_recall_at_1)
    return {
        "case": case,
        "recipe": name,
        "mean R@1": round(statistics.mean(ones), 2),
        "spread": round(statistics.stdev(ones), 2) if len(ones) > 1 else "-",
        "seeds": len(ones),
    }


def goals(found: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Goal]:
    """Each keep list is to win back some of what the exchange costs."""
    met: list[Goal] = []
    for row in found:
        precision = Goal(
            name=f"average precision of exchanged captions, by {row['recipe']}",
            value=row["average precision"],
            target=0.8,
            better="higher",
        )
        met.append(precision)
    for name in dict.fromkeys(row["recipe"] for row in rows):
        of_case = {row["case"]: row["mean R@1"] for row in rows if row["recipe"] == name}
        for case, recall in of_case.items():
            if case.startswith(KEPT):
                goal = Goal(
                    name=f"{name}: mean R@1 with the pairs {case}",
                    value=recall,
                    target=of_case["exchanged"],
                    better="higher",
                )
                met.append(goal)
    return met


if __name__ == "__main__":
    main()
