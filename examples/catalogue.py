r"""Keep a search index of a product catalogue: made once, updated weekly, retrained monthly.

    python examples/catalogue.py products.csv --out catalogue \
        --image timm:vit_small_patch14_dinov2.lvd142m \
        --text hf:sentence-transformers/all-MiniLM-L6-v2

Run it again with the table of the day. The table has the columns `image` and `caption`. Photos and
titles that were encoded before are not encoded again: only what is new costs time. With `--retrain`
the heads are fitted again on all products; without it, the heads stay and the index is updated.

Then serve the index: apecache serve OUT/index --root FOLDER
"""

import argparse
from pathlib import Path

import apecache


def main() -> None:
    """Bring store, heads and index up to the table."""
    options = read_options()
    store = encode_what_is_new(options)
    run = options.out / "run"
    if options.retrain or not (run / "head.json").exists():
        fit_heads(store, run)
        report = apecache.build_index(run, store=store, out=options.out / "index", overwrite=True)
        print(f"index: {report.n_images} photos, {report.n_texts} titles")
    else:
        report = apecache.update_index(run, store=store, out=options.out / "index")
        print(f"index: {report.n_added} rows added, {report.n_removed} removed")
    for query in options.query:
        show(options.out / "index", query)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Keep a search index of a product catalogue.")
    parser.add_argument("table", type=Path, help="table with image and caption")
    parser.add_argument("--out", type=Path, required=True, help="folder of store, heads and index")
    parser.add_argument("--image", required=True, help="the image encoder")
    parser.add_argument("--text", required=True, help="the text encoder")
    parser.add_argument("--retrain", action="store_true", help="fit the heads again")
    parser.add_argument("--query", action="append", default=[], help="words to search for")
    return parser.parse_args()


def encode_what_is_new(options: argparse.Namespace) -> apecache.FeatureStore:
    """Encode photos and titles that the store does not have; the table becomes its newest view."""
    spec = apecache.ExtractSpec(
        image=apecache.parse_encoder(options.image, "image"),
        text=apecache.parse_encoder(options.text, "text"),
    )
    source = apecache.open_pairs(options.table)
    report = apecache.extract(source, options.out / "store", spec)
    for array in report.arrays:
        print(f"{array.modality}: {array.n_encoded} encoded")
    return apecache.FeatureStore.open(options.out / "store")


def fit_heads(store: apecache.FeatureStore, run: Path) -> None:
    """Fit a linear map for each side; the epoch is chosen on a tenth of the products."""
    report = apecache.fit_head(store, "projection", run, apecache.FitSpec(overwrite=True))
    print(f"heads: mean recall {report.dev.mean_recall:.1f} on {report.n_dev_images} dev photos")


def show(index_folder: Path, query: str) -> None:
    """Print the five photos that are nearest to some words."""
    index = apecache.SearchIndex.open(index_folder)
    for result in index.search(query, k=5):
        print(f"{query}: {result.key} ({result.score:.2f})")


if __name__ == "__main__":
    main()
