"""The precision of new arrays: chosen, measured, recorded, and its tolerance when resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apecache.data.sources import open_pairs
from apecache.encoders.encoder import encode_images
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import MismatchError, OptionError
from apecache.extraction import precision as precision_module
from apecache.extraction import recheck
from apecache.extraction.precision import _fastest, with_precision
from apecache.extraction.run import extract
from apecache.extraction.spec import ExtractSpec, MeasuredPrecision
from apecache.storage.open import open_files
from apecache.store.reader import FeatureStore


@pytest.fixture
def spec(tiny_image_encoder: Path, tiny_text_encoder: Path) -> ExtractSpec:
    return ExtractSpec(
        image=parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        text=parse_encoder(f"hf:{tiny_text_encoder}", "text"),
        shard_rows=8,
        device="cpu",
    )


def measured(precision: Any, error: float, seconds: float) -> MeasuredPrecision:
    model = EncoderSpec("timm", "vit", "image", dtype=precision)
    return MeasuredPrecision(model=model, error=error, n_rows=256, seconds=seconds)


def choice(**results: tuple[float, float]) -> str:
    return _fastest([measured(name, *result) for name, result in results.items()])


def test_the_fastest_precision_that_is_exact_enough_is_chosen() -> None:
    slow = {"float32": (0.0, 8.0), "tf32": (1e-6, 3.0)}
    assert choice(**slow, float16=(2e-6, 1.0), bfloat16=(2e-4, 0.9)) == "float16"
    assert choice(**slow, float16=(2e-4, 1.0), bfloat16=(2e-3, 0.9)) == "tf32"
    assert choice(**slow, float16=(float("inf"), 1.0), bfloat16=(2e-5, 0.9)) == "bfloat16"


def test_a_less_exact_precision_that_gains_nothing_is_not_chosen() -> None:
    close = {"float32": (0.0, 1.0), "tf32": (1e-6, 0.99), "bfloat16": (2e-5, 0.98)}
    assert choice(**close, float16=(2e-6, 0.97)) == "float32"


def test_a_cpu_uses_float32_without_a_measurement(
    shapes: Path,
    spec: ExtractSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision_module, "_measured", None)
    decided = with_precision(open_pairs(shapes), open_files(tmp_path / "store"), spec)
    assert [encoder.dtype for encoder in (*decided.images, *decided.texts)] == ["float32"] * 2
    assert decided.measured == ()


def test_an_unknown_precision_is_refused(shapes: Path, spec: ExtractSpec, tmp_path: Path) -> None:
    unknown: Any = "float8"
    with pytest.raises(OptionError, match="precision 'float8'"):
        extract(open_pairs(shapes), tmp_path / "store", replace(spec, precision=unknown))


def test_the_error_is_kept_in_the_record_and_the_fingerprint_says_which(
    shapes: Path,
    spec: ExtractSpec,
    tmp_path: Path,
) -> None:
    asked = replace(spec, precision="bfloat16")
    report = extract(open_pairs(shapes), tmp_path / "store", asked)
    store = FeatureStore.open(tmp_path / "store")
    assert len(report.measured) == 2
    for modality in ("image", "text"):
        record = store.arrays(modality)[0].record
        assert record.fingerprint.fields["encoder"]["compute_dtype"] == "bfloat16"
        recorded = record.environment["precision"]
        assert recorded["name"] == "bfloat16"
        assert 0 < recorded["error"] < 0.01
        assert recorded["tolerance"] == max(1e-4, 2 * recorded["error"])


def test_the_measured_error_is_that_of_the_rows(
    shapes: Path,
    spec: ExtractSpec,
    tmp_path: Path,
) -> None:
    """Features in both precisions, stored and compared, are as far apart as was measured."""
    loaded = []
    for precision in ("float32", "bfloat16"):
        asked: Any = replace(spec, precision=precision, storage_dtype="float32")
        report = extract(open_pairs(shapes), tmp_path / precision, asked)
        loaded.append(FeatureStore.open(tmp_path / precision).arrays("image")[0].load())
    exact, rounded = (rows.astype(np.float64) for rows in loaded)
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    worst = 1 - ((exact * rounded).sum(1) / lengths).min()
    # Other batches than those of the probe round otherwise.
    assert report.measured[0].error == pytest.approx(worst, rel=0.5)


def test_a_store_keeps_its_precision_when_it_is_resumed(
    shapes: Path,
    spec: ExtractSpec,
    tmp_path: Path,
) -> None:
    asked = replace(spec, precision="float16", text=None)
    extract(open_pairs(shapes), tmp_path / "store", asked)
    (array,) = FeatureStore.open(tmp_path / "store").arrays("image")
    next((tmp_path / "store").rglob("commits/00000001.json")).unlink()
    (tmp_path / "store" / "records" / "image" / array.name / "seal.json").unlink()
    resumed = extract(open_pairs(shapes), tmp_path / "store", replace(spec, text=None))
    assert [done.name for done in resumed.arrays] == [array.name]
    assert resumed.arrays[0].n_encoded == resumed.arrays[0].rows - 8
    # Nothing is measured for an array that exists.
    assert resumed.measured == ()


@pytest.mark.parametrize(("tolerance", "refused"), [(1e-4, True), (0.5, False)])
def test_resuming_compares_rows_with_the_tolerance_of_the_record(
    shapes: Path,
    spec: ExtractSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tolerance: float,
    refused: bool,
) -> None:
    only_images = replace(spec, text=None)
    extract(open_pairs(shapes), tmp_path / "store", only_images)
    (array,) = FeatureStore.open(tmp_path / "store").arrays("image")
    next((tmp_path / "store").rglob("commits/00000001.json")).unlink()
    (tmp_path / "store" / "records" / "image" / array.name / "seal.json").unlink()
    # Another device, whose features are off by more than rounding.
    encode = recheck._encode_rows

    def elsewhere(*arguments: Any) -> Any:
        rows = encode(*arguments)
        rows[:, 0] += 0.1 * np.linalg.norm(rows, axis=1)
        return rows

    monkeypatch.setattr(recheck, "_encode_rows", elsewhere)
    monkeypatch.setattr(recheck, "tolerance_of", lambda record: tolerance)
    if refused:
        with pytest.raises(MismatchError, match=r"cosine 0\.99\d*, expected at least 0\.99990"):
            extract(open_pairs(shapes), tmp_path / "store", only_images)
    else:
        assert extract(open_pairs(shapes), tmp_path / "store", only_images).complete


def test_records_without_a_measurement_have_the_least_tolerance(
    shapes: Path,
    spec: ExtractSpec,
    tmp_path: Path,
) -> None:
    extract(open_pairs(shapes), tmp_path / "store", spec)
    record = FeatureStore.open(tmp_path / "store").arrays("text")[0].record
    assert "precision" not in record.environment
    assert recheck.tolerance_of(record) == 1e-4


def test_cuda_is_told_about_tf32_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    from apecache.device import float32_products

    before = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    for tf32 in (True, False):
        with float32_products(torch.device("cuda"), tf32):
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
            assert torch.backends.cudnn.allow_tf32 is tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("precision", ["tf32", "float32"])
def test_encoding_uses_the_products_of_its_precision(
    tiny_image_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Any,
) -> None:
    from apecache.encoders import encoder as encoder_module
    from apecache.encoders.load import load_image_encoder

    asked: list[bool] = []
    products = encoder_module.float32_products

    def recorded(device: torch.device, tf32: bool) -> Any:
        asked.append(tf32)
        return products(device, tf32)

    monkeypatch.setattr(encoder_module, "float32_products", recorded)
    spec = replace(parse_encoder(f"timm:{tiny_image_encoder}", "image"), dtype=precision)
    encoder = load_image_encoder(spec, "cpu")
    encoder.encode(torch.zeros(1, *encoder.input_shape))
    encode_images([encoder], torch.zeros(1, *encoder.input_shape))
    assert asked == [precision == "tf32"] * 2
