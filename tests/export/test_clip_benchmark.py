"""clip_benchmark gives the figures of ours on a run, and a suite keeps, resumes and lists them."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from apecache_cli.app import app
from PIL import Image
from tiny import draw_shape
from typer.testing import CliRunner

import apecache
from apecache.errors import DataError, OptionError
from apecache.export import benchmark_suite
from apecache.export.benchmark_suite import read_suites, run_suite, suite_names
from apecache.export.clip_benchmark_sets import find_data_sets
from apecache.export.datacomp import DATACOMP
from apecache.export.open_clip_triple import open_clip_triple
from apecache.metrics.retrieval import retrieval_report
from benchmarks.small_encoders import build_run

pytest.importorskip("clip_benchmark")
pytest.importorskip("webdataset")

COLORS = ("red", "blue")
SHAPES = ("circle", "square", "triangle")
CLASSES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
TEMPLATES = ["a photo of a {c}", "a {c}"]


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_wds(folder: Path, retrieval: bool) -> Path:
    """A data set of 12 drawings in clip_benchmark's layout."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as archive:
        for number, (label, image, captions) in enumerate(samples()):
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            add_file(archive, f"{number:04}.png", buffer.getvalue())
            if retrieval:
                add_file(archive, f"{number:04}.txt", "\n".join(captions).encode())
            else:
                add_file(archive, f"{number:04}.cls", str(label).encode())
    if retrieval:
        (folder / "dataset_type.txt").write_text("retrieval")
    else:
        (folder / "classnames.txt").write_text("\n".join(CLASSES))
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return folder


def samples() -> list[tuple[int, Image.Image, list[str]]]:
    made = []
    for number in range(12):
        label = number % len(CLASSES)
        color, shape = CLASSES[label].split()
        image = draw_shape(color, shape, 40 + number)
        made.append((label, image, [f"drawing {number} of a {color} {shape}", f"number {number}"]))
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("made"), "timm + hf BERT", "gated")


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_wds(root / "wds_cifar10", retrieval=False)
    write_wds(root / "retrieval" / "flickr30k", retrieval=True)
    write_wds(root / "drawings", retrieval=False)
    return root


@pytest.mark.filterwarnings("ignore")
def test_figures_are_those_of_ours_to_the_last_digit(run: Path, data_root: Path) -> None:
    report = run_suite(run, "clip-benchmark", data_root)
    rows = {row.data_set: row for row in report.rows}
    assert set(rows) == {"cifar10", "retrieval/flickr30k", "drawings"}
    model = apecache.load(run, device="cpu")
    image = torch.from_numpy(model.encode_image([image for _, image, _ in samples()]))
    texts = [text for _, _, captions in samples() for text in captions]
    owner = torch.arange(12).repeat_interleave(2)
    ours = retrieval_report(image, torch.from_numpy(model.encode_text(texts)), owner)
    for k in (1, 5):
        metrics = rows["retrieval/flickr30k"].metrics
        assert 100 * metrics[f"image_retrieval_recall@{k}"] == pytest.approx(ours.text_to_image[k])
        assert 100 * metrics[f"text_retrieval_recall@{k}"] == pytest.approx(ours.image_to_text[k])
    weights = []
    for name in CLASSES:
        prompts = [template.replace("{c}", name) for template in TEMPLATES]
        embedded = torch.from_numpy(model.encode_text(prompts)).mean(0)
        weights.append(embedded / embedded.norm())
    predicted = (image @ torch.stack(weights).T).argmax(1)
    labels = torch.tensor([label for label, _, _ in samples()])
    accuracy = float((predicted == labels).double().mean())
    assert rows["cifar10"].metrics["acc1"] == pytest.approx(accuracy)
    low, high = rows["cifar10"].intervals["acc1"]
    assert low <= accuracy <= high


