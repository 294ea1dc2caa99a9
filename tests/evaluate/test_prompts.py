"""Prompts by name and from files."""

from pathlib import Path

import pytest

from apecache.errors import OptionError
from apecache.evaluate.benchmark_names import Benchmark
from apecache.evaluate.class_names import ClassNames
from apecache.evaluate.prompts import TEMPLATES, find_templates, read_templates

SVHN = Benchmark(
    "svhn",
    ClassNames(names=("zero", "one"), origin="svhn"),
    ("the number {}", "a {}"),
)


def test_a_file_holds_one_template_on_each_line(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_bytes("\ufeffa photo of {}\n\n  ein Bild: {c}, {c} \r\n".encode())
    assert find_templates(str(path)) == ("a photo of {}", "ein Bild: {}, {}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {}\n\na photo\n", r"templates\.txt, line 3: template 'a photo' has no \{\}"),
        ("a {class}\n", "line 1: template"),
        ("\n", "no template; expected one on each line"),
    ],
)
def test_a_file_with_a_bad_template_is_refused_by_its_line(
    text: str,
    said: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "templates.txt"
    path.write_text(text)
    with pytest.raises(OptionError, match=said):
        read_templates(path)


def test_templates_are_split_at_line_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_bytes("a {}\u2028there\r\nb {}\n".encode())
    assert read_templates(path) == ("a {}\u2028there", "b {}")


def test_what_is_no_file_and_no_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError,
        match="no such file; give one, or single, clip-7, clip-80; did you mean clip-8",
    ):
        find_templates("clip-8")
    (tmp_path / "latin").write_bytes(b"\xe9 {}")
    with pytest.raises(OptionError, match="cannot be read"):
        read_templates(tmp_path / "latin")


def test_a_benchmark_brings_its_own_unless_others_are_asked_for() -> None:
    assert find_templates() == find_templates("single") == TEMPLATES
    assert find_templates(None, SVHN) == SVHN.templates
    assert find_templates("single", SVHN) == ("a photo of the number {}",)
