"""What the recommended head is worth: retrieval on Flickr8k, language by language, zero-shot, and
what a probe finds.

    python -m benchmarks.quality.flickr8k --pairs captions.tsv --image timm:/folder --text hf:/folder --work w \
        --labels labels.tsv --multilingual captions_multilingual.tsv --multilingual-text hf:/folder
    python -m benchmarks.quality.flickr8k --quick            # the drawings of the demo and one seed, for a smoke test

Four tables of one recipe. Train images fit, a seeded 500 of them choose the epoch, val is only
reported. Intervals are of 95 %: over images for each run, and over seeds and images for their mean.
The heads of the second table learn English captions alone, by a text encoder of many languages:
each language has one caption of each of the same images; how they were translated stands beside
them. The labeled images are classified zero-shot with one prompt and with CLIP's ensembles, and
probed before and after the head; probes learn on `--probe-train-split`. All stays in `--work`, and
what is finished there is not done again; `--store` and `--runs` take the place of what would be
made of `--pairs`. Reference: one untuned loop on the same two encoders (linear to 512 on both
sides, float32, last epoch, one seed).
"""

import argparse
import csv
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from apecache.data.pairs import Pair, PairSource
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.evaluate.labeled import LabeledSpec, labeled_features
from apecache.evaluate.probe import probe_features
from apecache.evaluate.prompts import TEMPLATES, find_templates
from apecache.evaluate.zeroshot import ZeroShotSpec, zero_shot
from apecache.extraction.run import ExtractSpec, extract
from apecache.metrics.protocols import measure_languages, measure_retrieval
from apecache.metrics.retrieval import RetrievalReport
from apecache.metrics.statistics import RetrievalHits, Way, estimate_recall
from apecache.recipes.recipe import load_recipe
from apecache.runs.heads import TrainedHeads, load_heads
from apecache.store.reader import FeatureStore
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.record import Goal, print_goals, print_table, write_result

REFERENCE = {"i2t R@1": 26.8, "t2i R@1": 21.1}
DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings" / "pairs.tsv"
WAYS: tuple[tuple[Way, str], ...] = (("image_to_text", "i2t"), ("text_to_image", "t2i"))
Row = dict[str, Any]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        if options.quick:
            make_quick(options)
        tables = measure(options)
    for table in tables:
        print_table(table)
        print()
    met = goals(tables[0])
    if not options.quick:
        print_goals(met)
    if options.json or not options.quick:
        write_result(
            "quality-flickr8k",
            goals=met,
            rows=[row for table in tables for row in table],
            path=options.json,
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Retrieval, languages, zero-shot and probes of one recipe."
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        help="captions.tsv with columns image, caption, split (train, val)",
    )
    parser.add_argument("--image", help="image encoder, for example timm:/folder")
    parser.add_argument("--text", help="text encoder, for example hf:/folder")
    parser.add_argument("--store", type=Path, help="a complete store in place of that of --pairs")
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        default=[],
        help="finished runs in place of new fits",
    )
    parser.add_argument(
        "--multilingual",
        type=Path,
        help="more captions of --pairs' images: image, caption, lang, kind",
    )
    parser.add_argument(
        "--multilingual-text",
        help="text encoder of many languages; learns --pairs' captions only",
    )
    parser.add_argument(
        "--multilingual-prefix",
        default="query: ",
        help="text before every caption; the default is that of E5",
    )
    parser.add_argument("--multilingual-seeds", type=int, default=1)
    parser.add_argument(
        "--labels",
        type=Path,
        help="labeled images for zero-shot classification and probes",
    )
    parser.add_argument("--labels-split", default="test")
    parser.add_argument("--probe-train-split", default="train")
    parser.add_argument("--recipe", default="projection")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder to keep the store and the runs in")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.quick and not (options.pairs and options.image and options.text):
        parser.error("--pairs, --image and --text are needed (or --quick)")
    return options


def make_quick(options: argparse.Namespace) -> None:
    """The drawings with their categories, one seed, two epochs, and their own words as the second
    language."""
    options.pairs = DRAWINGS
    options.seeds = 1
    options.image, options.text = packaged(options.work)
    options.multilingual_text = options.text
    options.multilingual = options.work / "again.tsv"
    lines = ["image\tcaption\tsplit\tlang\tkind"]
    lines += [f"{p.key}\t{p.captions[0]}\t{p.split}\txx\tmachine" for p in open_pairs(DRAWINGS)]
    options.multilingual.write_text("\n".join(lines), encoding="utf-8")
    options.labels = DRAWINGS
    options.labels_split = "val"
    options.probe_train_split = "train"


def packaged(work: Path) -> tuple[str, str]:
    from apecache.encoders.packaged import write_packaged_encoders

    image, text = write_packaged_encoders(work.resolve() / "encoders")
    return f"timm:{image}", f"hf:{text}"


