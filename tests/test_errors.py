"""The error tree, its exit codes and its helpers."""

import inspect
import re
from pathlib import Path

import pytest

from apecache import errors
from apecache.errors import (
    ApecacheError,
    MismatchError,
    MissingExtraError,
    RowError,
    RunError,
    counted,
    nearest,
    require_new,
)

TREE = {
    name: error
    for name, error in inspect.getmembers(errors, inspect.isclass)
    if issubclass(error, ApecacheError) and error is not ApecacheError
}


def test_the_docstring_draws_the_tree_that_there_is() -> None:
    drawn = {}
    path = ["ApecacheError"]
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"    ([│ ]*)[├└]── (\w+)", line):
            del path[1 + len(found[1]) // 4 :]
            drawn[found[2]] = path[-1]
            path.append(found[2])
    assert drawn == {name: error.__bases__[0].__name__ for name, error in TREE.items()}


def test_every_error_ends_the_command_with_the_exit_code_drawn_in_the_docstring() -> None:
    codes = {"MissingExtraError": 1, "EngineError": 1, "OptionError": 2, "MismatchError": 4}
    codes["UnwritableError"] = 1
    assert {name: error.exit_code for name, error in TREE.items()} == {
        name: codes.get(name, 3) for name in TREE
    }
    assert ApecacheError.exit_code == 1
    for name, code in [*codes.items(), ("DataError", 3)]:
        assert re.search(rf"{name} +{code} ", errors.__doc__ or "")


@pytest.mark.parametrize("name", sorted(TREE))
def test_errors_are_builtin_errors_too(name: str) -> None:
    builtin = {"MissingExtraError": ImportError, "EngineError": RuntimeError}
    assert issubclass(TREE[name], builtin.get(name, ValueError))


def test_a_missing_extra_names_its_pip_line() -> None:
    assert (
        str(MissingExtraError("faiss", "cpu"))
        == "faiss is not installed; install it with: pip install 'apecache[cpu]'"
    )


def test_a_mismatch_carries_its_differences() -> None:
    assert MismatchError("x").differences == ()
    assert MismatchError("x", iter([("a", 1, 2)])).differences == (("a", 1, 2),)


def test_a_row_error_is_no_error_of_the_run() -> None:
    error = RowError("missing", "a.jpg: no such file")
    assert not isinstance(error, ApecacheError)
    assert (error.reason, error.detail, str(error)) == (
        "missing",
        "a.jpg: no such file",
        "missing: a.jpg: no such file",
    )


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("caption", ["captions", "image"], "; did you mean captions?"),
        ("zzz", ["captions"], ""),
        ("a", [], ""),
        (
            "abcd",
            ["abcd1", "abcd", "a", "abcd12", "abcd123"],
            "; did you mean abcd, abcd1, abcd12?",
        ),
    ],
)
def test_at_most_three_of_the_nearest_names_are_suggested_best_first(
    name: str,
    known: list[str],
    said: str,
) -> None:
    assert nearest(name, iter(known)) == said


@pytest.mark.parametrize("name", ["LILT-I", "liltI", "lilt_i", "Lilt I"])
def test_case_and_separators_do_not_count_for_the_nearest_name(name: str) -> None:
    assert nearest(name, ["projection", "lilt-i"]) == "; did you mean lilt-i?"


def test_a_name_of_separators_alone_is_close_to_itself() -> None:
    assert nearest("--", ["..", "--"]).startswith("; did you mean --")


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (2, "class", "2 classes"),
        (1, "class", "1 class"),
        (12_345, "dev image", "12,345 dev images"),
    ],
)
def test_a_count_has_its_noun_in_the_right_number(count: int, noun: str, said: str) -> None:
    assert counted(count, noun) == said


def test_only_something_new_or_an_empty_folder_is_written_to(tmp_path: Path) -> None:
    require_new(tmp_path / "new", "run")
    require_new(tmp_path, "run")
    (tmp_path / "file").write_text("")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(
            RunError,
            match=rf"^run {re.escape(str(taken))} exists already; choose .*--overwrite$",
        ):
            require_new(taken, "run")
        require_new(taken, "run", overwrite=True)
        for overwrite in (False, True):
            # `--overwrite` is not advised where it would be refused.
            with pytest.raises(
                RunError,
                match=rf"^{re.escape(str(taken))} holds other files than those of one run, so it is "
                "not overwritten; choose another --out$",
            ):
                require_new(taken, "run", overwrite=overwrite, holds_another=False)
