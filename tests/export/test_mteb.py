"""mteb gives our own figures, on a folder of a hub unchanged and on a local one by one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import draw_shape

import apecache
from apecache.errors import MissingExtraError, OptionError
from apecache.export.benchmark_suite import read_suites, run_suite
from apecache.export.export_run import ExportRunSpec, export_run
from apecache.export.mteb_model import SENTENCE_MODEL
from apecache.metrics.retrieval import retrieval_report
from benchmarks.small_encoders import build_run

CLASSES = ["red circle", "blue square", "green triangle"]
PROMPTS = [f"a photo of a {name}" for name in CLASSES]
CAPTIONS = [f"drawing {number} of a {CLASSES[number % 3]}" for number in range(9)]
FIELDS: dict[str, Any] = {
    "description": "Drawings made by this test.",
    "reference": "https://example.org",
    "modalities": ["image", "text"],
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "dataset": {"path": "drawings", "revision": "1"},
    "date": ("2020-01-01", "2020-01-02"),
    "domains": [],
    "task_subtypes": [],
    "license": "cc0-1.0",
    "annotations_creators": "derived",
    "dialect": [],
    "sample_creation": "created",
    "bibtex_citation": "",
}


def drawings() -> list[Image.Image]:
    made = []
    for number in range(9):
        color, shape = CLASSES[number % 3].split()
        made.append(draw_shape(color, shape, 40 + number))
    return made


@pytest.fixture(scope="module")
def mteb() -> ModuleType:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    return pytest.importorskip("mteb", reason="mteb is not installed: pip install apecache[mteb]")


@pytest.fixture(scope="module", params=["hf DINOv2 + hf CLIP", "hf CLIP + st"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run; the texts of the second one have a prompt."""
    return build_run(tmp_path_factory.mktemp("made"), request.param, "linear")


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """The run as a sentence-transformers folder."""
    export_run(run, run.parent / "out", spec=ExportRunSpec(to="sentence-transformers"))
    return run.parent / "out"


def zero_shot_task() -> Any:
    import datasets
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    class Drawings(AbsTaskZeroShotClassification):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="Drawings",
            type="ZeroShotClassification",
            category="i2t",
            main_score="accuracy",
            **FIELDS,
        )

        def load_data(self, **_: Any) -> None:
            labels = [number % 3 for number in range(9)]
            split = datasets.Dataset.from_dict({"image": drawings(), "label": labels})
            self.dataset = datasets.DatasetDict({"test": split})
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return PROMPTS

    return Drawings()


