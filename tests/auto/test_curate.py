"""The data doctor finds planted faults, and its keep list leaves them out."""

import json
from pathlib import Path

import numpy as np
import pytest
from planted_pairs import Planted
from recipes import SMALL
from sklearn.metrics import average_precision_score

from apecache.auto.curate import CurateReport, CurateSpec, curate
from apecache.auto.pair_scores import combine_shares, estimate_share_wrong, posterior_wrong
from apecache.errors import DataError, MismatchError, OptionError, RecipeError, RunError
from apecache.recipes.recipe import load_recipe
from apecache.report.curate_page import write_curate_page
from apecache.runs.heads import load_heads
from apecache.train.batches import SplitSpec
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from apecache.train.keep_list import read_keep_list

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> CurateReport:
    out = tmp_path_factory.mktemp("curated") / "out"
    return curate(planted.store, out, CurateSpec(device="cpu"))


def test_planted_errors_come_first(planted: Planted, report: CurateReport) -> None:
    wrong = planted.wrong[report.text_rows]
    assert average_precision_score(wrong, report.scores.wrong_share) > 0.8
    assert report.share_wrong == pytest.approx(0.1, abs=0.05)
    flagged = [caption.row for caption in report.wrong_captions]
    assert planted.wrong[flagged[:40]].mean() > 0.9
    probabilities = [caption.probability for caption in report.wrong_captions]
    assert min(probabilities) >= 0.5


def test_the_keep_list_leaves_out_the_flagged_captions_alone(
    planted: Planted,
    report: CurateReport,
) -> None:
    kept = read_keep_list(report.out / "keep.tsv", planted.store.pairs)
    assert (~kept).sum() == report.n_dropped > 0
    assert set(np.flatnonzero(~kept)) == {caption.row for caption in report.wrong_captions}


def test_clean_pairs_are_mostly_kept(clean: Planted, tmp_path: Path) -> None:
    spec = CurateSpec(image_features="eye0", device="cpu")
    found = curate(clean.store, tmp_path, spec)
    assert found.n_dropped < 0.03 * found.n_captions


def test_copies_across_splits_are_found(report: CurateReport) -> None:
    pairs = {(copy.first_key, copy.second_key) for copy in report.near_images}
    expected = {(f"images/{row}.png", f"images/{300 + row}.png") for row in range(2)}
    assert pairs == expected
    assert {(copy.first_split, copy.second_split) for copy in report.near_images} == {
        ("train", "val")
    }


def test_groups_cover_all_images(report: CurateReport) -> None:
    assert sum(group.n_train for group in report.groups) == 260
    assert sum(group.n_other for group in report.groups) == 60


def test_findings_and_page_are_written(report: CurateReport, tmp_path: Path) -> None:
    findings = json.loads((report.out / "curate.json").read_text())
    assert findings["n_dropped"] == report.n_dropped
    page = write_curate_page(report, tmp_path / "index.html").read_text()
    assert "Captions that are likely wrong" in page
    assert report.wrong_captions[0].caption in page


def test_a_run_gives_recipe_features_and_split(planted: Planted, tmp_path: Path) -> None:
    recipe = load_recipe(SMALL, ["schedule.epochs=8"])
    fit_head(planted.store, recipe=recipe, out=tmp_path / "run", spec=FitSpec(device="cpu"))
    found = curate(
        planted.store,
        tmp_path / "out",
        CurateSpec(run=tmp_path / "run", n_folds=2, device="cpu"),
    )
    wrong = planted.wrong[found.text_rows]
    assert average_precision_score(wrong, found.scores.wrong_share) > 0.5
    assert found.n_images == 260  # the drawn dev images are examined, too
    with pytest.raises(RunError, match="not a finished run"):
        curate(planted.store, tmp_path / "out", CurateSpec(run=tmp_path))


