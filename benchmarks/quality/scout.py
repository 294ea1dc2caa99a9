"""Does a scout tell which encoders and layers a trained head likes? Its criteria beside the R@1 of
trained heads.

    python -m benchmarks.quality.scout --pairs captions.tsv --images timm:/a hf:/b --texts hf:/c hf:/d --work w
    python -m benchmarks.quality.scout --quick            # the drawings of the demo, for a smoke test

Every image cut meets every text cut on a sample of train: the model's output, and the mean of the
tokens after each block where the encoder has blocks. Of that ranking `--heads` places are taken,
equally far apart from the best to the worst, before anything is trained. A head is trained for each
on `--train-images` of train (epochs are chosen on a tenth of them) and measured on `--val-images`
of val. Spearman's rank correlation of each criterion with that R@1, its interval by bootstrap over
the heads, and that of the better half of the heads by itself: far ends are easy to tell apart. All
stays in `--work`; what is finished is not done again.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from apecache.data.pairs import PairSource
from apecache.data.sources import open_pairs
from apecache.encoders.load import shape_tower
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError
from apecache.evaluate.embeddings import embed_store
from apecache.evaluate.scout import ScoutReport, ScoutRow, ScoutSpec, of_split, scout
from apecache.extraction.run import ExtractSpec, extract
from apecache.fingerprint import Modality
from apecache.metrics.geometry import FeatureSimilarity
from apecache.metrics.retrieval import retrieval_report
from apecache.recipes.recipe import load_recipe
from apecache.report.charts.heatmap import render_heat_maps, scout_maps
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.quality.flickr8k import DRAWINGS, packaged
from benchmarks.record import Goal, print_goals, print_table, write_result

RESAMPLES = 2000
BATCH = 256
"""Of so few images the recipe's own would leave one step to an epoch."""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if options.quick:
            make_quick(options, work)
        images, texts = (
            every_cut(names, side)
            for names, side in ((options.images, "image"), (options.texts, "text"))
        )
        source = open_pairs(options.pairs)
        report = scouted(
            source,
            ScoutSpec(images, texts, options.sample, device="cpu", workers=1),
            work,
        )
        chosen = spread(report.rows, options.heads)
        found = [
            trained(source, row=row, cuts=images + texts, chosen=chosen, options=options, work=work)
            for row in chosen
        ]
    rows = [*correlations(found), *found, *ranking(report)]
    for part in (correlations(found), found, ranking(report)[: options.show]):
        print_table(part)
        print()
    if options.json or not options.quick:
        print_goals(goals(rows))
        path = write_result("quality-scout", goals=goals(rows), rows=rows, path=options.json)
        path.with_suffix(".svg").write_text(render_heat_maps(scout_maps(report)), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Rank correlation of a scout's criteria with trained heads."
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        help="captions.tsv with columns image, caption, split (train, val)",
    )
    parser.add_argument("--images", nargs="+", help="image encoders, for example timm:/folder")
    parser.add_argument("--texts", nargs="+", help="text encoders, for example hf:/folder")
    parser.add_argument("--sample", type=int, default=1000, help="images of the scout")
    parser.add_argument(
        "--heads",
        type=int,
        default=12,
        help="pairs of cuts that heads are trained on",
    )
    parser.add_argument(
        "--train-images",
        type=int,
        default=800,
        help="what the heads are trained on",
    )
    parser.add_argument(
        "--val-images",
        type=int,
        default=400,
        help="what the heads are measured on",
    )
    parser.add_argument("--recipe", default="projection")
    parser.add_argument("--show", type=int, default=30, help="rows of the ranking to print")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--work",
        type=Path,
        help="folder to keep the scout, the store and the runs in",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.quick and not (options.pairs and options.images and options.texts):
        parser.error("--pairs, --images and --texts are needed (or --quick)")
    return options


def make_quick(options: argparse.Namespace, work: Path) -> None:
    image, text = packaged(work)
    options.pairs = DRAWINGS
    options.images = [image]
    options.texts = [text]
    options.sample = 100
    options.heads = 3
    options.train_images = 200


def every_cut(names: Sequence[str], modality: Modality) -> tuple[EncoderSpec, ...]:
    """Of each encoder its own output, and the mean of the tokens after each block; convolutional
    networks have none. A text encoder's last block is left out: its mean is the output."""
    cuts: list[EncoderSpec] = []
    for name in names:
        spec = parse_encoder(name, modality)
        try:
            n_blocks = len(shape_tower(spec).blocks)
        except EncoderError:
            n_blocks = 0
        last = n_blocks if modality == "image" else n_blocks - 1
        cuts += [replace(spec, pooling="mean", layer=layer) for layer in range(1, last + 1)] + [
            spec
        ]
    return tuple(cuts)


