"""The page of one run or several: its figures are those of the training, its settings those that
differ."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apecache_cli.app import app
from typer.testing import CliRunner

from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, MismatchError, OptionError, RunError
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import load_recipe
from apecache.report.records import (
    encoder_label,
    named_paths,
    read_records,
    seeds_table,
    settings_table,
)
from apecache.report.report_page import ReportSpec, dev_images, report_page
from apecache.runs.ensemble import ensemble_heads
from apecache.runs.heads import load_heads, save_heads
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec

runner = CliRunner()
SMALL = ["image.dim=16", "text.dim=16", "schedule.epochs=2", "schedule.batch_size=4"]


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> FeatureStore:
    return FeatureStore.open(tiny_store)


@pytest.fixture(scope="module")
def runs(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds of one recipe, and another learning rate."""
    folder = tmp_path_factory.mktemp("several")
    for name, more, seed in (
        ("first", [], 0),
        ("second", [], 1),
        ("faster", ["optimizer.lr=0.01"], 0),
    ):
        recipe = load_recipe("projection", [*SMALL, *more])
        spec = FitSpec(splits=SplitSpec(dev="val"), seed=seed)
        fit_head(store, recipe=recipe, out=folder / name, spec=spec)
    return {name: folder / name for name in ("first", "second", "faster")}