def test_trained_heads_of_a_recipe_score_out_of_fold(planted: Planted, tmp_path: Path) -> None:
    spec = CurateSpec(recipe="projection", n_folds=2, device="cpu")
    found = curate(planted.store, tmp_path, spec)
    wrong = planted.wrong[found.text_rows]
    assert average_precision_score(wrong, found.scores.wrong_share) > 0.7
    with pytest.raises(RecipeError, match="within the towers"):
        curate(planted.store, tmp_path, CurateSpec(recipe="lit", device="cpu"))
    with pytest.raises(OptionError, match="--run and --recipe are both given"):
        curate(planted.store, tmp_path, CurateSpec(run=tmp_path, recipe="cca"))


def test_a_fit_trains_on_the_kept_pairs_alone(
    planted: Planted,
    report: CurateReport,
    tmp_path: Path,
) -> None:
    recipe = load_recipe(SMALL, ["schedule.epochs=1"])
    spec = FitSpec(device="cpu", splits=SplitSpec(dev="val"), keep=report.out / "keep.tsv")
    kept = fit_head(planted.store, recipe=recipe, out=tmp_path / "kept", spec=spec)
    assert kept.n_dev_images == 60
    assert "keep" in load_heads(tmp_path / "kept").training
    lines = (report.out / "keep.tsv").read_text().splitlines()
    few = tmp_path / "few.tsv"
    few.write_text("\n".join(lines[:61]) + "\n")
    spec = FitSpec(device="cpu", splits=SplitSpec(dev="val"), keep=few)
    fitted = fit_head(planted.store, recipe=recipe, out=tmp_path / "few", spec=spec)
    keys = {line.split("\t")[0] for line in lines[1:61]}
    assert fitted.n_train_images == len(keys)


def test_an_interrupted_fit_does_not_resume_with_another_keep_list(
    planted: Planted,
    report: CurateReport,
    tmp_path: Path,
) -> None:
    class StopError(Exception):
        pass

    def stop(_: object) -> None:
        raise StopError

    recipe = load_recipe(SMALL)
    with pytest.raises(StopError):
        fit_head(planted.store, recipe, tmp_path / "run", FitSpec(device="cpu"), progress=stop)
    spec = FitSpec(device="cpu", keep=report.out / "keep.tsv")
    if (tmp_path / "run" / "checkpoint.safetensors").is_file():
        with pytest.raises(MismatchError):
            fit_head(planted.store, recipe, tmp_path / "run", spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption\n", "not a keep list"),
        ("image\tcaption\nimages/0.png\n", "line 2: expected 2 columns, found 1"),
        ("image\tcaption\nimages/0.png\tno such\n", "1 pair that the store does not have"),
    ],
)
def test_what_is_no_keep_list_is_refused(
    planted: Planted,
    tmp_path: Path,
    text: str,
    message: str,
) -> None:
    (tmp_path / "keep.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_keep_list(tmp_path / "keep.tsv", planted.store.pairs)


def test_a_missing_keep_list_is_refused(planted: Planted, tmp_path: Path) -> None:
    spec = FitSpec(device="cpu", keep=tmp_path / "none.tsv")
    with pytest.raises(DataError, match="cannot be read as a keep list"):
        fit_head(planted.store, load_recipe(SMALL), tmp_path / "run", spec)


def test_too_few_images_are_refused(planted: Planted, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least 4 a fold"):
        curate(planted.store, tmp_path, CurateSpec(n_folds=100, device="cpu"))


def test_combined_shares_of_wrong_captions_are_uniform() -> None:
    rng = np.random.default_rng(0)
    shares = combine_shares(rng.uniform(size=20_000), rng.uniform(size=20_000))
    assert np.quantile(shares, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.02)
    single = combine_shares(np.array([0.3]), np.array([np.nan]))
    assert single.tolist() == [0.3]


def test_the_share_of_wrong_captions_and_their_posterior_are_recovered() -> None:
    rng = np.random.default_rng(0)
    right = rng.beta(0.2, 20, size=8_000)
    shares = np.concatenate((right, rng.uniform(size=2_000)))
    share_wrong = estimate_share_wrong(shares)
    assert share_wrong == pytest.approx(0.2, abs=0.02)
    posterior = posterior_wrong(shares, share_wrong)
    assert posterior[:8_000].mean() < 0.1
    assert posterior[8_000:].mean() > 0.6
    assert np.all(np.diff(posterior[np.argsort(shares)]) >= -1e-9)
