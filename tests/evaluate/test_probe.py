"""Probes: settings chosen without the test, figures as scikit-learn gives them."""

import json
from pathlib import Path

import numpy as np
import pytest
from apecache_cli.app import app
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from typer.testing import CliRunner

from apecache.errors import DataError
from apecache.evaluate.probe import probe


def digits() -> tuple[NDArray[np.floating], list[str], NDArray[np.floating], list[str]]:
    x, y = load_digits(return_X_y=True)
    names = [f"digit {label}" for label in y]
    return x[:600], names[:600], x[600:1100], names[600:1100]


def test_real_digits_are_found_by_both_probes_and_the_settings_are_those_that_are_told() -> None:
    train, labels, test, wanted = digits()
    report = probe(train, train_labels=labels, test=test, test_labels=wanted)
    assert report.linear > 88
    assert report.knn > 90
    assert (report.n_train, report.n_test, report.n_classes) == (600, 500, 10)
    mean = train.mean(0)
    deviation = train.std(0)
    scale = np.where(deviation > 1e-6, deviation, 1)
    model = LogisticRegression(C=report.regularization, max_iter=1000, tol=1e-3).fit(
        (train - mean) / scale,
        labels,
    )
    assert report.linear == pytest.approx(100 * model.score((test - mean) / scale, wanted))
    nearest = KNeighborsClassifier(report.neighbors, metric="cosine", algorithm="brute")
    assert report.knn == pytest.approx(
        100 * nearest.fit(train.astype(np.float32), labels).score(test, wanted)
    )


def test_the_settings_do_not_depend_on_the_test() -> None:
    train, labels, test, wanted = digits()
    shuffled = list(np.random.default_rng(0).permutation(wanted))
    first = probe(train, train_labels=labels, test=test, test_labels=wanted)
    second = probe(train, train_labels=labels, test=test, test_labels=shuffled)
    assert (first.regularization, first.neighbors) == (second.regularization, second.neighbors)
    assert second.linear < 20


def test_features_without_the_label_stay_at_chance_and_their_scale_does_not_matter() -> None:
    chance = np.random.default_rng(0)
    labels = ["a", "b"] * 100
    noise = chance.standard_normal((200, 8))
    report = probe(
        noise,
        train_labels=labels,
        test=chance.standard_normal((200, 8)),
        test_labels=labels,
    )
    assert 35 < report.linear < 65
    assert report.chance == 50
    train, names, test, wanted = digits()
    assert probe(
        1000 * train + 5,
        train_labels=names,
        test=1000 * test + 5,
        test_labels=wanted,
    ).linear == pytest.approx(
        probe(train, train_labels=names, test=test, test_labels=wanted).linear,
        abs=1.5,
    )


@pytest.mark.parametrize(
    ("labels", "wanted", "said"),
    [
        (["a"] * 20, ["a"] * 4, "one class only"),
        (["a", "b"] * 10, ["a", "c"], "class 'c' has no training rows"),
        (["a", "b", "c", "d"], ["a", "b"], "too few to choose on"),
        (["a"] * 19 + ["b"], ["a", "b"], "too few to choose on"),
    ],
)
def test_what_cannot_be_probed_is_refused(labels: list[str], wanted: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        probe(
            np.ones((len(labels), 3)),
            train_labels=labels,
            test=np.ones((len(wanted), 3)),
            test_labels=wanted,
        )


def test_the_command_probes_before_and_after_the_head(tmp_path: Path, tiny_run: Path) -> None:
    from tiny import make_shapes

    table = make_shapes(tmp_path / "shapes", copies=3)
    command = [
        "evaluate",
        str(tiny_run),
        "--task",
        "probe",
        "--labels",
        str(table),
        "--split",
        "val",
    ]
    command += ["--split-fraction", "train=.6,val=.4"]  # the table's own val has one shape only
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["before"]["n_train"] + told["before"]["n_test"] == 36
    assert {"linear", "knn"} <= told["before"].keys() == told["after"].keys()
    for stage in ("before", "after"):
        for name, (low, high) in told["intervals"][stage].items():
            assert low - 1e-9 <= told[stage][name] <= high + 1e-9
            assert high - low > 1  # no test split is so large that all of n is "100 to 100"
    shown = CliRunner().invoke(app, command)
    assert "after the head" in shown.stdout
    refused = CliRunner().invoke(app, [*command, "--probe-train-split", "tain"])
    assert refused.exit_code == 3
    assert "did you mean train" in refused.output


def labeled_texts(folder: Path) -> Path:
    """42 texts without images: what they are about can be read off their words."""
    words = {"shape": ("circle", "square", "triangle"), "thing": ("photo", "drawing", "shape")}
    before = ("a", "the", "of", "in", "on", "red", "white")
    named = [(label, word) for label, several in words.items() for word in several]
    rows = [
        (f"{first} {word}", label, "test" if first == "white" else "train")
        for first in before
        for label, word in named
    ]
    table = folder / "texts.tsv"
    table.write_text(
        "text\tlabel\tsplit\n" + "".join("\t".join(row) + "\n" for row in rows),
        encoding="utf-8",
    )
    return table


def test_texts_are_probed_as_images_are(tmp_path: Path, tiny_run: Path) -> None:
    from apecache.encoders.load import load_text_encoder
    from apecache.encoders.spec import EncoderSpec
    from apecache.runs.heads import load_heads

    table = labeled_texts(tmp_path)
    run = load_heads(tiny_run)
    command = ["evaluate", str(tiny_run), "--task", "text-probe", "--labels", str(table)]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["before"]["n_train"], told["before"]["n_test"], told["before"]["n_classes"]) == (
        36,
        6,
        2,
    )
    rows = [line.split("\t") for line in table.read_text().splitlines()[1:]]
    features = load_text_encoder(EncoderSpec(**run.text.encoder), "cpu").encode(
        [text for text, *_ in rows]
    )
    for stage, values in (("before", features.half().float()), ("after", run.text.embed(features))):
        parts = {
            split: (
                [i for i, row in enumerate(rows) if row[2] == split],
                [r[1] for r in rows if r[2] == split],
            )
            for split in ("train", "test")
        }
        train, test = (values[parts[split][0]].numpy() for split in ("train", "test"))
        expected = probe(
            train,
            train_labels=parts["train"][1],
            test=test,
            test_labels=parts["test"][1],
        )
        assert told[stage]["linear"] == pytest.approx(expected.linear, abs=6)
    assert told["before"]["linear"] > 80
    assert "36 texts of train" in CliRunner().invoke(app, command).stdout


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("text\tsplit\na\ttrain\n", "no column 'label'"),
        ("label\tsplit\na\ttrain\n", "no column 'caption'"),
        ("text\tlabel\tsplit\na\t\ttrain\nb\tx\ttest\n", "row 2 has no label"),
        ("text\tlabel\tsplit\na\tx\ttrain\n", "no split 'test'"),
    ],
)
def test_texts_that_cannot_be_probed_are_refused(
    table: str,
    said: str,
    tmp_path: Path,
    tiny_run: Path,
) -> None:
    (tmp_path / "t.tsv").write_text(table, encoding="utf-8")
    command = [
        "evaluate",
        str(tiny_run),
        "--task",
        "text-probe",
        "--labels",
        str(tmp_path / "t.tsv"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    assert said in result.output
