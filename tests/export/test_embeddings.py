"""Embeddings in tables: every row with its own vector, and databases that open them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

from apecache.errors import OptionError, RunError
from apecache.evaluate.embeddings import embed_store
from apecache.export import embeddings as module
from apecache.export.embeddings import export_embeddings
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore

parquet = pytest.importorskip("pyarrow.parquet")


def columns_of(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    return columns


def test_every_image_and_caption_has_its_row(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Several row groups.
    monkeypatch.setattr(module, "BATCH_ROWS", 5)
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    report = export_embeddings(heads, store, tmp_path / "out")
    expected = embed_store(heads, store)
    assert report.files == ("README.md", "images.parquet", "texts.parquet")
    images = columns_of(tmp_path / "out" / "images.parquet")
    texts = columns_of(tmp_path / "out" / "texts.parquet")
    assert np.array_equal(np.array(images["vector"], np.float32), expected.image.numpy())
    assert np.array_equal(np.array(texts["vector"], np.float32), expected.text.numpy())
    assert np.allclose(np.linalg.norm(images["vector"], axis=1), 1, atol=1e-5)
    pairs = store.pairs
    assert images["key"] == pairs.keys.tolist()
    assert images["label"] == pairs.labels.tolist()
    assert texts["caption"] == pairs.captions.tolist()
    assert texts["key"] == pairs.keys[pairs.image_rows].tolist()
    assert texts["split"] == pairs.splits[pairs.image_rows].tolist()
    assert all(Path(path).is_file() for path in images["path"])
    schema = parquet.read_schema(tmp_path / "out" / "images.parquet")
    assert schema.field("vector").type.list_size == report.dim


def test_the_layout_of_clip_retrieval_has_one_row_per_pair(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PART_ROWS", 6)
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    report = export_embeddings(heads, store, tmp_path / "out", to="clip-retrieval", split="val")
    expected = embed_store(heads, store, split="val")
    n_parts = -(-len(expected.text) // 6)
    assert len(report.files) == 3 * n_parts
    parts = range(n_parts)
    folder = tmp_path / "out"
    image = np.concatenate([np.load(folder / f"img_emb/img_emb_{part}.npy") for part in parts])
    text = np.concatenate([np.load(folder / f"text_emb/text_emb_{part}.npy") for part in parts])
    assert np.array_equal(text, expected.text.numpy())
    assert np.array_equal(image, expected.image.numpy()[expected.image_of_text.numpy()])
    captions: list[str] = []
    for part in parts:
        captions += columns_of(folder / f"metadata/metadata_{part}.parquet")["caption"]
    assert captions == store.pairs.captions[expected.text_rows].tolist()


def test_nothing_is_overwritten_and_formats_are_named(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    (tmp_path / "x").write_text("mine")
    with pytest.raises(RunError, match="exists already; give the name of a new folder"):
        export_embeddings(heads, store, tmp_path)
    with pytest.raises(OptionError, match="expected one of parquet, clip-retrieval, lance"):
        export_embeddings(heads, store, tmp_path / "out", to="csv")  # type: ignore[arg-type]


def test_the_command_says_what_it_wrote(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    command = ["export-embeddings", str(tiny_run), str(tmp_path / "out"), "--store"]
    result = CliRunner().invoke(app, [*command, str(tiny_store), "--split", "val", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["n_images"] == 4
    assert report["files"] == ["README.md", "images.parquet", "texts.parquet"]


def test_lance_opens_its_tables(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    export_embeddings(heads, store, tmp_path / "out", to="lance")
    table = lance.dataset(str(tmp_path / "out" / "images.lance")).to_table()
    assert table.column("key").to_pylist() == store.pairs.keys.tolist()


def test_lancedb_searches_the_parquet_file(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    lancedb = pytest.importorskip("lancedb")
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    export_embeddings(heads, store, tmp_path / "out")
    database = lancedb.connect(tmp_path / "db")
    rows = parquet.read_table(tmp_path / "out" / "images.parquet")
    images = database.create_table("images", rows)
    query = embed_store(heads, store).image[3].numpy()
    first = images.search(query).distance_type("cosine").limit(1).to_list()[0]
    assert first["key"] == store.pairs.keys[3]


def test_qdrant_searches_the_parquet_file(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    qdrant = pytest.importorskip("qdrant_client")
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    report = export_embeddings(heads, store, tmp_path / "out")
    client = qdrant.QdrantClient(":memory:")
    models = qdrant.models
    size = models.VectorParams(size=report.dim, distance=models.Distance.COSINE)
    client.create_collection("images", vectors_config=size)
    points = []
    for number, row in enumerate(parquet.read_table(tmp_path / "out/images.parquet").to_pylist()):
        vector = row.pop("vector")
        points.append(models.PointStruct(id=number, vector=vector, payload=row))
    client.upsert("images", points)
    query = embed_store(heads, store).image[3].tolist()
    hits = client.query_points("images", query=query, limit=1).points
    assert hits[0].payload["key"] == store.pairs.keys[3]
    client.close()


def test_hugging_face_datasets_opens_both_tables(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    datasets = pytest.importorskip("datasets")
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    report = export_embeddings(heads, store, tmp_path / "out")
    tables = {
        name: datasets.load_dataset(
            str(tmp_path / "out"),
            name,
            split="train",
            cache_dir=str(tmp_path / "cache"),
        )
        for name in ("images", "texts")
    }
    assert tables["images"]["key"][:] == store.pairs.keys.tolist()
    assert tables["texts"].num_rows == len(store.pairs.captions)
    vectors = tables["images"].with_format("numpy")["vector"][:]
    assert vectors.shape == (len(store.pairs.keys), report.dim)


def test_milvus_searches_the_parquet_file(
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    milvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    heads = load_heads(tiny_run)
    store = FeatureStore.open(tiny_store)
    report = export_embeddings(heads, store, tmp_path / "out")
    client = milvus.MilvusClient(str(tmp_path / "milvus.db"))
    client.create_collection("images", dimension=report.dim, metric_type="IP", auto_id=True)
    client.insert("images", parquet.read_table(tmp_path / "out/images.parquet").to_pylist())
    query = embed_store(heads, store).image[3].tolist()
    (hits,) = client.search("images", data=[query], limit=1, output_fields=["key"])
    assert hits[0]["entity"]["key"] == store.pairs.keys[3]
    client.close()