@pytest.mark.filterwarnings("ignore")
def test_datacomp_lists_what_is_missing_and_averages_the_rest(
    run: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(DATACOMP) == 38
    measured: list[str] = []
    report = run_suite(run, "datacomp-38", data_root, progress=measured.append)
    assert measured == ["cifar10", "retrieval/flickr30k"]
    assert len(report.missing) == 36
    assert "CIFAR-10" not in report.missing
    rows = {row.data_set: row for row in report.rows}
    scores = (
        rows["cifar10"].metrics["acc1"],
        rows["retrieval/flickr30k"].metrics["mean_recall@1"],
    )
    assert report.main_score == pytest.approx(sum(scores) / 2)
    # Again: everything is there already, so nothing is opened.
    monkeypatch.setattr(benchmark_suite, "open_clip_triple", None)
    assert run_suite(run, "datacomp-38", data_root) == report
    assert report in read_suites(run)
    kept = json.loads((run / "suites" / "datacomp-38.json").read_text())
    assert set(kept["results"]) == {"cifar10", "retrieval/flickr30k"}


def test_names_come_from_folders_and_faults_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no data set of datacomp-38"):
        run_suite(run, "datacomp-38", tmp_path / "empty")
    with pytest.raises(OptionError, match="expected clip-benchmark, clip-benchmark:NAME,…"):
        run_suite(run, "clip-bench", tmp_path)
    with pytest.raises(OptionError, match="--data-root is missing"):
        run_suite(run, "clip-benchmark", None)
    with pytest.raises(OptionError, match="expected a folder, found none"):
        run_suite(run, "clip-benchmark", tmp_path / "none")
    write_wds(tmp_path / "vtab" / "dtd", retrieval=False)
    assert list(find_data_sets(tmp_path)) == ["vtab/dtd"]


@pytest.mark.filterwarnings("ignore")
def test_the_command_and_the_report_show_a_suite(
    tiny_run: Path,
    tmp_path: Path,
    data_root: Path,
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    command = ["evaluate", str(run), "--suite", "datacomp-38", "--device", "cpu"]
    assert CliRunner().invoke(app, command).exit_code == 2
    result = CliRunner().invoke(app, [*command, "--data-root", str(data_root)])
    assert result.exit_code == 0, result.output
    assert "mean of the 2 of 38 tasks that were measured" in result.output
    assert "missing: Caltech-101" in result.output
    page = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page.html")])
    assert page.exit_code == 0, page.output
    text = (tmp_path / "page.html").read_text()
    assert "Suite datacomp-38" in text
    assert "CIFAR-10" in text


@pytest.mark.filterwarnings("ignore")
def test_clip_benchmark_runs_unchanged_on_the_triple(run: Path, data_root: Path) -> None:
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_retrieval

    model, preprocess, tokenizer = open_clip_triple(run)
    folder = str(data_root / "retrieval" / "flickr30k")
    data_set = build_wds_dataset("x", preprocess, data_dir=folder)
    loader = torch.utils.data.DataLoader(data_set.batched(5), batch_size=None)
    found = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False)
    assert set(found) == {"image_retrieval_recall@5", "text_retrieval_recall@5"}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Data sets in the layout of their publishers, of the 12 drawings."""
    root = tmp_path / "published"
    images = root / "sugar_crepe" / "val2017"
    images.mkdir(parents=True)
    choices = {}
    for number, (label, image, captions) in enumerate(samples()):
        image.save(images / f"{number}.png")
        wrong = f"drawing of a {CLASSES[(label + 1) % len(CLASSES)]}"
        choices[str(number)] = {
            "filename": f"{number}.png",
            "caption": captions[0],
            "negative_caption": wrong,
        }
    (root / "sugar_crepe" / "swap_att.json").write_text(json.dumps(choices))
    paths = [str(images / f"{number}.png") for number in range(12)]
    captions_de = {"image_paths": paths, "annotations": [c[0] for _, _, c in samples()]}
    (root / "crossmodal3600").mkdir()
    captions_file = root / "crossmodal3600" / "crossmodal3600_captions-de.json"
    captions_file.write_text(json.dumps(captions_de))
    return root


@pytest.mark.filterwarnings("ignore")
def test_data_sets_that_clip_benchmark_builds(run: Path, published: Path) -> None:
    """SugarCrepe asks for the right one of two captions; Crossmodal-3600 has languages."""
    suite = "clip-benchmark:sugar_crepe/swap_att,crossmodal3600@de,winoground,sugar_crepe/add_obj"
    report = run_suite(run, suite, published)
    rows = {row.data_set: row for row in report.rows}
    assert set(rows) == {"sugar_crepe/swap_att", "crossmodal3600@de"}
    assert "winoground is missing" in report.failed["winoground"]
    assert "would start wget" in report.failed["sugar_crepe/add_obj"]
    model = apecache.load(run, device="cpu")
    image = torch.from_numpy(model.encode_image([image for _, image, _ in samples()]))
    choices = json.loads((published / "sugar_crepe" / "swap_att.json").read_text()).values()
    right = torch.from_numpy(model.encode_text([choice["caption"] for choice in choices]))
    wrong = torch.from_numpy(model.encode_text([choice["negative_caption"] for choice in choices]))
    accuracy = float(((image * right).sum(1) > (image * wrong).sum(1)).double().mean())
    assert rows["sugar_crepe/swap_att"].metrics["text_acc"] == pytest.approx(accuracy)
    ours = retrieval_report(image, right, torch.arange(12))
    found = rows["crossmodal3600@de"].metrics["image_retrieval_recall@1"]
    assert 100 * found == pytest.approx(ours.text_to_image[1])


@pytest.mark.filterwarnings("ignore")
def test_a_stand_in_is_named_and_changed_files_are_measured_again(
    run: Path,
    data_root: Path,
) -> None:
    (data_root / "wds_cifar10" / "source.txt").write_text("drawings, not CIFAR\nmore\n")
    measured: list[str] = []
    report = run_suite(run, "datacomp-38", data_root, progress=measured.append)
    assert {row.title: row.source for row in report.rows}["CIFAR-10"] == "drawings, not CIFAR"
    assert "cifar10" in measured
    classes = data_root / "wds_cifar10" / "classnames.txt"
    classes.write_text(classes.read_text().replace("red circle", "tan circle"))
    measured.clear()
    run_suite(run, "datacomp-38", data_root, progress=measured.append)
    assert measured == ["cifar10"]


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_of_both_suites_is_measured_once(
    tiny_run: Path,
    tmp_path: Path,
    data_root: Path,
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    measured: list[str] = []
    first = run_suite(run, "datacomp-38", data_root, progress=measured.append)
    assert measured == ["cifar10", "retrieval/flickr30k"]
    second = run_suite(run, "clip-benchmark", data_root, progress=measured.append)
    assert measured[2:] == ["drawings"]
    assert all(row in second.rows for row in first.rows)
    assert {len(report.rows) for report in read_suites(run)} == {2, 3}


def test_a_file_lists_suites(tmp_path: Path) -> None:
    path = tmp_path / "suites.txt"
    path.write_text("# ours\nclip-benchmark\n\nmteb:CIFAR10ZeroShot  # one task\n")
    assert suite_names(str(path)) == ("clip-benchmark", "mteb:CIFAR10ZeroShot")
    assert suite_names("datacomp-38") == ("datacomp-38",)
    path.write_text("clip-bench\n")
    with pytest.raises(OptionError, match="found clip-bench"):
        suite_names(str(path))
    with pytest.raises(OptionError, match=r"did you mean .?datacomp-38|datacomp-38"):
        suite_names("datacomp38")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-root", "."], "--data-root has no effect without --suite"),
        (["--suite", "datacomp-38", "--data-root", ".", "--task", "probe"], "--task probe has no"),
        (["--suite", "datacomp-38", "--data-root", ".", "--csls"], "--csls has no effect with"),
        (["--suite", "datacomp-38", "--data-root", ".", "--split", "x"], "--split has no effect"),
        (["--suite", "datacomp-38:x", "--data-root", "."], "expected clip-benchmark"),
        (["--suite", "mteb:", "--data-root", "."], "expected clip-benchmark"),
        (["--suite", "mteb"], "expected clip-benchmark"),
    ],
)
def test_options_that_a_suite_ignores_are_refused(
    tiny_run: Path,
    options: list[str],
    message: str,
) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(tiny_run), *options])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
