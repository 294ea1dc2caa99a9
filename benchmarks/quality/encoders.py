"""What a second image encoder is worth: heads on each alone, side by side, and gated.

    python -m benchmarks.quality.encoders --store flickr8k/store --image-features A B --text-features T --work runs
    python -m benchmarks.quality.encoders --quick            # made-up features, for a smoke test

Train images fit, a seeded 500 of them choose, val is only reported. Runs stay in `--work`; those that
are finished there are not fitted again. `paired` is the difference to the better encoder alone, with
its 95 % interval over seeds and images.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from benchmarks.made_up_store import write_feature_store
from benchmarks.quality.heads import made_up
from benchmarks.record import Goal, print_goals, print_table, write_result

METRIC = "mean R@1"


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        store = two_encoders(work) if options.quick else FeatureStore.open(options.store)
        rows: list[dict[str, Any]] = []
        for recipe in options.recipes:
            rows += measured(store, recipe, options, work)
    print_table(rows)
    met = goals(rows)
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result("quality-encoders", goals=met, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recall of heads on one and on two encoders.")
    parser.add_argument("--store", type=Path, help="a complete store with splits train and val")
    parser.add_argument("--image-features", nargs=2, default=["pixels", "more"])
    parser.add_argument("--text-features", default="words")
    parser.add_argument("--recipes", nargs="+", default=["cca", "projection"])
    parser.add_argument("--joins", nargs="+", default=["concat", "gate"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep the runs in")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
        options.recipes = ["cca"]
    elif not options.store:
        parser.error("--store is needed (or --quick)")
    return options


def measured(
    store: FeatureStore,
    name: str,
    options: argparse.Namespace,
    work: Path,
) -> list[dict[str, Any]]:
    """The rows of a recipe: each encoder alone, then both by every join that the recipe takes."""
    seeds = range(options.seeds if load_recipe(name).has_steps else 1)
    cases = [(features, "concat") for features in options.image_features]
    # Closed forms need the features side by side.
    joins = options.joins if load_recipe(name).init == "random" else ["concat"]
    cases += [(",".join(options.image_features), join) for join in joins]
    hits: dict[tuple[str, str], list[RetrievalHits]] = {}
    rows: list[dict[str, Any]] = []
    for features, join in cases:
        answers: list[RetrievalHits] = []
        seconds: list[float] = []
        for seed in seeds:
            run = work / "runs" / f"{name}-{features}-{join}-{seed}"
            if not (run / DESCRIPTION).is_file():
                run.parent.mkdir(parents=True, exist_ok=True)
                spec = FitSpec(
                    features,
                    text_features=options.text_features,
                    splits=SplitSpec(dev="dev" if options.quick else None),
                    seed=seed,
                    device="cpu",
                )
                recipe = load_recipe(name, [f"image.join={join}"])
                fit_head(store, recipe=recipe, out=run, spec=spec)
            heads = load_heads(run)
            seconds.append(float(heads.training["seconds"]))
            embedded = embed_store(heads, store, "val")
            answers.append(
                retrieval_hits(
                    embedded.image,
                    embedded.text,
                    embedded.image_of_text,
                    relevance=embedded.relevance,
                )
            )
        hits[features, join] = answers
        rows.append(row_of(name, features, join, answers, statistics.median(seconds)))
    alone = max(rows[:2], key=lambda row: row["mean R@1"])
    for row in rows[2:]:
        difference = compare_hits(
            hits[row["features"], row["join"]],
            hits[alone["features"], "concat"],
            metric=METRIC,
            chance=0.0,
        )
        row["paired"] = round(difference.difference, 2)
        row["low"] = round(difference.low, 2)
        row["high"] = round(difference.high, 2)
    return rows


def row_of(
    name: str,
    features: str,
    join: str,
    answers: list[RetrievalHits],
    seconds: float,
) -> dict[str, Any]:
    terms = {"i2t R@1": "image_to_text", "t2i R@1": "text_to_image"}
    row: dict[str, Any] = {"recipe": name, "features": features, "join": join}
    for column, way in terms.items():
        values = [hits.value([(way, 1)]) for hits in answers]  # type: ignore[list-item]
        row[column] = round(statistics.mean(values), 2)
    row["mean R@1"] = round((row["i2t R@1"] + row["t2i R@1"]) / 2, 2)
    row["seconds"] = round(seconds, 1)
    return {**row, "seeds": len(answers), "n_images": answers[0].n_images}


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    return [
        Goal(
            name=f"{row['recipe']}, {row['join']}: lower end of the gain over one encoder",
            value=row["low"],
            target=0.0,
            better="higher",
        )
        for row in rows
        if "low" in row
    ]


def two_encoders(work: Path) -> FeatureStore:
    """The made-up store with a second image encoder."""
    store = FeatureStore.open(made_up(work))
    table = store.pairs
    image = store.array("image").load()
    more = image[:, ::-1] + np.random.default_rng(1).normal(size=image.shape)
    return write_feature_store(  # type: ignore[no-any-return]
        work / "store",
        more.astype(np.float32),
        store.array("text").load(),
        table.image_rows.tolist(),
        [str(split) for split in table.splits],
        names=("more", "words"),
        modalities=("image",),
    )


if __name__ == "__main__":
    main()
