"""Labels of images and the classes that they stand for; class-name files."""

from pathlib import Path

import pytest

from apecache.errors import OptionError
from apecache.evaluate.class_names import ClassNames, match_labels, read_class_names

PETS = ClassNames(names=("Abyssinian", "Basset Hound", "American Bulldog"), origin="pets")
SYNSETS = ClassNames(
    names=("tench", "goldfish", "crane", "crane"),
    origin="ImageNet",
    labels=("n0001", "n0002", "n0003", "n0004"),
)


def test_without_names_the_labels_are_the_classes() -> None:
    classes = match_labels(["b", "a", "b"])
    assert (classes.names, classes.place) == (("a", "b"), {"a": 0, "b": 1})


@pytest.mark.parametrize(
    ("known", "labels", "places", "matched"),
    [
        (PETS, ["basset_hound", "Abyssinian"], {"basset_hound": 1, "Abyssinian": 0}, "by name"),
        (PETS, ["american-bulldog"], {"american-bulldog": 2}, "by name"),
        (PETS, ["2", "01"], {"2": 2, "01": 1}, "by number from 0"),
        (PETS, ["z", "y", "x"], {"x": 0, "y": 1, "z": 2}, "by sorted order"),
        (SYNSETS, ["n0002", "n0004"], {"n0002": 1, "n0004": 3}, "by label"),
        (SYNSETS, ["goldfish"], {"goldfish": 1}, "by name"),
        (ClassNames(names=("5", "7"), origin="x"), ["7"], {"7": 1}, "by name"),
        (
            ClassNames(names=("a", "b", "c"), origin="flowers", first=1),
            ["1", "3"],
            {"1": 0, "3": 2},
            "by number from 1",
        ),
        (
            ClassNames(names=("a", "b", "c"), origin="flowers", first=1),
            ["0", "2"],
            {"0": 0, "2": 2},
            "by number from 0",
        ),
        (
            ClassNames(names=(), origin="cifar10"),
            ["cat", "dog"],
            {"cat": 0, "dog": 1},
            "by the labels themselves",
        ),
    ],
)
def test_a_label_finds_its_class(
    known: ClassNames,
    labels: list[str],
    places: dict[str, int],
    matched: str,
) -> None:
    classes = match_labels(labels, known)
    assert (dict(classes.place), classes.matched) == (places, matched)
    assert classes.names == (known.names or tuple(sorted(labels)))


def test_of_a_part_of_the_classes_only_those_with_images_are_candidates() -> None:
    part = ClassNames(
        names=SYNSETS.names,
        origin="ImageNet",
        labels=SYNSETS.labels,
        present_only=True,
    )
    classes = match_labels(["n0004", "n0002", "n0004"], part)
    assert (classes.names, classes.place) == (("goldfish", "crane"), {"n0002": 0, "n0004": 1})


@pytest.mark.parametrize(
    ("known", "labels", "said"),
    [
        (PETS, ["Basset Hound", "Basett"], r"1 of 2 labels are none of pets's 3 classes \('Basett'\); give --class"),
        (PETS, ["3"], "1 of 1 labels"),
        (PETS, ["a", "b"], "2 of 2 labels"),
        (PETS, ["Abyssinian", "x", "y"], r"2 of 3 labels are none .*\('x', 'y'\)"),
        (SYNSETS, ["crane"], "none of ImageNet's 4"),
        (SYNSETS, ["n9001", "n9002", "n9003", "n9004"], "4 of 4 labels"),
        (ClassNames(names=("a", "b", "c"), origin="flowers", first=1), ["1", "2"], "2 of 2 labels"),
        (ClassNames(names=(), origin="cifar10"), ["0", "1"], "the labels of cifar10 are numbers here; give --class-names"),
    ],
)  # fmt: skip
def test_a_label_that_stands_for_no_class_is_refused(
    known: ClassNames, labels: list[str], said: str
) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        match_labels(labels, known)
    assert "\n" not in str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "names.txt"
    path.write_bytes(text.encode())
    return path


def test_a_file_holds_names_in_their_order(tmp_path: Path) -> None:
    found = read_class_names(write(tmp_path, "\ufeffred fox\n\n  great gray owl \r\n"))
    assert (found.names, found.labels) == (("red fox", "great gray owl"), None)


def test_a_file_with_tabs_holds_labels_and_names(tmp_path: Path) -> None:
    found = read_class_names(write(tmp_path, "n01\tred fox\nn02\tgray owl\n"))
    assert (found.names, found.labels) == (("red fox", "gray owl"), ("n01", "n02"))
    assert match_labels(["n02"], found).place == {"n02": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no class name"),
        (" \n\n", "no class name"),
        ("a\nb\tc\n", "line 2: 2 cells; expected a name, or label, tab and name"),
        ("a\tb\nc\n", "line 2: 1 cell;"),
        ("a\tb\tc\n", "line 1: 3 cells"),
        ("a\t\n", "line 1: 2 cells"),
        ("a\n\nb\na\n", "line 4: 'a' again"),
        ("1\tfox\n2\tfox\n", "line 2: 'fox' again"),
    ],
)
def test_a_file_that_is_no_list_of_classes_is_refused_by_its_line(
    text: str,
    said: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(OptionError, match=said):
        read_class_names(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    for path in (tmp_path / "names.txt", tmp_path / "none.txt", tmp_path):
        with pytest.raises(OptionError, match="cannot be read"):
            read_class_names(path)
