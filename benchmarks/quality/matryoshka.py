"""What the first values of an embedding are worth, with and without `loss.matryoshka`.

    python -m benchmarks.quality.matryoshka --store store
    python -m benchmarks.quality.matryoshka --quick       # made-up features, for a smoke test

One recipe (`--recipe`, both heads 512 wide) is fitted with and without the nested loss for widths
64, 128 and 256, with the same seeds. Train images fit, a seeded 500 of them choose the epoch, val
is only reported. A row has the R@1 of one width, the mean over seeds and both directions, and its
standard deviation over seeds. Every vector is cut and L2-normalized again, as `apecache index --dim`
does it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.record import Goal, print_goals, print_table, write_result

DIM = 512
WIDTHS = (64, 128, 256)
LOSSES = {"plain": [], "matryoshka": [f"loss.matryoshka={list(WIDTHS)}"]}
Row = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        store = FeatureStore.open(options.store) if options.store else quick_store(work)
        epochs = [] if options.epochs is None else [f"schedule.epochs={options.epochs}"]
        epochs += ["schedule.batch_size=64"] if options.quick else []
        rows = measure(store, work, options.recipe, epochs, options.seeds, options.split)
    by_case = {(row["loss"], row["width"]): row["mean R@1"] for row in rows}
    full = by_case["matryoshka", DIM]
    goals = [
        Goal(
            name="R@1 of 128 values with the nested loss, less that without",
            value=by_case["matryoshka", 128] - by_case["plain", 128],
            target=0.0,
            better="higher",
        ),
        Goal(
            name="R@1 that the nested loss costs the whole embedding",
            value=by_case["plain", DIM] - full,
            target=0.5,
            better="lower",
        ),
    ]
    print_table(rows)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("quality-matryoshka", goals, rows, options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--recipe", default="projection")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of each fit; default: the recipe's")
    parser.add_argument("--split", default="val")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.store or options.quick):
        parser.error("give --store or --quick")
    if options.quick:
        options.seeds = 1
        options.epochs = 1
    return options


def quick_store(work: Path) -> FeatureStore:
    """Write a store of made-up features with something to learn."""
    from benchmarks.made_up_store import write_feature_store

    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 24, generator=generator)
    image = shared @ torch.randn(24, 32, generator=generator)
    text = shared @ torch.randn(24, 48, generator=generator)
    splits = ["train"] * 300 + ["val"] * 100
    store: FeatureStore = write_feature_store(
        work / "store",
        image.numpy(),
        text.numpy(),
        image_rows=list(range(400)),
        splits=splits,
    )
    return store


def measure(
    store: FeatureStore,
    work: Path,
    recipe: str,
    settings: list[str],
    seeds: int,
    split: str,
) -> list[Row]:
    """Return a row per loss and width."""
    rows = []
    for loss, nested in LOSSES.items():
        widths = ["image.dim=512", "text.dim=512"]
        loaded = load_recipe(recipe, [*widths, *settings, *nested])
        recalls: dict[int, list[tuple[float, float]]] = {}
        for seed in range(seeds):
            run = work / f"{loss}-{seed}"
            if not (run / "head.json").is_file():
                fit_head(store, recipe=loaded, out=run, spec=FitSpec(seed=seed, device="cpu"))
            embedded = embed_store(load_heads(run), store, split)
            for width in (*WIDTHS, DIM):
                recalls.setdefault(width, []).append(recall_of(embedded, width))
        rows += [row_of(loss, width, values) for width, values in recalls.items()]
    return rows


def recall_of(embedded: Embeddings, width: int) -> tuple[float, float]:
    """Return R@1 of the first values, image to text and text to image, in per cent."""
    report = retrieval_report(
        F.normalize(embedded.image[:, :width], dim=1),
        F.normalize(embedded.text[:, :width], dim=1),
        embedded.image_of_text,
        relevance=embedded.relevance,
    )
    return report.image_to_text[1], report.text_to_image[1]


def row_of(loss: str, width: int, recalls: list[tuple[float, float]]) -> Row:
    """Average the recalls of all seeds."""
    means = [sum(pair) / 2 for pair in recalls]
    return {
        "loss": loss,
        "width": width,
        "i2t R@1": round(statistics.mean(pair[0] for pair in recalls), 2),
        "t2i R@1": round(statistics.mean(pair[1] for pair in recalls), 2),
        "mean R@1": round(statistics.mean(means), 2),
        "spread": round(statistics.stdev(means), 2) if len(means) > 1 else None,
        "seeds": len(recalls),
        "bytes": 4 * width,
    }


if __name__ == "__main__":
    main()