def scouted(source: PairSource, spec: ScoutSpec, work: Path) -> ScoutReport:
    """The report of an earlier call of the same scout, or a new one, which is kept."""
    path = work / "scout.json"
    asked = {"data": source.digest, **json.loads(json.dumps(asdict(spec)))}
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["asked"] != asked:
            raise SystemExit(
                f"{path} is of other pairs, cuts or another sample; choose another --work"
            )
        rows = [
            ScoutRow(image=r["image"], text=r["text"], likeness=FeatureSimilarity(**r["likeness"]))
            for r in kept["report"].pop("rows")
        ]
        return ScoutReport(rows=tuple(rows), **kept["report"])
    report = scout(of_split(source, None), spec, lambda *about: print("scout", *about, flush=True))
    path.write_text(json.dumps({"asked": asked, "report": asdict(report)}))
    return report


def spread(rows: Sequence[ScoutRow], count: int) -> list[ScoutRow]:
    """So many rows of the ranking, equally far apart, the best and the worst among them."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[place] for place in places]


def trained(
    source: PairSource,
    row: ScoutRow,
    cuts: Sequence[EncoderSpec],
    chosen: Sequence[ScoutRow],
    options: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """The row's criteria, and R@1 on val of a head on its features, fitted now if no finished run
    is kept."""
    store = work / "store"
    run = work / f"{row.image}+{row.text}"
    if not (run / "head.json").is_file():
        wanted = {name for pair in chosen for name in (pair.image, pair.text)}
        images, texts = (
            [c for c in cuts if c.modality == side and c.slug in wanted]
            for side in ("image", "text")
        )
        spec = ExtractSpec(tuple(images), tuple(texts), workers=0, device="cpu")
        extract(sample(source, options.train_images, options.val_images), store, spec)
        changes = [
            f"schedule.batch_size={BATCH}",
            *(["schedule.epochs=2"] if options.quick else []),
        ]
        fit_head(
            FeatureStore.open(store),
            recipe=load_recipe(options.recipe, changes),
            out=run,
            spec=FitSpec(row.image, row.text, device="cpu"),
        )
        print("trained", run.name, flush=True)
    embedded = embed_store(load_heads(run), FeatureStore.open(store), "val")
    report = retrieval_report(
        embedded.image,
        embedded.text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )
    ones = {"trained i2t R@1": report.image_to_text[1], "trained t2i R@1": report.text_to_image[1]}
    about = {
        name: round(value, 2)
        for name, value in {**ones, "trained mean R@1": report.mean_recall_at_1}.items()
    }
    chance = (report.chance_image_to_text[1] + report.chance_text_to_image[1]) / 2
    about["chance mean R@1"] = round(chance, 2)
    return {**criteria(row), **about, "n_images": report.n_images, "n_texts": report.n_texts}


def sample(source: PairSource, n_train: int, n_val: int) -> PairSource:
    """The first so many images of train and of val, each in a seeded order."""
    kept: set[int] = set()
    for split, count in (("train", n_train), ("val", n_val)):
        rows = [row for row, pair in enumerate(source) if pair.split == split]
        kept |= {rows[place] for place in np.random.default_rng(0).permutation(len(rows))[:count]}
    return replace(source, pairs=tuple(pair for row, pair in enumerate(source) if row in kept))


def criteria(row: ScoutRow) -> dict[str, Any]:
    found = row.likeness
    values = {
        "ridge R@1": round(found.recall_at_1, 2),
        "CKA": round(found.cka, 4),
        "mutual kNN": found.mutual_knn,
    }
    return {
        "image": row.image,
        "text": row.text,
        **values,
        "mutual kNN": round(found.mutual_knn, 4),
    }


def ranking(report: ScoutReport) -> list[dict[str, Any]]:
    return [{"rank": rank, **criteria(row)} for rank, row in enumerate(report.rows, 1)]


def correlations(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's, of each criterion with the trained heads' mean R@1."""
    target = np.array([row["trained mean R@1"] for row in found])
    better = target >= np.median(target)
    rows = []
    for name in ("ridge R@1", "CKA", "mutual kNN"):
        values = np.array([row[name] for row in found])
        low, high = interval(values, target)
        half = rank_correlation(values[better], target[better])
        about = {"rank correlation": rank_correlation(values, target), "95 % from": low, "to": high}
        rows.append({"criterion": name, **about, "better half": half, "n_heads": len(found)})
    return rows


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """None where one side is constant."""
    return None if np.ptp(x) == 0 or np.ptp(y) == 0 else round(float(spearmanr(x, y).statistic), 3)


def interval(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """95 %, by bootstrap over the heads."""
    draws = np.random.default_rng(0).integers(len(x), size=(RESAMPLES, len(x)))
    values = [value for draw in draws if (value := rank_correlation(x[draw], y[draw])) is not None]
    if not values:
        return None, None
    low, high = np.quantile(values, [0.025, 0.975])
    return round(float(low), 3), round(float(high), 3)


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    return [
        Goal(
            name="rank correlation of the ridge's R@1 with trained R@1",
            value=rows[0]["rank correlation"],
            target=0.8,
            better="higher",
        )
    ]


if __name__ == "__main__":
    main()
