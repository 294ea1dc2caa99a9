"""What training the text tower adds to heads: its last blocks, begun with trained heads.

    python -m benchmarks.quality.unfrozen --store flickr8k/store --image-features … --text-features … \
        --tokens … --work runs
    python -m benchmarks.quality.unfrozen --quick            # no tower: only says what would run

For each seed `projection` is fitted on cached features, then `lit-warm` begins with its heads. The
image side is read from the cache; several image features, with commas between, are joined. The text
tower starts from the cached tokens `--tokens`, or with `--text ENCODER` from the captions. Train images
fit, a seeded 500 of them choose the epoch, val is only reported. `by CSLS` is the mean R@1 under another
ranking, which uses all queries at once. Runs stay in `--work`; one that was broken off resumes.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from apecache.encoders.spec import parse_encoder
from apecache.evaluate.comparison import compare_hits
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.csls import csls_report
from apecache.metrics.protocols import retrieval_hits
from apecache.metrics.statistics import RetrievalHits
from apecache.recipes.recipe import load_recipe
from apecache.runs.encoders import DESCRIPTION as TOWER_RUN
from apecache.runs.folder import read_history
from apecache.runs.heads import DESCRIPTION as HEAD_RUN
from apecache.runs.heads import load_heads
from apecache.runs.ledger import load_ledger
from apecache.runs.load import Run, load_run
from apecache.store.reader import FeatureStore
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.quality.options import store_parser
from benchmarks.record import Goal, print_goals, print_table, write_result

RECIPE = "lit-warm"
METRIC = "mean R@1"


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    recipe = load_recipe(RECIPE, settings_of(options))
    if options.quick:
        print(f"{recipe.name}: {recipe.schedule.epochs} epochs of {recipe.schedule.batch_size}")
        return
    store = FeatureStore.open(options.store)
    answers: dict[str, list[RetrievalHits]] = {"projection": [], recipe.name: []}
    csls: dict[str, list[float]] = {"projection": [], recipe.name: []}
    curves: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        heads = options.work / f"projection-{seed}"
        towers = options.work / f"{recipe.name}-{seed}"
        fit_both(store, options, heads, towers, seed)
        for name, run in (("projection", heads), (recipe.name, towers)):
            hits, csls_recall = answered(load_run(run), store)
            answers[name].append(hits)
            csls[name].append(csls_recall)
        for line in read_history(towers):
            curves.append(
                {
                    "seed": seed,
                    "epoch": line["epoch"],
                    "loss": line["loss"],
                    "dev mean recall": round(line["dev"]["mean_recall"], 2),
                    "seconds": round(line["seconds"], 1),
                }
            )
    rows: list[dict[str, Any]] = []
    for name, hits in answers.items():
        rows.append(row_of(name, hits, costs_of(name, options)))
        rows[-1]["by CSLS"] = round(statistics.mean(csls[name]), 2)
    difference = compare_hits(
        answers[recipe.name],
        answers["projection"],
        metric=METRIC,
        chance=0.0,
    )
    rows[1] |= {
        "paired": round(difference.difference, 2),
        "low": round(difference.low, 2),
        "high": round(difference.high, 2),
    }
    print_table(rows)
    print_table(curves)
    met = [
        Goal(
            name="text tower trained: mean R@1 on val",
            value=rows[1][METRIC],
            target=options.target,
            better="higher",
        )
    ]
    print_goals(met)
    write_result("quality-unfrozen", goals=met, rows=[*rows, *curves], path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = store_parser("Recall with a trained text tower.")
    parser.add_argument("--tokens", help="cached tokens that the text tower starts from")
    parser.add_argument("--text", help="the text encoder, if it runs from the captions")
    parser.add_argument("--join", default="concat", help="how several image features are joined")
    parser.add_argument("--target", type=float, default=33.0, help="mean R@1 on val to reach")
    parser.add_argument("--autocast", default="bfloat16", help="computation of the tower")
    parser.add_argument("--set", action="append", default=[], help="setting of lit-warm")
    parser.add_argument("--slice", type=int, default=64)
    options = parser.parse_args()
    has_tower = bool(options.text) != bool(options.tokens)
    if not options.quick and not (options.store and has_tower and options.work):
        parser.error("--store, --work, and --tokens or --text are needed (or --quick)")
    return options


def settings_of(options: argparse.Namespace) -> list[str]:
    """Return the settings of the recipe of the tower."""
    return [f"image.join={options.join}", *options.set]


def fit_both(
    store: FeatureStore,
    options: argparse.Namespace,
    heads: Path,
    towers: Path,
    seed: int,
) -> None:
    """Fit the heads, then the tower; finished runs are not fitted again."""
    if not (heads / HEAD_RUN).is_file():
        spec = FitSpec(
            options.image_features,
            text_features=options.text_features,
            seed=seed,
            device="cpu",
        )
        recipe = load_recipe("projection", [f"image.join={options.join}"])
        fit_head(store, recipe=recipe, out=heads, spec=spec)
    if not (towers / TOWER_RUN).is_file():
        tower_spec = FitEncoderSpec(
            text=parse_encoder(options.text, "text") if options.text else None,
            image_features=options.image_features,
            text_features=options.tokens,
            seed=seed,
            slice_size=options.slice,
            autocast=options.autocast,
            device="cpu",
            init_from=heads,
        )
        recipe = load_recipe(RECIPE, settings_of(options))
        fit_encoder(store, recipe=recipe, out=towers, spec=tower_spec)


def answered(run: Run, store: FeatureStore) -> tuple[RetrievalHits, float]:
    """Return the answers of a run on val by the cosine, and the mean R@1 by CSLS."""
    embedded = embed_store(run, store, "val")
    tensors = (embedded.image, embedded.text, embedded.image_of_text)
    hits = retrieval_hits(*tensors, relevance=embedded.relevance)
    report = csls_report(*tensors, relevance=embedded.relevance)
    return hits, (report.image_to_text[1] + report.text_to_image[1]) / 2


def costs_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the median seconds of the fits of all seeds, and the parameters that one trains."""
    seconds: list[float] = []
    n_parameters = 0
    for seed in range(options.seeds):
        run = options.work / f"{name}-{seed}"
        ledger = load_ledger(run)
        assert ledger is not None
        seconds.append(ledger.seconds)
        if (run / HEAD_RUN).is_file():
            n_parameters = int(load_heads(run).training["n_trained_parameters"])
        else:
            description = json.loads((run / TOWER_RUN).read_text(encoding="utf-8"))
            n_parameters = int(description["n_trained_parameters"])
    return {"seconds": round(statistics.median(seconds), 1), "parameters": n_parameters}


def row_of(name: str, hits: list[RetrievalHits], costs: dict[str, Any]) -> dict[str, Any]:
    i2t = statistics.mean(seed_hits.value([("image_to_text", 1)]) for seed_hits in hits)
    t2i = statistics.mean(seed_hits.value([("text_to_image", 1)]) for seed_hits in hits)
    return {
        "recipe": name,
        "i2t R@1": round(i2t, 2),
        "t2i R@1": round(t2i, 2),
        METRIC: round((i2t + t2i) / 2, 2),
        **costs,
        "seeds": len(hits),
        "n_images": hits[0].n_images,
    }


if __name__ == "__main__":
    main()
