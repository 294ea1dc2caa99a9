"""Every recipe on pooled features, several seeds each, on one store of features: which heads are
worth their training.

    python -m benchmarks.quality.heads --store flickr8k/store --work runs
    python -m benchmarks.quality.heads --store tokens/store --cut tokens --image-features … --text-features … --work w
    python -m benchmarks.quality.heads --quick            # made-up features and one seed, for a smoke test

Train images fit, a seeded 500 of them choose epochs and settings, val is only reported. A method
that is published with a number of training samples runs with that number (`OWN_SAMPLES`), if
`--own` names it; rows say how many samples were seen and how many are published. Runs stay in
`--work`; those that are finished there are not fitted again, and one that was broken off goes on.
`--keep FILE` takes the rows of recipes that this run does not measure from an earlier result. With
`--cut tokens` the recipes on tokens are measured, and `--pooled` measures `projection` on the pooled
features of the same encoders beside them. References: untuned loops on the same features;
the best of ten heads in each column.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from apecache.evaluate.embeddings import embed_store
from apecache.metrics.retrieval import RetrievalReport, retrieval_report
from apecache.recipes.recipe import Recipe, count_parameters, load_recipe, zoo_names
from apecache.runs.ensemble import ensemble_heads
from apecache.runs.heads import TrainedHeads, load_heads
from apecache.runs.ledger import load_ledger
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.made_up_store import write_feature_store
from benchmarks.quality.options import add_finished, store_parser
from benchmarks.record import Goal, print_goals, print_table, write_result

COMBINATION = ("mixed", "gated", "projection", "projection")
"""Runs put side by side by `apecache ensemble`, the second projection of another seed; chosen on
dev."""
OWN_SAMPLES = {
    "lilt-projection": 69_345 * 128,
    "fusemix": 500 * 5_000_000,
    "sharelock": 5_000 * 16 * 1_024,
}
"""Pairs that a published training goes through, the same pair in each epoch anew: LilT, 15 epochs
of COCO's 591,753 pairs; FuseMix, 500 epochs of about 5 million; ShareLock, 5,000 steps of 16 x
1,024. The others publish none for heads on features like these."""
OWN_SETTINGS = {"sharelock": ["schedule.accumulate=16"]}
"""Of its published training, which the recipe changes for thousands of images. A step accumulates
at most the batches that there are."""
OWN_PATIENCE = 6
"""Evaluations without a better one after which such a run ends. The schedule stays that of all
samples, and the weights are those of the best evaluation: what follows would have to be better
still."""
TARGET = 28.0
REFERENCE = {"i2t R@1": 31.3, "t2i R@1": 22.0, "mean R@1": 25.9}
"""To be reached by the best recipe; the best reference of each column."""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        store = FeatureStore.open(made_up(work) if options.quick else options.store)
        names = options.recipes or [
            name for name in zoo_names() if is_measured(load_recipe(name), options.cut)
        ]
        rows = [
            row for name in names if (row := measure(store, name=name, options=options, work=work))
        ]
        if options.cut == "tokens" and options.pooled:
            options.image_features, options.text_features = options.pooled
            beside = measure(store, name="projection", options=options, work=work)
            rows += [beside] if beside else []
        if options.cut == "pooled":
            rows += combined(store, work, rows)
    rows += kept_rows(options.keep, {row["recipe"] for row in rows})
    rows.sort(key=lambda row: -row["mean R@1"])
    print_table(rows)
    met = goals(rows) if options.cut == "pooled" else token_goals(rows)
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result(
            "quality-heads" if options.cut == "pooled" else "quality-token-heads",
            goals=met,
            rows=rows,
            path=options.json,
        )


def is_measured(recipe: Recipe, cut: str) -> bool:
    """Return whether a recipe works on features of any two encoders, taken at this cut."""
    # A ready-made image-text model needs both sides of that model.
    return recipe.cut == cut and recipe.init != "pretrained"


def parse_arguments() -> argparse.Namespace:
    parser = store_parser("Recall of every recipe on pooled features, from one store.")
    parser.add_argument("--recipes", nargs="+", help="default: every recipe on pooled features")
    parser.add_argument(
        "--own",
        nargs="*",
        default=[],
        choices=sorted(OWN_SAMPLES),
        help="recipes that run with the published number of samples",
    )
    parser.add_argument(
        "--own-evaluations",
        type=int,
        default=60,
        help="on dev, of such a run; more of them see earlier that it gets no better",
    )
    parser.add_argument("--keep", type=Path, help="an earlier result, for recipes not measured")
    parser.add_argument("--cut", choices=("pooled", "tokens"), default="pooled")
    parser.add_argument(
        "--pooled",
        nargs=2,
        metavar=("IMAGE", "TEXT"),
        help="--cut tokens: pooled features beside them",
    )
    parser.add_argument("--epochs", type=int, help="at most so many; rows say so")
    add_finished(parser)
    options = parser.parse_args()
    if options.quick:
        options.seeds = 1
    elif not options.store:
        parser.error("--store is needed (or --quick)")
    return options


def measure(
    store: FeatureStore,
    name: str,
    options: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """Means over seeds; `spread` is the standard deviation over seeds of the mean of both R@1.
    Empty without a run."""
    recipe = shortened(load_recipe(name), 1 if options.quick else options.epochs)
    if name in options.own and not options.quick:
        recipe = with_own_samples(recipe, store, options.own_evaluations)
    seeds = options.seeds if recipe.has_steps else 1
    runs = [work / f"{name}-{seed}" for seed in range(seeds)]
    splits = SplitSpec() if not options.quick else SplitSpec(dev="dev")
    if options.finished:
        runs = [run for run in runs if (run / "head.json").is_file()]
    for seed, run in enumerate(runs):
        if not (run / "head.json").is_file():
            features = (options.image_features, options.text_features)
            fit_head(
                store,
                recipe=recipe,
                out=run,
                spec=FitSpec(*features, splits=splits, seed=seed, device="cpu"),
            )
    heads = [load_heads(run) for run in runs]
    if not heads:
        return {}
    if any(
        _settings(head.training["recipe"]) != _settings(recipe.model_dump(mode="json"))
        for head in heads
    ):
        raise SystemExit(f"{work} holds runs of another version of {name}; choose another --work")
    reports = [report(head, store) for head in heads]
    row = recalls(name, reports)
    row["dev recall"] = round(
        statistics.mean(_mean_recall(head.training["dev"]) for head in heads),
        2,
    )
    row["seconds"] = round(statistics.median(head.training["seconds"] for head in heads), 1)
    arrays = (
        store.array("image", options.image_features),
        store.array("text", options.text_features),
    )
    row["parameters"] = count_parameters(recipe, *(array.dim for array in arrays))
    row |= {"epochs": recipe.schedule.epochs} if options.epochs else {}
    row["samples"] = statistics.mean(seen_samples(run) for run in runs)
    row["published samples"] = OWN_SAMPLES.get(name, "-")
    return {**row, **_counts(reports)}


def with_own_samples(recipe: Recipe, store: FeatureStore, n_evaluations: int) -> Recipe:
    """Train as many steps as the publication; epochs are still those of this data."""
    settings = OWN_SETTINGS.get(recipe.name, [])
    schedule = load_recipe(recipe.name, settings).schedule
    steps = round(OWN_SAMPLES[recipe.name] / (schedule.batch_size * schedule.accumulate))
    n_pairs = len(store.pairs.captions) if schedule.epoch == "pairs" else len(store.pairs.keys)
    n_batches = max(1, n_pairs // schedule.batch_size)
    n_epochs = steps * min(schedule.accumulate, n_batches) / n_batches
    every = max(1, round(n_epochs / n_evaluations))
    return load_recipe(
        recipe.name,
        [
            *settings,
            f"schedule.steps={steps}",
            f"schedule.evaluate_every={every}",
            f"schedule.patience={OWN_PATIENCE}",
        ],
    )


def seen_samples(run: Path) -> int:
    ledger = load_ledger(run)
    return 0 if ledger is None else ledger.n_samples


def kept_rows(path: Path | None, measured: set[str]) -> list[dict[str, Any]]:
    """Rows of an earlier result whose recipes were not measured now, with the commit of that."""
    if path is None:
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in earlier["rows"] if row["recipe"] not in measured]
    return [{"commit": earlier["commit"], **row} for row in rows]


def shortened(recipe: Recipe, epochs: int | None) -> Recipe:
    """With at most so many epochs; closed forms have none."""
    if epochs is None or recipe.schedule.epochs <= epochs:
        return recipe
    return load_recipe(recipe.name, [f"schedule.epochs={epochs}"])


def _settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """Without what is only said about it."""
    return {key: value for key, value in recipe.items() if key not in ("source", "summary")}


def combined(store: FeatureStore, work: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of COMBINATION, if all of its recipes were measured."""
    found = {row["recipe"]: row for row in rows}
    if not set(COMBINATION) <= found.keys():
        return []
    seeds = min(found[name]["seeds"] for name in COMBINATION)
    reports = []
    for seed in range(seeds):
        places = [(name, seed + COMBINATION[:i].count(name)) for i, name in enumerate(COMBINATION)]
        runs = [
            load_heads(work / f"{name}-{number % found[name]['seeds']}") for name, number in places
        ]
        reports.append(report(ensemble_heads(runs), store))
    totals = {
        key: round(sum(found[name][key] for name in COMBINATION), 1)
        for key in ("seconds", "parameters")
    }
    return [
        {
            **recalls(" + ".join(COMBINATION), reports),
            "dev recall": "-",
            **totals,
            **_counts(reports),
        }
    ]


