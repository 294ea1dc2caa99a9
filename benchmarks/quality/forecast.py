"""How far a forecast is off: curves of at most a quarter of the data, continued to all of it.

    python -m benchmarks.quality.forecast --store flickr8k/store --image-features … --text-features …
    python -m benchmarks.quality.forecast --quick          # made-up features, for a smoke test

For each recipe heads are fitted on nested subsets of 1/16 to 1/4 of the training images. The power law
predicts mean R@1 on dev with all of them, which is then measured.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from apecache.auto.fold_fit import select_images
from apecache.auto.forecast import measured_recall, scaled_recipe, subset
from apecache.auto.power_law import predict
from apecache.recipes.recipe import load_recipe
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs, SplitSpec
from apecache.train.head_data import load_splits
from benchmarks.quality.heads import made_up
from benchmarks.quality.options import store_parser
from benchmarks.record import Goal, print_goals, print_table, write_result

SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4)
TARGET = 2.0
"""Points of mean R@1."""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        path = made_up(Path(temporary)) if options.quick else options.store
        store = FeatureStore.open(path)
        train, dev = load_splits(
            store,
            image=store.array("image", options.image_features),
            text=store.array("text", options.text_features),
            spec=SplitSpec(dev="dev" if options.quick else None),
            device=torch.device("cpu"),
        )
        rows: list[dict[str, Any]] = []
        for name in options.recipes:
            curve = measured_curve(name, train=train, dev=dev, options=options)
            rows.append(row_of(name, curve, n_train=len(train), n_dev=len(dev)))
    print_table(rows)
    met = [
        Goal(
            name=f"{row['recipe']}: prediction at four times the images, points off",
            value=abs(row["error"]),
            target=TARGET,
            better="lower",
        )
        for row in rows
    ]
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result("quality-forecast", goals=met, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = store_parser("Error of predictions at full data.")
    parser.add_argument("--recipes", nargs="+", default=["ridge", "procrustes", "projection"])
    options = parser.parse_args()
    if options.quick:
        options.recipes = ["ridge"]
    elif not options.store:
        parser.error("--store is needed (or --quick)")
    return options


def measured_curve(
    name: str,
    train: FeaturePairs,
    dev: FeaturePairs,
    options: argparse.Namespace,
) -> dict[int, list[float]]:
    """Mean R@1 on dev by images and seed; what `--work` holds is not fitted again."""
    recipe = load_recipe(name)
    path = options.work / f"{name}.json" if options.work else None
    known: dict[str, float] = {}
    if path is not None and path.is_file():
        known = json.loads(path.read_text())
    curve: dict[int, list[float]] = {}
    for share in (*SHARES, 1.0):
        size = round(share * len(train))
        for seed in range(options.seeds):
            key = f"{size}-{seed}"
            if key not in known:
                known[key] = measured_recall(
                    scaled_recipe(recipe, share),
                    train=select_images(train, subset(len(train), size, seed)),
                    dev=dev,
                    seed=seed,
                )
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(known))
            curve.setdefault(size, []).append(known[key])
    return curve


def row_of(name: str, curve: dict[int, list[float]], n_train: int, n_dev: int) -> dict[str, Any]:
    """Prediction from the small subsets, and the measurement; recalls are mean R@1 on dev."""
    measured = statistics.mean(curve[n_train])
    known = {size: recalls for size, recalls in curve.items() if size < n_train}
    prediction = predict(known, [n_train])[0]
    row: dict[str, Any] = {"recipe": name}
    row |= {f"{size} images": round(statistics.mean(known[size]), 2) for size in sorted(known)}
    return {
        **row,
        "images": n_train,
        "predicted": round(prediction.recall, 2),
        "low": round(prediction.low, 2),
        "high": round(prediction.high, 2),
        "measured": round(measured, 2),
        "error": round(prediction.recall - measured, 2),
        "inside": prediction.low <= measured <= prediction.high,
        "seeds": len(curve[n_train]),
        "dev images": n_dev,
        "chance": round(100 / n_dev, 2),
    }


if __name__ == "__main__":
    main()
