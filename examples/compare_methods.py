r"""Compare encoders, heads and losses as a paper does: several seeds, intervals, significance.

    python examples/compare_methods.py pairs.tsv --out comparison \
        --image timm:vit_small_patch14_dinov2.lvd142m \
        --image timm:vit_base_patch16_clip_224.openai \
        --text hf:sentence-transformers/all-MiniLM-L6-v2

The table has the columns `image`, `caption` and `split`, with `train` and `val`. Without a column
`split`, add `--val .1`. Epochs are chosen on a dev split that is drawn from `train`; `val` is only
reported. Every image encoder meets every head, with every seed. The head
`two-layers` and the loss `margin` are not part of apecache: they are registered below.

Interrupt at any time and run the same command to resume. The table is printed, and written to
`OUT/comparison.md`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import apecache
from apecache.losses.contrastive import Groups

METHODS = {
    "closed form": ("cca", ()),
    "linear": ("lilt-projection", ()),
    "two layers": ("projection", ("image.kind=custom", "image.custom=two-layers")),
    "margin loss": ("lilt-projection", ("loss.kind=custom", "loss.custom=margin")),
}
"""Recipe and settings by the name of the method."""
REFERENCE = "linear"
"""The method that all others are compared with."""


@apecache.register_head("two-layers")
class TwoLayers(nn.Sequential):
    """A head of one's own: any module from (in_dim, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, 256), nn.GELU(), nn.Linear(256, out_dim))


@apecache.register_loss("margin")
def margin_loss(image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
    """A loss of one's own: the weakest right pair is to be .2 closer than the hardest wrong one."""
    cosines = image @ text.T
    if groups is None:
        same = torch.eye(len(image), dtype=torch.bool, device=image.device)
    else:
        same = groups.image[:, None] == groups.text[None, :]
    wrong = cosines.masked_fill(same, -1)
    right = cosines.masked_fill(~same, 1)
    image_losses = (0.2 + wrong.amax(dim=1) - right.amin(dim=1)).relu()
    text_losses = (0.2 + wrong.amax(dim=0) - right.amin(dim=0)).relu()
    return image_losses.mean() + text_losses.mean()


def main() -> None:
    """Extract once, fit everything, and print the table."""
    options = read_options()
    store = extract_features(options)
    runs = fit_all(store, options)
    lines = result_table(store, runs)
    text = "\n".join(lines)
    (options.out / "comparison.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare encoders, heads and losses.")
    parser.add_argument("table", type=Path, help="table with image, caption and split")
    parser.add_argument("--out", type=Path, required=True, help="folder of the store and the runs")
    parser.add_argument("--image", action="append", required=True, help="an image encoder; repeat")
    parser.add_argument("--text", required=True, help="the text encoder")
    parser.add_argument("--val", type=float, help="share of the images to report on")
    parser.add_argument("--seeds", type=int, default=5, help="fits of each method")
    parser.add_argument(
        "--set", action="append", default=[], help="setting of the recipes that train; repeat"
    )
    return parser.parse_args()


def extract_features(options: argparse.Namespace) -> apecache.FeatureStore:
    """Run all encoders once; features that exist are kept."""
    images = [apecache.parse_encoder(name, "image") for name in options.image]
    spec = apecache.ExtractSpec(
        image=tuple(images),
        text=apecache.parse_encoder(options.text, "text"),
    )
    shares: tuple[tuple[str, float], ...] = ()
    if options.val is not None:
        # A hash of each image's path decides, so the split stays when images are added.
        shares = (("train", 1 - options.val), ("val", options.val))
    source = apecache.open_pairs(options.table, apecache.OpenSpec(split_fraction=shares))
    apecache.extract(source, options.out / "store", spec)
    store = apecache.FeatureStore.open(options.out / "store")
    # Before the fits, which would take all images otherwise.
    if "val" not in store.pairs.split_counts():
        raise SystemExit(f"{options.table} has no split `val`: add --val .1, or a column `split`")
    return store


def fit_all(
    store: apecache.FeatureStore,
    options: argparse.Namespace,
) -> dict[tuple[str, str], list[Path]]:
    """Fit every head on every encoder with every seed.

    Returns:
        Run folders, one for each seed, by (name of the image features, method).
    """
    runs: dict[tuple[str, str], list[Path]] = {}
    for array in store.arrays("image"):
        for method, (recipe_name, settings) in METHODS.items():
            recipe = apecache.load_recipe(recipe_name, settings)
            # A closed form with epochs would train on from its solution.
            if recipe.has_steps:
                recipe = apecache.load_recipe(recipe_name, [*settings, *options.set])
            folders = []
            for seed in range(options.seeds):
                folder = options.out / f"{array.name}-{method.replace(' ', '-')}-{seed}"
                # A closed form draws nothing: its seeds would be one run several times.
                if seed and not recipe.has_steps:
                    continue
                # A finished run has its heads; an unfinished one is resumed.
                if not (folder / "head.json").exists():
                    spec = apecache.FitSpec(image_features=array.name, seed=seed)
                    apecache.fit_head(store, recipe, folder, spec)
                folders.append(folder)
            runs[array.name, method] = folders
    return runs


def result_table(
    store: apecache.FeatureStore,
    runs: dict[tuple[str, str], list[Path]],
) -> list[str]:
    """Return the lines of a Markdown table: mean R@1 on val, and the difference to REFERENCE."""
    lines = [
        f"| image encoder | method | seeds | mean R@1 | less {REFERENCE} (95 % interval) | p |",
        "|---|---|---|---|---|---|",
    ]
    for (features, method), folders in runs.items():
        reference = runs[features, REFERENCE]
        if method == REFERENCE:
            # Against another method, for the value alone.
            other = next(name for name in METHODS if name != REFERENCE)
            row = compared(store, folders, runs[features, other])
            cells = [f"{row.value_a:.1f}", "", ""]
        else:
            row = compared(store, folders, reference)
            interval = f"{row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f})"
            cells = [f"{row.value_a:.1f}", interval, f"{row.p_value:.3f}"]
        lines.append(f"| {features} | {method} | {len(folders)} | {' | '.join(cells)} |")
    return lines


def compared(
    store: apecache.FeatureStore,
    runs_a: Sequence[Path],
    runs_b: Sequence[Path],
) -> apecache.MetricDifference:
    """Compare the mean of R@1 in both directions on val, image by image and seed by seed."""
    comparison = apecache.compare_runs(runs_a, runs_b, store, "val")
    return next(row for row in comparison.rows if row.metric == "mean R@1")


if __name__ == "__main__":
    main()
