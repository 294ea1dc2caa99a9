"""Compiled image encoders: asked for or measured to pay, recorded, and taken up by every later
run."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import extract_tiny, loaded_once, tree

import apecache.extraction.compilation as compilation
from apecache.data.sources import open_pairs
from apecache.encoders.encoder import ImageEncoder, _compiled, compile_images, compile_texts
from apecache.encoders.spec import parse_encoder
from apecache.errors import EncoderError, MismatchError, OptionError
from apecache.extraction.run import ExtractSpec, extract
from apecache.store.layout import ArrayLayout
from apecache.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None,
    reason="torch.compile needs a C++ compiler here",
)


@pytest.fixture
def vit(tiny_image_encoder: Path) -> ImageEncoder:
    encoder: ImageEncoder = loaded_once("image")(
        (parse_encoder(f"timm:{tiny_image_encoder}", "image"),),
        "cpu",
    )[0]
    return encoder


@pytest.fixture
def plain_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """torch.compile without a compiler: counts the batches that go the compiled way."""
    calls = list[int]()

    def compiled(run: Any, fullgraph: bool, dynamic: bool | None, options: Any) -> Any:
        assert fullgraph
        # Without it a cache of another processor gives NaN: see the test below.
        assert set(options) == {"cpp.simdlen"}
        # Only texts come in several shapes, each of which is compiled as it is.
        return lambda *batch: (
            calls.append(len(batch[0])) if dynamic is None else None,
            run(*batch),
        )[1]

    monkeypatch.setattr(torch, "compile", compiled)
    _compiled.cache_clear()
    yield calls
    _compiled.cache_clear()


@needs_compiler
@pytest.mark.filterwarnings("default")  # of the compiler's own
def test_a_compiled_encoder_gives_the_features_to_rounding(vit: ImageEncoder) -> None:
    pixels = torch.randn(4, *vit.input_shape)
    (found,) = compile_images([vit])(pixels)
    torch.testing.assert_close(found, vit.encode(pixels), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler's own
def test_a_compiled_text_encoder_gives_the_features_at_every_length(
    tiny_text_encoder: Path,
) -> None:
    (bert,) = loaded_once("text")((parse_encoder(f"hf:{tiny_text_encoder}", "text"),), "cpu")
    encode = compile_texts([bert])
    for length in (8, 12):
        ids = bert.tokenize(["a red circle", "a green square on white"]).ids
        (found,) = encode(ids, length=length)
        torch.testing.assert_close(found, bert.encode_ids(ids), rtol=1e-4, atol=1e-5)


def test_texts_that_cannot_be_compiled_run_as_they_are_and_the_record_says_so(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
    plain_compile: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(encoders: Any) -> Any:
        raise RuntimeError("an operation that the compiler does not know")

    monkeypatch.setattr(compilation, "compile_texts", refuse)
    encoders = (tiny_image_encoder, tiny_text_encoder)
    extract_tiny(shapes_once, tmp_path / "store", *encoders, compiled=True)
    store = FeatureStore.open(tmp_path / "store")
    assert store.array("image").record.layout.compiled
    text = store.array("text").record
    assert not text.layout.compiled
    assert "compile" not in text.fingerprint.fields["storage"]
    # The same command again: what was decided stays.
    extract_tiny(shapes_once, tmp_path / "store", *encoders, compiled=True)


COMPILE_IN_A_PROCESS = """
import sys, torch
from apecache.encoders.encoder import compile_images
from apecache.encoders.load import load_image_encoder
from apecache.encoders.spec import parse_encoder

