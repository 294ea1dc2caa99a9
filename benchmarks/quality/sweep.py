"""A sweep as one would run it: what it finds on dev, what that is worth on val, and what it costs.

    python -m benchmarks.quality.sweep --store flickr8k/store --work work
    python -m benchmarks.quality.sweep --quick            # made-up features, four trials and one epoch, a smoke test

Trials over recipes, depth, width, rates, decay, dropout, temperature, batch and loss, with halving
from a 27th of the epochs on. The best on dev and the default recipe are then fitted with several
seeds each; val is only reported. Intervals are 95 % of the mean over seeds; the variances over
seeds and over images are added, and the gain is paired over images. What fits of all trials to
their ends would cost is an estimate: the measured seconds of a step of each, one head at a time,
times its steps; without evaluation.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apecache.evaluate.comparison import METRICS, compare_hits
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.protocols import retrieval_hits
from apecache.metrics.retrieval import chance_recalls
from apecache.metrics.statistics import RetrievalHits, estimate_recall
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.sweeps.run import SweepReport, SweepSpec, sweep
from apecache.sweeps.space import Space, load_space
from apecache.train.batches import FeaturePairs, SplitSpec
from apecache.train.fit import HeadFit, StepCount
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.initial import initial_model
from apecache.train.loop import draw_epoch, take_step
from benchmarks.quality.heads import made_up
from benchmarks.record import Goal, print_goals, print_table, write_result

SPACE = Path(__file__).with_name("flickr8k-space.toml")
RECIPES = ("projection", "gated", "mixed")
DEFAULT = "projection"
MINUTES = 30.0
TIMED_STEPS = 2
RUNGS = 4


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        store = FeatureStore.open(made_up(work) if options.quick else options.store)
        space = load_space(quick_space(work) if options.quick else options.space, options.recipes)
        rows, reached = measure(store, space=space, options=options, work=work)
    print_table(rows)
    if not options.quick:
        print_goals(reached)
    if options.json or not options.quick:
        write_result("quality-sweep", goals=reached, rows=rows, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A real sweep: gain over the default recipe, and cost."
    )
    parser.add_argument(
        "--store",
        type=Path,
        help="a complete store of pooled features with splits train and val",
    )
    parser.add_argument("--space", type=Path, default=SPACE)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work",
        type=Path,
        help="folder to keep sweep and runs in; time only an unbroken sweep",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.trials = 4
        options.seeds = 2
    elif not options.store:
        parser.error("--store is needed (or --quick)")
    return options


def quick_space(work: Path) -> Path:
    path = work / "space.toml"
    path.write_text('"schedule.epochs" = {choice = [1]}\n"optimizer.lr" = {log = [5e-4, 8e-3]}\n')
    return path


def measure(
    store: FeatureStore,
    space: Space,
    options: argparse.Namespace,
    work: Path,
) -> tuple[list[dict[str, Any]], list[Goal]]:
    fit = FitSpec(splits=SplitSpec(dev="dev") if options.quick else SplitSpec(), device="cpu")
    spec = SweepSpec(options.trials, halving=True, rungs=RUNGS, keep_going=True, fit=fit)
    begin = time.perf_counter()
    found = sweep(store, space=space, out=work / "sweep", spec=spec)
    seconds = time.perf_counter() - begin
    recipes = {"chosen on dev": space.recipe(found.best.values), "default": default_recipe(options)}
    values = {
        what: on_val(
            store,
            recipe=recipe,
            work=work / what.split()[0],
            seeds=options.seeds,
            fit=fit,
        )
        for what, recipe in recipes.items()
    }
    whole = whole_seconds(store, space=space, found=found, fit=fit)
    cost: dict[str, Any] = {
        "what": "cost",
        "trials": len(found.trials),
        "sweep s": round(seconds, 1),
    }
    cost |= {
        "whole fits s (estimate)": round(whole, 1),
        "estimate / sweep": round(whole / seconds, 2),
    }
    rows = [{"what": what, **summary(hits)} for what, hits in values.items()]
    chance = chance_of(values["default"][0])
    gain = compare_hits(
        values["chosen on dev"],
        values["default"],
        metric="mean R@1",
        chance=chance,
    )
    about = {"seeds": options.seeds, "mean R@1 on val": round(gain.difference, 2)}
    rows.append(
        {
            "what": "gain",
            **about,
            "low": round(gain.low, 2),
            "high": round(gain.high, 2),
            "chance": "-",
        }
    )
    rows[0] |= {
        "trial": found.best.number,
        "recipe": found.best.recipe,
        "settings": " ".join(found.best.settings),
    }
    goals = [
        Goal(
            name=f"minutes of {options.trials} trials",
            value=round(seconds / 60, 2),
            target=MINUTES,
            better="lower",
        ),
        Goal(
            name="lower end of the gain on val",
            value=rows[2]["low"],
            target=0.0,
            better="higher",
        ),
    ]
    return [*rows, cost], goals


def default_recipe(options: argparse.Namespace) -> Recipe:
    return load_recipe(DEFAULT, ["schedule.epochs=1"] if options.quick else [])


def on_val(
    store: FeatureStore,
    recipe: Recipe,
    work: Path,
    seeds: int,
    fit: FitSpec,
) -> list[RetrievalHits]:
    """The answers on val of each seed."""
    found = []
    for seed in range(seeds):
        run = work.with_name(f"{work.name}-{seed}")
        if not (run / "head.json").is_file():
            fit_head(
                store,
                recipe=recipe,
                out=run,
                spec=FitSpec(splits=fit.splits, seed=seed, device="cpu"),
            )
        embedded = embed_store(load_heads(run), store, "val")
        found.append(
            retrieval_hits(
                embedded.image,
                embedded.text,
                embedded.image_of_text,
                relevance=embedded.relevance,
            )
        )
    return found


def summary(hits: Sequence[RetrievalHits]) -> dict[str, Any]:
    """Mean of both R@1, its interval over seeds and images, and chance."""
    estimate = estimate_recall(hits, METRICS["mean R@1"])
    ends = {"low": round(estimate.low, 2), "high": round(estimate.high, 2)}
    value = round(estimate.value, 2)
    return {
        "seeds": len(hits),
        "mean R@1 on val": value,
        **ends,
        "chance": round(chance_of(hits[0]), 2),
    }


def chance_of(hits: RetrievalHits) -> float:
    """Mean of both R@1 of a random order."""
    owners = torch.repeat_interleave(
        torch.arange(hits.n_images),
        torch.from_numpy(hits.captions).long(),
    )
    to_text, to_image = chance_recalls(owners, hits.n_images, (1,))
    return (to_text[1] + to_image[1]) / 2


def whole_seconds(store: FeatureStore, space: Space, found: SweepReport, fit: FitSpec) -> float:
    """Of all trials that did not fail, each fitted to its end."""
    arrays = store.array("image", None), store.array("text", None)
    train, dev = load_splits(store, *arrays, fit.splits, torch.device("cpu"))
    recipes = [space.recipe(trial.values) for trial in found.trials if trial.state != "failed"]
    return sum(
        step_seconds(recipe, train, dev) * StepCount.of(recipe, train).n_steps for recipe in recipes
    )


def step_seconds(recipe: Recipe, train: FeaturePairs, dev: FeaturePairs) -> float:
    """Median of a few steps after the first."""
    training = HeadFit(initial_model(recipe, train=train, dev=dev, seed=0)[0], recipe, 0)
    plan = StepCount.of(recipe, train)
    training.model.train()
    times = []
    for _ in range(TIMED_STEPS + 1):
        batch = next(draw_epoch(training, train, plan))
        begin = time.perf_counter()
        take_step(training, iter([batch]), plan)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