def measure(options: argparse.Namespace) -> list[list[Row]]:
    image = parse_encoder(options.image, "image")
    text = parse_encoder(options.text, "text")
    source = open_pairs(options.pairs)
    store = (
        FeatureStore.open(options.store)
        if options.store
        else extracted(source, store=options.work / "store", image=image, text=text)
    )
    runs = [load_heads(run) for run in options.runs]
    runs = runs or [
        fitted(options, store=store, image=image, text=text, seed=seed)
        for seed in range(options.seeds)
    ]
    tables = [retrieval_rows(options.recipe, runs, store)]
    if options.multilingual:
        tables.append(language_rows(options, source, image))
    if options.labels:
        found = labels_of(options, image)
        tables += [
            zeroshot_rows(runs, found, options.labels_split),
            probe_rows(runs, found, options),
        ]
    return tables


def extracted(
    source: PairSource,
    store: Path,
    image: EncoderSpec,
    text: EncoderSpec,
) -> FeatureStore:
    """Features of both; a second text encoder's stand beside those of the first."""
    extract(source, store, ExtractSpec(image, text, workers=0, device="cpu", add=store.exists()))
    return FeatureStore.open(store)


def fitted(
    options: argparse.Namespace,
    store: FeatureStore,
    image: EncoderSpec,
    text: EncoderSpec,
    seed: int,
) -> TrainedHeads:
    """The finished run of this text encoder and seed, or a new one."""
    run = options.work / f"{options.recipe}-{text.slug}-{seed}"
    recipe = load_recipe(options.recipe, ["schedule.epochs=2"] if options.quick else [])
    if not (run / "head.json").is_file():
        fit_head(
            store,
            recipe=recipe,
            out=run,
            spec=FitSpec(image.slug, text.slug, seed=seed, device="cpu"),
        )
        print("fitted", run.name, flush=True)
    return load_heads(run)


def retrieval_rows(name: str, runs: Sequence[TrainedHeads], store: FeatureStore) -> list[Row]:
    """A row for each run, with its intervals, and their mean; `spread` is the standard deviation
    over runs of the mean of both R@1. Chance last."""
    rows: list[Row] = []
    reports: list[RetrievalReport] = []
    hits: list[RetrievalHits] = []
    for number, run in enumerate(runs):
        embedded = embed_store(run, store, "val")
        about = vectors(embedded)
        measured = measure_retrieval(*about, relevance=embedded.relevance)
        reports.append(measured.report)
        hits.append(measured.hits)
        intervals = measured.intervals
        row = {"table": "retrieval", "what": f"{name}, seed {number}", **recalls(reports[-1])}
        for way, short in WAYS:
            row[f"{short} R@1, 95 %"] = "{:.1f} to {:.1f}".format(*getattr(intervals, way)[1])
            row[f"{short} median rank"] = getattr(intervals, f"median_rank_{way}")
        rows.append({**row, "n_images": reports[-1].n_images, "n_texts": reports[-1].n_texts})
    return [mean_row(name, reports, hits), *rows, chance_row(reports[0])]


def mean_row(name: str, reports: Sequence[RetrievalReport], hits: Sequence[RetrievalHits]) -> Row:
    ones = [report.mean_recall_at_1 for report in reports]
    row: Row = {
        "table": "retrieval",
        "what": f"{name}, mean of {len(reports)}",
        **averaged(map(recalls, reports)),
    }
    row["spread"] = round(statistics.stdev(ones), 2) if len(ones) > 1 else "-"
    for way, short in WAYS:
        estimate = estimate_recall(hits, [(way, 1)])
        row[f"{short} R@1, 95 %"] = f"{estimate.low:.1f} to {estimate.high:.1f}"
    return row


def chance_row(report: RetrievalReport) -> Row:
    chances = ((report.chance_image_to_text, "i2t"), (report.chance_text_to_image, "t2i"))
    found = {
        f"{short} R@{k}": round(value, 2)
        for chance, short in chances
        for k, value in chance.items()
    }
    return {"table": "retrieval", "what": "chance", **found}


def recalls(report: RetrievalReport) -> Row:
    row: Row = {
        f"{short} R@{k}": round(getattr(report, way)[k], 2)
        for way, short in WAYS
        for k in (1, 5, 10)
    }
    return {**row, "mean R@1": round(report.mean_recall_at_1, 2)}


def averaged(rows: Any) -> Row:
    """Means of what is a number in all rows."""
    listed = list(rows)
    return {key: round(statistics.mean(row[key] for row in listed), 2) for key in listed[0]}


def vectors(embedded: Embeddings) -> tuple[Any, Any, Any]:
    return embedded.image, embedded.text, embedded.image_of_text