class Cells(HTMLParser):
    """The tables of a page as lists of rows of texts, by their heading."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self._heading = ""
        self._in = ""
        self._text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("h2", "th", "td"):
            self._in = tag
            self._text = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])

    def handle_endtag(self, tag: str) -> None:
        if tag == "h2":
            self._heading = self._text.strip()
        if tag in ("th", "td"):
            self.tables[self._heading][-1].append(self._text.strip().replace("\u00a0", " "))

    def handle_data(self, data: str) -> None:
        self._text += data


def flat(report: RetrievalReport) -> list[str]:
    return [
        f"{value:.1f}" for value in (*report.image_to_text.values(), *report.text_to_image.values())
    ]


def test_without_a_store_figures_are_those_that_training_chose_by(
    runs: dict[str, Path],
    tmp_path: Path,
) -> None:
    page = Cells(report_page([runs["first"]], tmp_path / "page.html"))
    dev = RetrievalReport.from_json(load_heads(runs["first"]).training["dev"])
    table = page.tables["Retrieval, dev split"]
    assert table[1] == ["first", *flat(dev), f"{dev.mean_recall:.1f}", "4", "8"]
    assert table[2][:1] == ["chance"]
    assert table[2][4] == "25.0"
    assert page.tables["The run"][1][:4] == ["first", "projection", "heads", "0"]
    assert "How sure that is" not in page.tables


@pytest.mark.parametrize("splits", [SplitSpec(dev="val"), SplitSpec(dev_images=2, seed=3)])
def test_measured_again_on_its_own_dev_images_a_run_has_the_same_figures(
    splits: SplitSpec,
    write_store: Any,
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    image, text = (rng.standard_normal((n, 12)).astype(np.float32) for n in (30, 60))
    marks = ["val"] * 6 + ["train"] * 24
    store = write_store(tmp_path / "store", image, text, [i // 2 for i in range(60)], marks)
    fit_head(
        store,
        recipe=load_recipe("projection", SMALL),
        out=tmp_path / "run",
        spec=FitSpec(splits=splits, device="cpu"),
    )
    (record,) = read_records([tmp_path / "run"])
    assert int(dev_images(record, store).sum()) == (6 if splits.dev else 2)
    told, measured = (
        Cells(
            report_page([tmp_path / "run"], tmp_path / "page.html", ReportSpec(given, device="cpu"))
        ).tables
        for given in (None, store)
    )
    assert measured["Retrieval, dev split"] == told["Retrieval, dev split"]
    assert len(measured["How sure that is"]) == 2


def test_a_page_with_a_store_shows_pictures_worst_first(
    runs: dict[str, Path],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    page = report_page(
        [runs["first"]],
        tmp_path / "page.html",
        ReportSpec(store, n_items=2, device="cpu"),
    )
    source = page.read_text(encoding="utf-8")
    assert source.index("Drawn at random") < source.index(">Found<")
    assert source.count("data:image/jpeg;base64,") >= 4
    assert "<script" not in source
    assert "default-src 'none'" in source


def test_another_split_is_measured_only_when_asked_for(
    runs: dict[str, Path],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    page = report_page(
        [runs["first"]],
        tmp_path / "page.html",
        ReportSpec(store, "train", device="cpu"),
    )
    assert Cells(page).tables["Retrieval, split train"][1][-2:] == ["8", "16"]
    assert "no measure of generalization" in page.read_text(encoding="utf-8")


def test_several_runs_are_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    tables = Cells(report_page(list(runs.values()), tmp_path / "page.html")).tables
    assert [row[0] for row in tables["Runs"][1:]] == list(runs)
    assert tables["Settings that differ"][0] == ["setting", *runs]
    assert [row[0] for row in tables["Settings that differ"][1:]] == ["optimizer.lr"]
    assert tables["Settings that differ"][1][1:] == ["0.002", "0.002", "0.01"]
    (_, seeds, _) = tables["Seeds of one recipe"]
    assert seeds[0].startswith("projection, ")
    assert seeds[0].endswith(": first, second")
    assert seeds[1] == "2"
    values = [r.dev.mean_recall for r in read_records([runs["first"], runs["second"]]) if r.dev]
    assert seeds[-1].startswith(f"{np.mean(values):.1f} (")
    assert tables["What it has cost"][0] == ["", *runs]


def test_runs_of_other_settings_or_one_seed_are_no_group(runs: dict[str, Path]) -> None:
    records = read_records([runs["first"], runs["faster"]])
    assert seeds_table(records, {r.name: r.dev for r in records if r.dev}) is None
    assert settings_table(read_records([runs["first"], runs["second"]])) is None


def test_seeds_that_agree_have_an_interval_over_images_with_a_store_and_without(
    runs: dict[str, Path],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    """Two seeds of one model: a closed form gives the same heads for every seed."""
    copies = []
    for seed in (0, 1):
        recipe = load_recipe("csa", ["closed_form.ridge=[0.1]", "closed_form.rank=[4]"])
        fit_head(
            store,
            recipe=recipe,
            out=tmp_path / f"seed-{seed}",
            spec=FitSpec(splits=SplitSpec(dev="val"), seed=seed),
        )
        copies.append(tmp_path / f"seed-{seed}")
    for given in (None, store):
        tables = Cells(
            report_page(copies, tmp_path / "page.html", ReportSpec(given, device="cpu"))
        ).tables
        _, row, chance = tables["Seeds of one recipe"]
        assert chance[0] == "chance"
        assert chance[5] == "25.0"
        for cell in row[2:]:
            mean, low, high = (float(number) for number in re.findall(r"\d+\.\d", cell))
            assert low <= mean <= high
            assert high - low > 20, cell  # four images


def test_runs_of_other_encoders_are_no_group_and_each_group_names_its_own(
    runs: dict[str, Path],
) -> None:
    """Encoders of one name that differ in their digests alone."""
    records = read_records([runs["first"], runs["second"]])
    reports = {record.name: record.dev for record in records if record.dev}
    whole = seeds_table(records, reports)
    assert whole is not None
    image, text = (records[0].settings[f"{side} encoder"] for side in ("image", "text"))
    assert whole.rows[0][0] == f"projection, {image} and {text}: first, second"
    for digests in (("other", records[1].encoders[1]), (records[1].encoders[0], "other")):
        assert seeds_table([records[0], replace(records[1], encoders=digests)], reports) is None


@pytest.mark.parametrize(
    "change",
    [{"pooling": "cls"}, {"layer": 3}, {"resolution": 64}, {"prefix": "query: "}],
)
def test_the_label_of_an_encoder_tells_its_cut_and_sizes(change: dict[str, Any]) -> None:
    plain = EncoderSpec("hf", "some/model", "image")
    assert encoder_label(plain, "d" * 20) == "hf:some/model"
    (name,) = change
    assert (
        encoder_label(replace(plain, **change), "d" * 20)
        == f"hf:some/model ({name} {change[name]})"
    )
    assert "digest …abcdefgh" in encoder_label(replace(plain, name="/home/me/model"), "0abcdefgh")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/run", "b/run"], ["a/run", "b/run"]),
        (["a/run-0", "b/run-1"], ["run-0", "run-1"]),
        (["x/a/run", "y/a/run", "y/b/run"], ["x/a/run", "y/a/run", "b/run"]),
        (["run", "prun"], ["run", "prun"]),
    ],
)
def test_runs_are_named_by_as_little_of_their_path_as_tells_them_apart(
    paths: list[str],
    names: list[str],
) -> None:
    assert list(named_paths([Path(path) for path in paths])) == names


def test_a_combination_is_measured_on_a_split(
    runs: dict[str, Path],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    save_heads(
        ensemble_heads([load_heads(runs["first"]), load_heads(runs["faster"])]),
        tmp_path / "both",
    )
    with pytest.raises(DataError, match="says nothing of a dev split"):
        report_page([tmp_path / "both"], tmp_path / "page.html")
    page = report_page(
        [tmp_path / "both"],
        tmp_path / "page.html",
        ReportSpec(store, "val", device="cpu"),
    )
    assert Cells(page).tables["The run"][1][:2] == ["both", "combination"]
    anywhere = replace(load_heads(runs["first"]), training={})
    save_heads(anywhere, tmp_path / "anywhere")
    with pytest.raises(DataError, match="say what to measure on with --split"):
        report_page([tmp_path / "anywhere"], tmp_path / "page.html", ReportSpec(store))


def _broken(run: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    for name, change in (
        ("dev", {"dev": {"image_to_text": 3}}),
        ("seconds", {"seconds": [1]}),
        ("splits", {"splits": 7}),
    ):
        copy = shutil.copytree(run, folder / name)
        value = json.loads((copy / "head.json").read_text())
        value["training"] |= change
        (copy / "head.json").write_text(json.dumps(value))
        yield copy, "does not say how it was trained"
    copy = shutil.copytree(run, folder / "history")
    (copy / "history.jsonl").write_text("{\n")
    yield copy, "history.jsonl is damaged"


def test_what_cannot_be_reported_is_refused_by_name(
    runs: dict[str, Path],
    store: FeatureStore,
    write_store: Any,
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.html"
    for run, words in _broken(runs["first"], tmp_path):
        with pytest.raises(RunError, match=words):
            report_page([run], page)
    with pytest.raises(RunError, match="not a finished run"):
        report_page([tmp_path], page)
    with pytest.raises(OptionError, match="given twice"):
        report_page([runs["first"], runs["first"].parent / "." / "first"], page)
    features = np.ones((12, 4), np.float32), np.ones((12, 4), np.float32)
    other = write_store(tmp_path / "other", *features, list(range(12)), ["train"] * 12)
    with pytest.raises(DataError, match="trained on another table"):
        report_page([runs["first"]], page, ReportSpec(other))
    with pytest.raises(MismatchError, match="not of the encoder"):
        report_page([runs["first"]], page, ReportSpec(other, "train"))
    assert not page.exists()


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    runs: dict[str, Path],
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    done = runner.invoke(app, ["report", str(runs["first"]), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["page"] == str(runs["first"].parent / "first-report.html")
    names = [str(path) for path in runs.values()]
    out = tmp_path / "all.html"
    done = runner.invoke(
        app,
        ["report", *names, "--store", str(tiny_store), "--out", str(out), "--title", "<b>mine</b>"],
    )
    assert done.exit_code == 0, done.output
    assert "&lt;b&gt;mine&lt;/b&gt;" in out.read_text(encoding="utf-8")
    for arguments, words in (
        (names, "--out is missing"),
        ([names[0], "--split", "val"], "give --store STORE too"),
        ([names[0], "--out", str(tmp_path / "no" / "page.html")], "a folder that exists"),
        (
            [names[0], "--store", str(tiny_store), "--root", str(tmp_path / "nowhere")],
            "expected a folder, found none",
        ),
    ):
        wrong = runner.invoke(app, ["report", *arguments])
        assert (wrong.exit_code, words in wrong.output) == (2, True), wrong.output


def test_runs_whose_towers_trained_stand_beside_runs_of_heads(
    runs: dict[str, Path],
    store: FeatureStore,
    shapes_once: Path,
    tmp_path: Path,
) -> None:
    media = FolderMedia(root=shapes_once.parent)
    spec = FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu")
    recipe = load_recipe("lilt-d", ["schedule.epochs=1", "schedule.batch_size=4"])
    fit_encoder(
        store,
        recipe=recipe,
        out=tmp_path / "towers",
        spec=spec,
        open_image=lambda key: load_image(key, media).image,
    )
    both = [runs["first"], tmp_path / "towers"]
    told, measured = (
        Cells(report_page(both, tmp_path / "page.html", ReportSpec(given, device="cpu"))).tables
        for given in (None, store)
    )
    assert [row[2] for row in told["Runs"][1:]] == ["heads", "towers"]
    assert measured["Retrieval, dev split"] == told["Retrieval, dev split"]


def test_a_split_that_the_store_has_not_is_refused(
    runs: dict[str, Path],
    store: FeatureStore,
    tmp_path: Path,
) -> None:
    with pytest.raises(DataError, match=r"no split 'vall'; .*did you mean val"):
        report_page(
            [runs["first"]],
            tmp_path / "page.html",
            ReportSpec(store, "vall", device="cpu"),
        )