def recalls(name: str, reports: list[RetrievalReport]) -> dict[str, Any]:
    row: dict[str, Any] = {"recipe": name}
    for way, short in (("image_to_text", "i2t"), ("text_to_image", "t2i")):
        row |= {
            f"{short} R@{k}": round(statistics.mean(getattr(r, way)[k] for r in reports), 2)
            for k in (1, 5, 10)
        }
    ones = [r.mean_recall_at_1 for r in reports]
    row["mean R@1"] = round(statistics.mean(ones), 2)
    row["spread"] = round(statistics.stdev(ones), 2) if len(ones) > 1 else "-"
    for way, short in (("image_to_text", "i2t"), ("text_to_image", "t2i")):
        chance = getattr(reports[0], f"chance_{way}")
        row |= {f"chance {short} R@{k}": round(chance[k], 2) for k in (1, 5, 10)}
    return row


def _counts(reports: list[RetrievalReport]) -> dict[str, int]:
    return {"seeds": len(reports), "n_images": reports[0].n_images, "n_texts": reports[0].n_texts}


def report(heads: TrainedHeads, store: FeatureStore) -> RetrievalReport:
    embedded = embed_store(heads, store, "val")
    return retrieval_report(
        embedded.image,
        embedded.text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )


def _mean_recall(dev: dict[str, Any]) -> float:
    return statistics.mean([*dev["image_to_text"].values(), *dev["text_to_image"].values()])


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """The best recipe against the target and the references."""
    best = max(rows, key=lambda row: row["mean R@1"])
    found = [
        Goal(
            name=f"best heads ({best['recipe']}): mean R@1 on val",
            value=best["mean R@1"],
            target=TARGET,
            better="higher",
        )
    ]
    found += [
        Goal(name=f"best heads: {name}", value=best[name], target=target, better="higher")
        for name, target in REFERENCE.items()
    ]
    return found


