"""Write stores of given features, for benchmarks and tests that need no encoder."""

from pathlib import Path

from apecache.encoders.spec import EncoderSpec
from apecache.fingerprint import Fingerprint, content_hash, digest_strings
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import ArrayLayout, ArrayRecord, with_metadata
from apecache.store.reader import FeatureStore
from apecache.store.writer import (
    ArrayWriter,
    PairColumns,
    QuarantinedRow,
    add_segment,
    create_array,
    create_store,
)


def write_feature_store(  # type: ignore[no-untyped-def]
    folder: Path,
    image,
    text,
    image_rows: list[int],
    splits: list[str],
    *,
    keys: list[str] | None = None,
    captions: list[str] | None = None,
    names: tuple[str, str] = ("pixels", "words"),
    bad_images: tuple[int, ...] = (),
    bad_texts: tuple[int, ...] = (),
    modalities: tuple[str, ...] = ("image", "text"),
    shard_rows: int = 64,
    n_shards: int | None = None,
    text_lengths=None,
    storage: str | None = None,
    image_content: list[str] | None = None,
):
    """Write features [n_images, dim] and [n_texts, dim] (float16 or float32) with the store's own
    writer.

    `names` of the encoders are their identity. `bad_…` rows are quarantined. `n_shards`: commit
    only so many of each array and leave it unfinished. `text_lengths`: the texts are ragged tokens
    [n_texts, tokens, dim]. `storage`: dtype of the arrays, if it is not that of the features.
    `image_content`: what the images' files are made of, by default something else each. Returns the
    opened store; calling again with other names adds arrays.
    """
    keys = keys or [f"images/{row}.png" for row in range(len(image))]
    texts = captions or [f"caption {row}" for row in range(len(text))]
    digest = digest_strings([*keys, *splits, *texts, *map(str, image_rows)])
    blank = [""] * len(keys), ["en"] * len(texts)
    files = LocalFiles(folder)
    columns = PairColumns(
        keys=keys,
        splits=splits,
        labels=blank[0],
        captions=texts,
        languages=blank[1],
        image_rows=image_rows,
        digest=digest,
        origin="made up",
    )
    if folder.parent.name == "segments":
        add_segment(
            LocalFiles(folder.parents[1]),
            segment=folder.name,
            pairs=columns,
            root="",
            version="0",
        )
    else:
        create_store(files, pairs=columns, root="", version="0")
    for modality, name, features, bad in (
        ("image", names[0], image, bad_images),
        ("text", names[1], text, bad_texts),
    ):
        if modality not in modalities:
            continue
        lengths = text_lengths if modality == "text" else None
        tokens = features.shape[1] if features.ndim == 3 else None
        about = (
            len(features),
            features.shape[-1],
            storage or str(features.dtype),
            shard_rows,
            shard_rows,
            1,
        )
        rows_value, dim, dtype, shard_rows_value, batch_size, threads = about
        layout = ArrayLayout(
            rows=rows_value,
            dim=dim,
            dtype=dtype,
            shard_rows=shard_rows_value,
            batch_size=batch_size,
            threads=threads,
            views=None,
            tokens=tokens,
            ragged=lengths is not None,
        )
        fingerprint = Fingerprint(
            fields={"encoder": {"modality": modality, "weights": name}, "storage": layout.dtype}
        )
        spec = EncoderSpec("timm" if modality == "image" else "hf", name, modality)
        record = with_metadata(
            ArrayRecord(
                modality=modality,
                name=name,
                spec=spec,
                fingerprint=fingerprint,
                layout=layout,
                metadata={},
                environment={},
                table=digest,
            )
        )
        create_array(files, record)
        writer = ArrayWriter(files, record)
        for shard in range(layout.n_shards if n_shards is None else n_shards):
            rows = layout.shard(shard)
            out = [
                QuarantinedRow(row=row, key=str(row), reason="empty", detail="made up")
                for row in bad
                if row in rows
            ]
            content = [content_hash(f"{modality} {row}") for row in rows]
            if modality == "image" and image_content is not None:
                content = [content_hash(image_content[row]) for row in rows]
            own_lengths = None if lengths is None else lengths[rows.start : rows.stop]
            writer.commit(
                shard,
                features=features[rows.start : rows.stop],
                content=content,
                quarantined=out,
                lengths=own_lengths,
            )
        if n_shards is None:
            writer.seal()
    return FeatureStore.open(folder)