def language_rows(options: argparse.Namespace, source: PairSource, image: EncoderSpec) -> list[Row]:
    """Val in every language, by heads that have seen English captions only: means over seeds."""
    text = replace(
        parse_encoder(options.multilingual_text, "text"),
        prefix=options.multilingual_prefix,
    )
    english = extracted(source, store=options.work / "store", image=image, text=text)
    runs = [
        fitted(options, store=english, image=image, text=text, seed=seed)
        for seed in range(options.multilingual_seeds)
    ]
    store = extracted(
        many_languages(options.multilingual, source),
        store=options.work / "languages",
        image=image,
        text=text,
    )
    found = []
    for run in runs:
        embedded = embed_store(run, store, "val")
        languages = [str(store.pairs.languages[row]) for row in embedded.text_rows]
        measured = measure_languages(
            *vectors(embedded),
            languages,
            relevance=embedded.relevance,
        )
        found.append({name: measurement.report for name, measurement in measured.items()})
    kinds = caption_kinds(options.multilingual)
    rows = []
    for language, report in found[0].items():
        about: Row = {
            "table": "languages",
            "language": language,
            "captions": kinds.get(language, "human, learned"),
        }
        about |= averaged(recalls(reports[language]) for reports in found)
        chance = {
            key: value
            for key, value in chance_row(report).items()
            if key.startswith(("i2t", "t2i"))
        }
        about |= {f"chance {name}": value for name, value in chance.items()}
        rows.append({**about, "n_images": report.n_images, "seeds": len(runs), "text": text.slug})
    return sorted(rows, key=lambda row: -row["mean R@1"])


def many_languages(table: Path, source: PairSource) -> PairSource:
    """Val images that have a caption in every language, one of each, the first of `source` as `en`
    before them."""
    english = {pair.key: pair.captions[0] for pair in source}
    others = open_pairs(table, OpenSpec(root=table.parent))
    wanted = {language for pair in others for language in pair.languages}
    pairs = []
    for pair in others:
        first = dict(zip(reversed(pair.languages), reversed(pair.captions), strict=True))
        if pair.split == "val" and wanted == first.keys() and pair.key in english:
            captions = (english[pair.key], *(first[language] for language in sorted(wanted)))
            pairs.append(
                Pair(
                    key=pair.key,
                    captions=captions,
                    languages=("en", *sorted(wanted)),
                    split="val",
                )
            )
    return replace(others, pairs=tuple(pairs), media=source.media)


def caption_kinds(table: Path) -> dict[str, str]:
    """Of each language: human or machine, as the table says."""
    with table.open(encoding="utf-8", newline="") as file:
        return {row["lang"]: row["kind"] for row in csv.DictReader(file, delimiter="\t")}


def labels_of(options: argparse.Namespace, image: EncoderSpec) -> LabeledSpec:
    """The labeled images; their features are the encoder's, so all runs share one cache."""
    source = open_pairs(options.labels, OpenSpec(require=("image", "label")))
    return LabeledSpec(
        source,
        caches=options.work / "labeled",
        splits=(),
        encoder=image,
        device="cpu",
    )


def zeroshot_rows(runs: Sequence[TrainedHeads], found: LabeledSpec, split: str) -> list[Row]:
    rows = []
    for name in ("single", "clip-7", "clip-80"):
        templates = find_templates(name)
        spec = ZeroShotSpec(replace(found, splits=(split,)), templates)
        reports = [zero_shot(run, spec) for run in runs]
        values = averaged(
            {"top-1": r.top1, "top-5": r.top5, "mean per class": r.mean_per_class} for r in reports
        )
        one = reports[0]
        chance = {"chance": round(one.chance_top1, 2), "chance top-5": round(one.chance_top5, 2)}
        about = {**chance, "n_images": one.n_images, "n_classes": one.n_classes}
        what = TEMPLATES[0] if name == "single" else f"CLIP's {len(templates)}"
        rows.append({"table": "zero-shot", "prompts": what, **values, **about, "seeds": len(runs)})
    return rows


def probe_rows(
    runs: Sequence[TrainedHeads],
    found: LabeledSpec,
    options: argparse.Namespace,
) -> list[Row]:
    """Of the encoder's features, and of the embeddings after each run's head."""
    reports: dict[str, list[Any]] = {"encoder's features": [], "after the head": []}
    for run in runs:
        both = probe_features(
            labeled_features(run, found),
            options.probe_train_split,
            options.labels_split,
        )
        for what, report in zip(reports, both, strict=True):
            reports[what].append(report)
    return [
        {
            "table": "probe",
            "what": what,
            **averaged(
                {"linear": r.linear, "linear per class": r.linear_per_class, "knn": r.knn}
                for r in several
            ),
            "chance": round(several[0].chance, 2),
            "n_train": several[0].n_train,
            "n_test": several[0].n_test,
            "seeds": len(several),
        }
        for what, several in reports.items()
    ]


def goals(retrieval: Sequence[Row]) -> list[Goal]:
    """R@1 against the reference loop with the same encoders."""
    mean = retrieval[0]
    found = [
        Goal(name=f"{mean['what']}: {name} on val", value=mean[name], target=value, better="higher")
        for name, value in REFERENCE.items()
    ]
    return [
        *found,
        Goal(
            name="mean of both R@1",
            value=mean["mean R@1"],
            target=statistics.mean(REFERENCE.values()),
            better="higher",
        ),
    ]


if __name__ == "__main__":
    main()
