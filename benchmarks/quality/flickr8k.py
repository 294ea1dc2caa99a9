"""The whole chain by its commands on Flickr8k: extract, fit-head for each recipe and seed, evaluate, zero-shot.

    python -m benchmarks.quality.flickr8k --pairs flickr8k/captions.tsv --image timm:/folder --text hf:/folder
    python -m benchmarks.quality.flickr8k --quick            # the drawings of the demo and one seed, for a smoke test

Train images fit, a seeded 500 of them choose the epoch, val is only reported. References: one untuned loop on the same
two encoders (linear to 512 on both sides; four residual blocks on the text side), float32, last epoch, one seed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import Goal, print_table, write_result

REFERENCES = {"projection": (26.8, 21.1), "ape": (30.0, 19.6)}
DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings" / "pairs.tsv"


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        if options.quick:
            options.pairs, options.seeds = DRAWINGS, 1
            options.image, options.text = packaged(work)
        rows = measure(options, work)
    print_table(rows)
    if options.json or not options.quick:
        write_result("quality-flickr8k", goals(rows), rows, options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recall of the recipes on Flickr8k, by the commands that users type.")
    parser.add_argument("--pairs", type=Path, help="captions.tsv with columns image, caption, split (train, val)")
    parser.add_argument("--image", help="image encoder, for example timm:/folder")
    parser.add_argument("--text", help="text encoder, for example hf:/folder")
    parser.add_argument("--labels", type=Path, help="labelled images for zero-shot classification, optional")
    parser.add_argument("--labels-split", default="test")
    parser.add_argument("--recipes", nargs="+", default=["projection", "ape"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder to keep the store and the runs in")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.quick and not (options.pairs and options.image and options.text):
        parser.error("--pairs, --image and --text are needed (or --quick)")
    return options


def packaged(work: Path) -> tuple[str, str]:
    from apecache.encoders.packaged import write_packaged_encoders

    image, text = write_packaged_encoders(work.resolve() / "encoders")
    return f"timm:{image}", f"hf:{text}"


def measure(options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    store = work / "store"
    begin = time.perf_counter()
    encoders = ("--image", options.image, "--text", options.text)
    extracted = apecache("extract", options.pairs, "--store", store, *encoders)
    rows: list[dict[str, Any]] = [extraction_row(extracted, time.perf_counter() - begin)]
    for recipe in options.recipes:
        runs = [run(options, store, work / f"{recipe}-{seed}", recipe, seed) for seed in range(options.seeds)]
        rows.append(summary(recipe, runs))
    return rows


def extraction_row(report: dict[str, Any], seconds: float) -> dict[str, Any]:
    rates = {f"{a['modality']} rows/s": round(a["n_encoded"] / max(a["seconds"], 1e-9), 1) for a in report["arrays"]}
    return {"what": "extract", "seconds": round(seconds, 1), **rates}


def run(options: argparse.Namespace, store: Path, out: Path, recipe: str, seed: int) -> dict[str, Any]:
    fitted = apecache("fit-head", store, "--recipe", recipe, "--out", out, "--seed", seed, "--overwrite")
    measured = apecache("evaluate", out, "--store", store, "--split", "val")
    if options.labels:
        labels = ("--labels", options.labels, "--split", options.labels_split)
        measured["zeroshot"] = apecache("evaluate", out, "--task", "zeroshot", *labels)["top1"]
    return {**measured, "fit": fitted}


def summary(recipe: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds; `spread` is the standard deviation over seeds of the mean of both R@1."""
    row: dict[str, Any] = {"what": recipe, "seconds": round(statistics.median(r["fit"]["seconds"] for r in runs), 1)}
    row |= {"parameters": runs[0]["fit"]["n_trained_parameters"], "seeds": len(runs)}
    for way, short in (("image_to_text", "i2t"), ("text_to_image", "t2i")):
        row |= {f"{short} R@{k}": round(statistics.mean(r[way][k] for r in runs), 2) for k in ("1", "5", "10")}
    ones = [(r["image_to_text"]["1"] + r["text_to_image"]["1"]) / 2 for r in runs]
    row["mean R@1"] = round(statistics.mean(ones), 2)
    row["spread"] = round(statistics.stdev(ones), 2) if len(ones) > 1 else None
    row |= {"n_images": runs[0]["n_images"], "n_texts": runs[0]["n_texts"]}
    if "zeroshot" in runs[0]:
        row["zero-shot top-1"] = round(statistics.mean(r["zeroshot"] for r in runs), 2)
    return row


def goals(rows: list[dict[str, Any]]) -> list[Goal]:
    """Mean of both R@1 against the reference loop with the same encoders and the same kind of head."""
    found = {row["what"]: row for row in rows}
    return [
        Goal(f"{recipe}: mean R@1 on val", found[recipe]["mean R@1"], sum(reference) / 2, "higher")
        for recipe, reference in REFERENCES.items()
        if recipe in found
    ]


def apecache(*arguments: object) -> dict[str, Any]:
    """Run a command with --json and read its answer."""
    command = [sys.executable, "-m", "apecache", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


if __name__ == "__main__":
    main()