def retrieval_task() -> Any:
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    class DrawingsByText(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="DrawingsByText",
            type="Any2AnyRetrieval",
            category="t2i",
            main_score="hit_rate_at_1",
            **FIELDS,
        )

        def load_data(self, **_: Any) -> None:
            keys = [str(number) for number in range(9)]
            corpus = {"id": keys, "image": drawings()}
            queries = {"id": keys, "text": CAPTIONS}
            split = RetrievalSplitData(
                corpus=datasets.Dataset.from_dict(corpus),
                queries=datasets.Dataset.from_dict(queries),
                relevant_docs={key: {key: 1} for key in keys},
                top_ranked=None,
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return DrawingsByText()


def scores(mteb: ModuleType, model: Any, task: Any) -> Mapping[str, float]:
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return dict(result.task_results[0].scores["test"][0])


def our_accuracy(run: Path) -> float:
    ours = apecache.load(run, device="cpu")
    images = torch.from_numpy(ours.encode_image(drawings()))
    predicted = (images @ torch.from_numpy(ours.encode_text(PROMPTS)).T).argmax(1)
    labels = torch.arange(9) % 3
    return float((predicted == labels).double().mean())


def our_recalls(run: Path) -> dict[int, float]:
    ours = apecache.load(run, device="cpu")
    images = torch.from_numpy(ours.encode_image(drawings()))
    texts = torch.from_numpy(ours.encode_text(CAPTIONS))
    return retrieval_report(images, texts, torch.arange(9)).text_to_image


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["run", "folder"])
def test_figures_of_a_local_model_are_ours_to_the_last_digit(
    source: str,
    mteb: ModuleType,
    run: Path,
    folder: Path,
) -> None:
    model = apecache.mteb_model({"run": run, "folder": folder}[source])
    assert scores(mteb, model, zero_shot_task())["accuracy"] == pytest.approx(our_accuracy(run))
    found = scores(mteb, model, retrieval_task())
    for k, recall in our_recalls(run).items():
        if k < 9:
            assert 100 * found[f"hit_rate_at_{k}"] == pytest.approx(recall, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_sentence_transformer_of_a_folder_is_one_of_texts_to_mteb(
    mteb: ModuleType,
    folder: Path,
) -> None:
    """If this fails, mteb reads local folders too, and the page need not speak of a wrapper."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    assert set(model.modalities) == {"image", "text"}
    with pytest.raises(ValueError, match="but none overlap with task Drawings"):
        scores(mteb, model, zero_shot_task())


@pytest.mark.filterwarnings("ignore")
def test_a_folder_on_a_hub_runs_unchanged(
    mteb: ModuleType,
    run: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub's client is replaced by one that answers from the folder; mteb is not."""
    from huggingface_hub import ModelCard
    from mteb.models import model_meta
    from sentence_transformers import SentenceTransformer

    def read_json(repository: str, name: str, *_: Any, **__: Any) -> Any:
        path = folder / name
        return json.loads(path.read_text()) if path.is_file() else None

    card = ModelCard.load(folder / "README.md")
    monkeypatch.setattr(model_meta, "_repo_exists", lambda _: True)
    monkeypatch.setattr(model_meta, "_get_json_from_hub", read_json)
    monkeypatch.setattr(model_meta, "_get_repo_commits", lambda *_, **__: None)
    monkeypatch.setattr(model_meta.ModelCard, "load", lambda _: card)
    monkeypatch.setattr(model_meta, "get_safetensors_metadata", lambda _: no_weights())
    meta = mteb.get_model_meta("ORG/NAME", fetch_from_hf=True)
    assert meta.modalities == ["image", "text"]
    original = SentenceTransformer.__init__

    def from_folder(self: Any, name: str, **options: Any) -> None:
        original(self, str(folder) if name == "ORG/NAME" else name, **options)

    monkeypatch.setattr(SentenceTransformer, "__init__", from_folder)
    model = meta.load_model(device="cpu")
    assert scores(mteb, model, zero_shot_task())["accuracy"] == pytest.approx(our_accuracy(run))


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """The data of mteb's own tasks, as drawings, in the layout of their repositories."""
    import datasets

    images = drawings()
    root = tmp_path / "data"
    names = ["airplane", "automobile", "bird", "cat"]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    labels = [number % 4 for number in range(9)]
    split = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
    (root / "mteb" / "cifar10").mkdir(parents=True)
    split.to_parquet(root / "mteb" / "cifar10" / "test-00000.parquet")
    pairs = {"image_0": images[:8], "image_1": images[1:]}
    pairs |= {"caption_0": CAPTIONS[:8], "caption_1": CAPTIONS[1:]}
    (root / "winoground").mkdir()
    features = datasets.Features(
        {
            "image_0": datasets.Image(),
            "image_1": datasets.Image(),
            "caption_0": datasets.Value("string"),
            "caption_1": datasets.Value("string"),
        }
    )
    chosen = datasets.Dataset.from_dict(pairs, features=features)
    chosen.to_parquet(root / "winoground" / "test-00000.parquet")
    return root


@pytest.mark.filterwarnings("ignore")
def test_a_suite_of_own_tasks_of_mteb(
    mteb: ModuleType,
    run: Path,
    data_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two tasks as mteb defines them; the data of a third one are nowhere."""
    del mteb
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    suite = "mteb:CIFAR10ZeroShot,Winoground,STL10ZeroShot"
    report = run_suite(run, suite, data_root)
    rows = {row.data_set: row for row in report.rows}
    assert set(rows) == {"CIFAR10ZeroShot", "Winoground"}
    assert "cannot be read" in report.failed["STL10ZeroShot"]
    ours = apecache.load(run, device="cpu")
    images = torch.from_numpy(ours.encode_image(drawings()))
    prompts = [f"a photo of a {name}." for name in ("airplane", "automobile", "bird", "cat")]
    predicted = (images @ torch.from_numpy(ours.encode_text(prompts)).T).argmax(1)
    accuracy = float((predicted == torch.arange(9) % 4).double().mean())
    assert rows["CIFAR10ZeroShot"].metrics["accuracy"] == pytest.approx(accuracy)
    low, high = rows["CIFAR10ZeroShot"].intervals["accuracy"]
    assert low <= accuracy <= high
    assert rows["CIFAR10ZeroShot"].n_images == 9
    texts = torch.from_numpy(ours.encode_text(CAPTIONS))
    cosines = images @ texts.T
    right = [
        bool(cosines[n, n] > cosines[n, n + 1] and cosines[n + 1, n + 1] > cosines[n + 1, n])
        for n in range(8)
    ]
    assert rows["Winoground"].metrics["text_acc"] == pytest.approx(sum(right) / 8)
    assert {r.suite for r in read_suites(run)} == {"mteb"}


@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_named(mteb: ModuleType, run: Path) -> None:
    del mteb
    with pytest.raises(OptionError, match="CIFAR10ZeroShot"):
        run_suite(run, "mteb:CIFAR10Zeroshot", None)


def no_weights() -> Any:
    from huggingface_hub.errors import NotASafetensorsRepoError

    raise NotASafetensorsRepoError("the weights lie in folders of the sides")


def test_the_folder_names_both_modalities_and_keeps_the_prompt(run: Path, folder: Path) -> None:
    """What mteb reads; also where mteb is not installed."""
    described = json.loads((folder / "sentence_bert_config.json").read_text())
    assert sorted(described["modality_config"]) == ["image", "text"]
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    prompt = settings["default_prompt_name"]
    expected = "" if prompt is None else settings["prompts"][prompt]
    assert {settings["prompts"][name] for name in ("query", "document")} == {expected}
    assert (folder / SENTENCE_MODEL).is_file()


def test_without_mteb_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mteb", None)
    with pytest.raises(MissingExtraError, match=r"apecache\[mteb\]"):
        apecache.mteb_model(run)