def token_goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """The best recipe on tokens against `projection` on pooled features of the same encoders, if
    that was measured."""
    tokens = [row["mean R@1"] for row in rows if "tokens" in load_recipe(row["recipe"]).cut]
    pooled = [row["mean R@1"] for row in rows if load_recipe(row["recipe"]).cut == "pooled"]
    return [
        Goal(
            name="best recipe on tokens: mean R@1 on val",
            value=max(tokens),
            target=max(pooled, default=0.1),
            better="higher",
        )
    ]


def made_up(work: Path) -> Path:
    """A store of 80 images with two captions each: two noisy views of a few hidden numbers."""
    import numpy as np

    rng = np.random.default_rng(0)
    splits = ["train"] * 48 + ["dev"] * 16 + ["val"] * 16
    owners = [image for image in range(len(splits)) for _ in range(2)]
    hidden = rng.normal(size=(len(splits), 6))
    image = hidden @ rng.normal(size=(6, 24)) + 0.3 * rng.normal(size=(len(splits), 24))
    text = hidden[owners] @ rng.normal(size=(6, 16)) + 0.3 * rng.normal(size=(len(owners), 16))
    write_feature_store(
        work / "store",
        image.astype(np.float32),
        text.astype(np.float32),
        owners,
        splits,
    )
    return work / "store"


if __name__ == "__main__":
    main()
