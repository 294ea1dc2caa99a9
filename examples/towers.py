r"""Train within the encoders on one's own pairs: heads first, then LiT and LilT, compared on val.

    python examples/towers.py pairs.tsv --out towers --val .1 \
        --image timm:vit_small_patch14_dinov2.lvd142m \
        --text hf:sentence-transformers/all-MiniLM-L6-v2

The table has the columns `image` and `caption`. With a column `split` that has `train` and `val`,
leave `--val` out. Epochs are chosen on a dev split that is drawn from `train`; `val` is only
reported. `--set schedule.epochs=1` gives a first impression.

Interrupt at any time and run the same command to resume. The table is printed, and written to
`OUT/towers.md`.
"""

import argparse
from pathlib import Path

import apecache

HEADS = "projection"
"""Recipe of the heads that the towers have to beat."""
METRIC = "mean R@1"


def main() -> None:
    """Encode once, fit heads and towers, and print the table."""
    options = read_options()
    store = encode(options)
    heads = fit_heads(store, options.out / "heads")
    runs = {HEADS: heads}
    for recipe in options.recipe or ["lit", "lilt-j"]:
        runs[recipe] = fit_towers(store, recipe, options)
    text = "\n".join(result_table(store, runs))
    (options.out / "towers.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train heads, LiT and LilT; compare them on val.")
    parser.add_argument("table", type=Path, help="table with image and caption")
    parser.add_argument("--out", type=Path, required=True, help="folder of the store and the runs")
    parser.add_argument("--image", required=True, help="the image encoder")
    parser.add_argument("--text", required=True, help="the text encoder")
    parser.add_argument("--val", type=float, help="share of the images to report on")
    parser.add_argument("--recipe", action="append", help="lit, lilt-j, …; repeat")
    parser.add_argument("--set", action="append", default=[], help="setting of the tower recipes")
    parser.add_argument("--seed", type=int, default=0, help="seed of all fits")
    return parser.parse_args()


def encode(options: argparse.Namespace) -> apecache.FeatureStore:
    """Run both encoders once; features that exist are kept."""
    shares: tuple[tuple[str, float], ...] = ()
    if options.val is not None:
        # A hash of each image's path decides, so the split stays when images are added.
        shares = (("train", 1 - options.val), ("val", options.val))
    source = apecache.open_pairs(options.table, apecache.OpenSpec(split_fraction=shares))
    spec = apecache.ExtractSpec(
        image=apecache.parse_encoder(options.image, "image"),
        text=apecache.parse_encoder(options.text, "text"),
    )
    apecache.extract(source, options.out / "store", spec)
    store = apecache.FeatureStore.open(options.out / "store")
    # Before the fits, which would take all images otherwise.
    if "val" not in store.pairs.split_counts():
        raise SystemExit(f"{options.table} has no split `val`: add --val .1, or a column `split`")
    return store


def fit_heads(store: apecache.FeatureStore, run: Path) -> Path:
    """Fit heads on the cached features, which takes seconds."""
    if not (run / "head.json").exists():
        report = apecache.fit_head(store, HEADS, run)
        print(f"{HEADS}: {report.seconds:.0f} s, nothing encoded again")
    return run


def fit_towers(store: apecache.FeatureStore, recipe: str, options: argparse.Namespace) -> Path:
    """Train within the towers. A side that stays frozen is read from the store."""
    run: Path = options.out / recipe
    # A finished run has its description; an unfinished one is resumed.
    if not (run / "encoder.json").exists():
        loaded = apecache.load_recipe(recipe, options.set)
        spec = apecache.FitEncoderSpec(seed=options.seed)
        report = apecache.fit_encoder(store, loaded, run, spec)
        cached = " and ".join(report.cached) or "nothing"
        print(f"{recipe}: {report.seconds:.0f} s, from the cache: {cached}")
    return run


def result_table(store: apecache.FeatureStore, runs: dict[str, Path]) -> list[str]:
    """Return the lines of a Markdown table: what trained, and recall less that of the heads."""
    lines = [
        f"| recipe | trained parameters | {METRIC} | less {HEADS} (95 % interval) | p |",
        "|---|---|---|---|---|",
    ]
    for recipe, run in runs.items():
        n_trained = apecache.load_run(run).training["n_trained_parameters"]
        if recipe == HEADS:
            # Against another run, for the value alone.
            other = next(path for name, path in runs.items() if name != HEADS)
            row = compared(store, run, other)
            cells = [f"{row.value_a:.1f}", "", ""]
        else:
            row = compared(store, run, runs[HEADS])
            interval = f"{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f})"
            cells = [f"{row.value_a:.1f}", interval, f"{row.p_value:.3f}"]
        lines.append(f"| {recipe} | {n_trained:,} | {' | '.join(cells)} |")
    lines.append(f"| chance | | {row.chance:.1f} | | |")
    return lines


def compared(
    store: apecache.FeatureStore,
    run_a: Path,
    run_b: Path,
) -> apecache.MetricDifference:
    """Compare recalls of two runs on val, image by image."""
    comparison = apecache.compare_runs(run_a, run_b, store, "val")
    return next(row for row in comparison.rows if row.metric == METRIC)


if __name__ == "__main__":
    main()