encoder = load_image_encoder(parse_encoder(f"timm:{sys.argv[1]}", "image"))
pixels = torch.randn(4, *encoder.input_shape)
(features,) = compile_images([encoder])(pixels)
torch.testing.assert_close(features, encoder.encode(pixels), rtol=1e-3, atol=1e-4)
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="needs a processor with two vector widths that the compiler can choose",
)
def test_a_cache_filled_under_another_vector_width_is_not_used(
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    """Code for one width that runs with another gives NaN or corrupts the process's memory."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    command = [sys.executable, "-c", COMPILE_IN_A_PROCESS, str(tiny_image_encoder)]
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}, {}):
        ended = subprocess.run(
            command,
            env={**environment, **capability},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == 0, ended.stderr


def test_it_is_recorded_and_a_later_run_goes_the_same_way(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
    plain_compile: list[int],
) -> None:
    encoders = (tiny_image_encoder, tiny_text_encoder)
    extract_tiny(shapes_once, tmp_path / "store", *encoders, compiled=True)
    store = FeatureStore.open(tmp_path / "store")
    image = store.array("image").record
    text = store.array("text").record
    assert (image.layout.compiled, text.layout.compiled) == (True, True)
    assert image.fingerprint.fields["storage"] == {
        "dtype": "float16",
        "batch_size": 4,
        "compile": "inductor",
    }
    whole = tree(store.path)
    count = len(plain_compile)
    assert plain_compile == [4] * 6  # one to see that it works, and of shards of 5, 5 and 2 rows
    (store.path / "records/image/tiny-vit/commits/00000002.json").unlink()
    extract_tiny(shapes_once, store.path, *encoders)
    assert len(plain_compile) > count
    assert tree(store.path) == whole


def test_asking_for_another_way_than_the_recorded_one_is_refused(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
    plain_compile: list[int],
) -> None:
    encoders = (tiny_image_encoder, tiny_text_encoder)
    extract_tiny(shapes_once, tmp_path / "store", *encoders, compiled=True)
    with pytest.raises(MismatchError, match=r"storage\.compile"):
        extract_tiny(shapes_once, tmp_path / "store", *encoders, compiled=False)
    assert extract_tiny(shapes_once, tmp_path / "store", *encoders, compiled=True).nothing_to_do


def test_without_a_compiler_nothing_is_begun(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compilation, "compile_images", lambda _: none)
    spec = ExtractSpec(
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        device="cpu",
        compiled=True,
    )
    with pytest.raises(EncoderError, match="cannot be compiled here"):
        extract(open_pairs(shapes_once), tmp_path / "store", spec)
    assert not FeatureStore.open(tmp_path / "store").arrays("image")


def test_a_cut_after_a_block_is_not_compiled(
    shapes_once: Path,
    tiny_image_encoder: Path,
    tmp_path: Path,
) -> None:
    cut = replace(parse_encoder(f"timm:{tiny_image_encoder}", "image"), pooling="mean", layer=1)
    with pytest.raises(OptionError, match="--compile"):
        extract(
            open_pairs(shapes_once),
            tmp_path / "store",
            ExtractSpec(cut, device="cpu", compiled=True),
        )


@pytest.mark.parametrize(
    ("rows", "eager", "quick", "wanted"),
    [
        (100_000, 0.5, 0.4, True),
        (100_000, 0.5, 0.46, False),
        (30_000, 0.5, 0.1, False),
        (4_000, 50.0, 10.0, False),
        (100_000, 0.5, RuntimeError("no compiler"), False),
    ],
    ids=[
        "a fifth faster",
        "hardly faster",
        "too few minutes",
        "too few images",
        "cannot be compiled",
    ],
)
def test_what_nobody_asked_for_is_measured(
    rows: int,
    eager: float,
    quick: Any,
    wanted: bool,
    vit: ImageEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([eager, quick])

    def seconds(*_: Any) -> float:
        found = next(times)
        if isinstance(found, Exception):
            raise found
        return float(found)

    monkeypatch.setattr(compilation, "_seconds", seconds)
    monkeypatch.setattr(compilation, "compile_images", lambda _: None)
    layout = ArrayLayout(
        rows=rows, dim=8, dtype="float16", shard_rows=256, batch_size=32, threads=1
    )
    assert compilation.decide_compiled([vit], layout=layout, requested=None) is wanted
    assert compilation.decide_compiled([vit], layout=layout, requested=False) is False
    assert compilation.decide_compiled([vit], layout=layout, requested=True) is True
