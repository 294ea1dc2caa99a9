"""Class names and prompts of published benchmarks, read where their packages keep them."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from apecache.errors import MissingExtraError, OptionError
from apecache.evaluate import benchmark_names
from apecache.evaluate.benchmark_names import clip_templates, load_benchmark
from apecache.evaluate.class_names import match_labels

NAMES = {
    "pets": ["Abyssinian", "Beagle"],
    "svhn": ["zero", "one"],
    "flowers": ["rose", "lily", "iris"],
}
TEMPLATES = {
    "cifar10": ["a photo of a {c}.", "{c}"],
    "pets": ["a photo of a {c}, a type of pet."],
    "svhn": ["the number {c}"],
    "flowers": ["{c}"],
    "by_class": {"a": ["{c}"]},
}


@pytest.fixture
def fresh() -> Iterator[None]:
    benchmark_names._clip_benchmark.cache_clear()
    yield
    benchmark_names._clip_benchmark.cache_clear()


@pytest.fixture
def small_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> Path:
    """A package laid out as clip_benchmark is, which cannot be imported: its data sets need what
    few have."""
    folder = tmp_path / "clip_benchmark" / "datasets"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "en_classnames.json").write_text(json.dumps(NAMES))
    (folder / "en_zeroshot_classification_templates.json").write_text(json.dumps(TEMPLATES))
    monkeypatch.delitem(sys.modules, "clip_benchmark", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_names_and_templates_come_from_clip_benchmark(small_package: Path) -> None:
    pets = load_benchmark("Pets")
    assert (pets.classes.names, pets.templates) == (
        ("Abyssinian", "Beagle"),
        ("a photo of a {}, a type of pet.",),
    )
    assert load_benchmark("oxford-pets") == pets
    assert match_labels(["1"], load_benchmark("SVHN").classes).place == {"1": 1}
    assert match_labels(["3", "1"], load_benchmark("flowers-102").classes).place == {"1": 0, "3": 2}


def test_a_benchmark_whose_labels_are_names_needs_no_list_but_refuses_numbers(
    small_package: Path,
) -> None:
    cifar = load_benchmark("CIFAR-10")
    assert cifar.templates == ("a photo of a {}.", "{}")
    assert match_labels(["cat", "airplane"], cifar.classes).names == ("airplane", "cat")
    with pytest.raises(OptionError, match="the labels of cifar10 are numbers"):
        match_labels(["0", "1"], cifar.classes)


@pytest.mark.parametrize("name", ["cifar11", "by_class", "", "../pets"])
def test_an_unknown_benchmark_is_refused(name: str, small_package: Path) -> None:
    with pytest.raises(OptionError, match="not known to clip_benchmark: give --class-names"):
        load_benchmark(name)
    with pytest.raises(OptionError, match="did you mean cifar10"):
        load_benchmark("cifar11")


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("clip_benchmark", "pets", "zero-shot"), ("open_clip", "imagenet", "open-clip")],
)
def test_a_missing_package_is_named_with_its_pip_line(
    package: str,
    name: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    fresh: None,
) -> None:
    monkeypatch.setattr(benchmark_names, "find_spec", lambda asked: None)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(
        MissingExtraError,
        match=rf"{package} is not installed; .*pip install 'apecache\[{extra}\]'",
    ):
        load_benchmark(name)


def test_imagenet_goes_by_wordnet_ids_in_the_order_of_its_names() -> None:
    pytest.importorskip("open_clip", reason="the extra open-clip is not installed")
    known = load_benchmark("ImageNet")
    assert (len(known.classes.names), len(known.templates)) == (1000, 80)
    labels = {"n01440764": "tench", "n02342885": "hamster", "n07753592": "banana"}
    classes = match_labels(list(labels), known.classes)
    assert len(classes.names) == 1000
    assert {label: classes.names[classes.place[label]] for label in labels} == labels
    part = match_labels(list(labels), load_benchmark("imagenet-r").classes)
    assert part.names == ("tench", "hamster", "banana")
    assert match_labels(["0", "954"], load_benchmark("imagenet_v2").classes).place == {
        "0": 0,
        "954": 954,
    }


def test_clips_ensembles_have_a_place_for_the_name() -> None:
    pytest.importorskip("open_clip", reason="the extra open-clip is not installed")
    for name, count in (("clip-7", 7), ("clip-80", 80)):
        templates = clip_templates(name)
        assert len(templates) == count
        assert all("{}" in template for template in templates)


@pytest.mark.skipif(
    find_spec("clip_benchmark") is None, reason="the extra zero-shot is not installed"
)
@pytest.mark.parametrize(
    ("name", "n_classes"),
    [
        ("cifar10", 0), ("cifar100", 0), ("food101", 0), ("dtd", 0), ("caltech101", 102), ("flowers", 102),
        ("pets", 37), ("eurosat", 10), ("svhn", 10),
    ],
)  # fmt: skip
def test_common_benchmarks_are_known_to_the_real_package(
    name: str, n_classes: int, fresh: None
) -> None:
    found = load_benchmark(name)
    assert len(found.classes.names) == n_classes
    assert found.templates
    assert all("{}" in template for template in found.templates)
