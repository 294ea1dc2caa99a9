"""Writes the golden store of the present format, and what it must serve: `python
tests/golden/make.py`.

Once a format is released its folder is never made anew: it stands for the stores that people have.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))


def main() -> None:
    from apecache.store.layout import FORMAT_VERSION
    from benchmarks.made_up_store import write_feature_store

    store = HERE / f"format-{FORMAT_VERSION}"
    shutil.rmtree(store, ignore_errors=True)
    chance = np.random.default_rng(1)
    for folder, first, rows in ((store, 0, 5), (store / "segments" / "0001", 5, 2)):
        image = chance.standard_normal((rows, 4)).astype(np.float16)
        text = chance.standard_normal((rows + 1, 3)).astype(np.float32)
        captions = [
            f"{word} {rows}"
            for word in ("un chat", "ein Hund", "猫", "a <b>", "=1+1", "x")[: rows + 1]
        ]
        keys = [f"images/{first + row}.png" for row in range(rows)]
        options = {"keys": keys, "captions": captions, "shard_rows": 2, "bad_images": (1,)}
        about = ([0, *range(rows)], ["train", "val", "", "", ""][:rows])
        write_feature_store(folder, image, text, *about, **options)
        patches, tokens = (
            chance.standard_normal((n, 3, 4)).astype(np.float16) for n in (rows, rows + 1)
        )
        lengths = chance.integers(1, 4, rows + 1)
        write_feature_store(
            folder,
            patches,
            tokens,
            *about,
            **options,
            names=("patches", "tokens"),
            text_lengths=lengths,
        )
    (HERE / f"format-{FORMAT_VERSION}.json").write_text(
        json.dumps(served(store), ensure_ascii=False, indent=1) + "\n"
    )


def served(store: Path) -> dict[str, object]:
    """Everything that a store serves, as JSON: quarantined rows of features are null."""
    from apecache.store.reader import FeatureStore

    opened = FeatureStore.open(store)
    names = ("keys", "splits", "labels", "captions", "languages", "image_rows")
    told: dict[str, object] = {name: getattr(opened.pairs, name).tolist() for name in names}
    for array in opened.arrays():
        ok = array.load_ok()
        features = array.load()
        told[f"{array.record.modality}/{array.name}"] = {
            "dtype": str(array.dtype),
            "lengths": None if (lengths := array.load_lengths()) is None else lengths.tolist(),
            "features": [
                row.astype(float).tolist() if good else None
                for row, good in zip(features, ok, strict=True)
            ],
            "content": array.content(),
            "quarantined": array.quarantined(),
            "encoder": array.record.encoder.digest,
        }
    return told


if __name__ == "__main__":
    main()
