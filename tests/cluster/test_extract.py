"""Extraction by actors: the store of a local run, what is counted and told, and what is refused."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from pieces import sent
from tiny import extract_tiny, loaded_once, make_shapes, tree
from typer.testing import CliRunner

import apecache.cluster.extract as engine
import apecache.extraction.run as extraction
from apecache.cluster import task_state
from apecache.cluster.extract import extract_on_ray
from apecache.cluster.pool import Make, RaySpec
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import BadRowsError, DataError, EngineError, MismatchError, OptionError
from apecache.extraction.encode import ImageJob
from apecache.extraction.run import ExtractionState, ExtractReport, ExtractSpec, extract
from apecache.extraction.shard_range import ShardRange
from apecache.extraction.table_plan import TablePlan, plan_table
from apecache.storage.open import open_files
from apecache.store.reader import FeatureStore

if TYPE_CHECKING:
    from benchmarks.reliability.injection.cluster import Nodes

pytestmark = pytest.mark.usefixtures("one_thread")


class InTurn:
    """A pool of workers in this process: pieces go to them in turn, the last one first, and some
    are done twice. What goes to them and comes back is pickled, as by Ray."""

    def __init__(self, make: Make, count: int) -> None:
        self.workers = [sent(make)(1) for _ in range(count)]

    def first(self, piece: Any) -> Any:
        return sent(self.workers[0].do(sent(piece)))

    def run(self, pieces: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for number, piece in enumerate(reversed(list(pieces))):
            done = self.workers[number % len(self.workers)].do(sent(piece))
            if number % 3 == 0:
                self.workers[(number + 1) % len(self.workers)].do(sent(piece))
            yield piece, sent(done)


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch, no_fsync: None, load_once: None) -> None:
    """The pool without Ray; the one with it is tested beside."""

    @contextmanager
    def opened(make: Make, spec: RaySpec) -> Iterator[InTurn]:
        yield InTurn(make, spec.actors or 2)

    monkeypatch.setattr(engine, "open_pool", opened)


@pytest.fixture
def spread(
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    in_turn: None,
) -> Callable[..., ExtractReport]:
    """`spread(table, store, **settings)`: as `extract_tiny`, by actors."""

    def run(
        table: Path,
        store: Path,
        progress: Any = lambda _: None,
        **options: Any,
    ) -> ExtractReport:
        settings = {"image_batch": 4, "text_batch": 4, "shard_rows": 5, "device": "cpu", **options}
        encoders = (
            parse_encoder(f"timm:{tiny_image_encoder}", "image"),
            parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        )
        return extract_on_ray(
            open_pairs(table),
            store=store,
            spec=ExtractSpec(*encoders, **settings),
            progress=progress,
        )  # type: ignore[arg-type]

    return run


@pytest.fixture
def local(tiny_image_encoder: Path, tiny_text_encoder: Path) -> Callable[..., ExtractReport]:
    def run(table: Path, store: Path, **options: Any) -> ExtractReport:
        return extract_tiny(
            table,
            store=store,
            image=tiny_image_encoder,
            text=tiny_text_encoder,
            **options,
        )

    return run


def test_actors_make_the_store_of_a_local_run(
    shapes: Path,
    tmp_path: Path,
    spread: Callable[..., ExtractReport],
    local: Callable[..., ExtractReport],
) -> None:
    (shapes.parent / "images" / "red-circle-0.png").write_bytes(b"<html>")
    seen: list[ExtractionState] = []
    there = spread(shapes, tmp_path / "there", seen.append, max_bad=0.1)
    here = local(shapes, tmp_path / "here", max_bad=0.1)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    for a, b in zip(there.arrays, here.arrays, strict=True):
        assert (a.modality, a.name, a.rows, a.dim, a.n_encoded, a.n_quarantined, a.n_truncated, a.n_bytes) == (
            b.modality, b.name, b.rows, b.dim, b.n_encoded, b.n_quarantined, b.n_truncated, b.n_bytes
        )  # fmt: skip
        assert a.seconds > 0
    assert (there.store, there.complete, there.share_done) == (tmp_path / "there", True, 1.0)
    last = {standing.modality: standing for standing in seen}
    assert [(s.done, s.rows, s.n_bad) for s in last.values()] == [(12, 12, 1), (24, 24, 0)]
    assert spread(shapes, tmp_path / "there", max_bad=0.1).nothing_to_do
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_what_is_committed_is_not_done_again_and_counted_as_done(
    shapes_once: Path,
    tmp_path: Path,
    spread: Callable[..., ExtractReport],
    local: Callable[..., ExtractReport],
) -> None:
    local(shapes_once, tmp_path / "once")
    local(shapes_once, tmp_path / "store", part=ShardRange(number=2, count=3))
    seen: list[ExtractionState] = []
    report = spread(shapes_once, tmp_path / "store", seen.append)
    assert [array.n_encoded for array in report.arrays] == [7, 15]
    assert [(s.modality, s.done) for s in seen[:2]] == [("image", 5), ("text", 9)]
    assert tree(tmp_path / "store") == tree(tmp_path / "once")


def test_a_grown_table_and_a_second_encoder_go_the_same_way(
    tmp_path: Path,
    spread: Callable[..., ExtractReport],
    local: Callable[..., ExtractReport],
) -> None:
    table = make_shapes(tmp_path / "shapes", copies=2)
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:25]))
    local(table, tmp_path / "here")
    spread(table, tmp_path / "there")
    table.write_text(whole)
    local(table, tmp_path / "here", recheck=True)
    report = spread(table, tmp_path / "there", recheck=True)
    # The new pictures have the captions of the old ones, which are in the store.
    assert [array.n_encoded for array in report.arrays] == [12, 0]
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_several_passes_of_one_modality_are_told_apart(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    in_turn: None,
) -> None:
    """Pillow's pixels and torchvision's are two passes over the images."""
    encoder = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    both = (encoder, replace(encoder, pooling="cls"), replace(encoder, resize="torchvision"))
    spec = ExtractSpec(both, image_batch=4, shard_rows=5, device="cpu")
    seen = list[ExtractionState]()
    extract_on_ray(
        open_pairs(shapes_once),
        store=tmp_path / "there",
        spec=spec,
        progress=seen.append,
    )
    extract(open_pairs(shapes_once), tmp_path / "here", spec)
    assert tree(tmp_path / "there") == tree(tmp_path / "here")
    assert (seen[-1].done, seen[-1].rows) == (24, 24)


def test_bad_rows_and_one_file_in_two_splits_are_judged_at_the_end(
    shapes: Path,
    tmp_path: Path,
    spread: Callable[..., ExtractReport],
) -> None:
    images = shapes.parent / "images"
    shutil.copy(images / "red-circle-0.png", images / "red-triangle-0.png")
    with pytest.raises(DataError, match="same file in two splits"):
        spread(shapes, tmp_path / "store")
    (images / "red-triangle-0.png").write_bytes(b"<html>")
    with pytest.raises(BadRowsError, match="1 of 12 image rows"):
        spread(shapes, tmp_path / "other")
    assert FeatureStore.open(tmp_path / "other").array("image").complete


def test_a_part_of_a_cluster_run_is_refused(
    shapes_once: Path,
    tmp_path: Path,
    spread: Callable[..., ExtractReport],
) -> None:
    with pytest.raises(OptionError, match="part 1/2 of an extraction is for machines without Ray"):
        spread(shapes_once, tmp_path / "store", part=ShardRange(number=1, count=2))
    assert not (tmp_path / "store").exists()


def test_a_node_that_does_not_see_the_store_is_named(
    shapes_once: Path,
    tmp_path: Path,
    spread: Callable[..., ExtractReport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "node_name", lambda: "n7")
    # Made where only the driver sees it.
    monkeypatch.setattr(TablePlan, "begin", lambda plan: None)
    with pytest.raises(
        EngineError,
        match=r"node n7 does not see .*store; the store must lie where every node reaches",
    ):
        spread(shapes_once, tmp_path / "store")


def test_shards_that_do_not_appear_here_are_named(
    shapes_once: Path,
    tmp_path: Path,
    spread: Callable[..., ExtractReport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(task_state, "SEEN_SECONDS", 0)
    monkeypatch.setattr(engine, "commit_shard", lambda *_: None)
    with pytest.raises(
        EngineError,
        match=r"lacks shard 0 of text/tiny-bert, which an actor has committed",
    ):
        spread(shapes_once, tmp_path / "store")


def test_every_node_is_asked_whether_it_gives_what_is_committed(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    in_turn: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = loaded_once("image")((parse_encoder(f"timm:{tiny_image_encoder}", "image"),), "cpu")[
        0
    ]
    spec = ExtractSpec(encoder.spec, shard_rows=5, device="cpu")
    plan = plan_table(open_pairs(shapes_once), open_files(tmp_path / "store"), spec)
    plan.begin()
    (segment,) = plan.segments
    parts = {segment.files.place: segment.part}
    first = engine._Encoding(parts, spec, 1)
    (task,) = first.do(engine.PREPARE)  # type: ignore[misc, union-attr]
    first.do(task_state.ShardRequest(task=task, shard=0))
    noisy = replace(
        encoder,
        forward=lambda pixels: encoder.forward(pixels) + torch.randn(len(pixels), 64),
    )
    monkeypatch.setattr(extraction, "load_image_encoders", lambda *_: [noisy])
    with pytest.raises(MismatchError, match="come out otherwise now"):
        engine._Encoding(parts, spec, 1).do(task_state.ShardRequest(task=task, shard=1))


def test_decoding_processes_are_those_of_an_actor_unless_told(tiny_image_encoder: Path) -> None:
    assert [engine._on_a_node(ExtractSpec(), cpus).workers for cpus in (1, 2, 8)] == [0, 0, 8]
    assert engine._on_a_node(ExtractSpec(workers=3), 8).workers == 3


# The command, and a real cluster


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray", "cpus=2"], "expected an address"),
        (["--ray", "auto,actors=0"], "found 'actors=0'"),
        (["--ray", "auto", "--part", "1/2"], "part 1/2"),
    ],
)
def test_options_that_do_not_belong_together_are_wrong_usage(
    shapes_once: Path,
    tmp_path: Path,
    options: list[str],
    said: str,
) -> None:
    line = [
        "extract",
        str(shapes_once),
        "--store",
        str(tmp_path / "store"),
        "--image",
        "timm:none",
        *options,
    ]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert said in result.output


@pytest.mark.slow
def test_the_command_on_a_cluster_makes_the_bytes_of_the_local_engine(
    nodes: "Nodes",
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real encoders in two actors, paths as the driver's folder has them, and one thread
    everywhere."""
    table = make_shapes(tmp_path / "shapes", copies=4)
    monkeypatch.chdir(table.parent)
    extract_tiny(
        Path("pairs.tsv"),
        store=Path("here"),
        image=tiny_image_encoder,
        text=tiny_text_encoder,
    )
    encoders = ["--image", f"timm:{tiny_image_encoder}", "--text", f"hf:{tiny_text_encoder}"]
    sizes = ["--image-batch", "4", "--text-batch", "4", "--shard-rows", "5", "--device", "cpu"]
    ray = ["--ray", f"{nodes.address},actors=2"]
    result = CliRunner().invoke(
        app,
        ["extract", "pairs.tsv", "--store", "there", *encoders, *sizes, *ray],
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("72 rows encoded in ")
    assert tree(Path("there")) == tree(Path("here"))


@pytest.mark.parametrize("workers", [0, 1])
def test_decoders_stay_from_shard_to_shard_and_are_made_again_after_an_error(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    in_turn: None,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    encoder = loaded_once("image")((parse_encoder(f"timm:{tiny_image_encoder}", "image"),), "cpu")[
        0
    ]
    spec = ExtractSpec(encoder.spec, shard_rows=5, device="cpu", workers=workers)
    plan = plan_table(open_pairs(shapes_once), open_files(tmp_path / "store"), spec)
    plan.begin()
    (segment,) = plan.segments
    actor = engine._Encoding({segment.files.place: segment.part}, spec, 1)
    opened: list[ImageJob] = []
    real = ImageJob.decoders

    def decoders(job: ImageJob) -> Any:
        opened.append(job)
        return real(job)

    monkeypatch.setattr(ImageJob, "decoders", decoders)
    (task,) = actor.do(engine.PREPARE)  # type: ignore[misc, union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(ImageJob, "_encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            actor.do(task_state.ShardRequest(task=task, shard=0))
    for shard in (2, 0, 1):
        actor.do(task_state.ShardRequest(task=task, shard=shard))
    assert len(opened) == 2
    actor._close_decoders()
    local = extract(open_pairs(shapes_once), tmp_path / "local", spec)
    rows = FeatureStore.open(local.store).array("image").load()
    committed = FeatureStore.open(tmp_path / "store").array("image")
    assert np.concatenate([committed.load_shard(shard) for shard in range(3)]).tobytes() == (
        rows.tobytes()
    )
