"""mteb runs unchanged on an exported folder and gives our own zero-shot accuracy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import draw_shape

import apecache
from apecache.export.export_run import ExportRunSpec, export_run
from benchmarks.small_encoders import build_run

CLASSES = ["red circle", "blue square", "green triangle"]
PROMPTS = [f"a photo of a {name}" for name in CLASSES]


def drawings() -> list[tuple[Image.Image, int]]:
    made = []
    for number in range(9):
        color, shape = CLASSES[number % 3].split()
        made.append((draw_shape(color, shape, 40 + number), number % 3))
    return made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_zero_shot_is_ours_to_the_last_digit(tmp_path: Path) -> None:
    mteb = pytest.importorskip("mteb")
    library = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

    samples = drawings()

    class Drawings(AbsTaskZeroShotClassification):  # type: ignore[misc]
        metadata = TaskMetadata(
            name="Drawings",
            description="Drawings made by this test.",
            reference="https://example.org",
            type="ZeroShotClassification",
            category="i2t",
            modalities=["image", "text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
            dataset={"path": "drawings", "revision": "1"},
            date=("2020-01-01", "2020-01-02"),
            domains=[],
            task_subtypes=["Object recognition"],
            license="cc0-1.0",
            annotations_creators="derived",
            dialect=[],
            sample_creation="created",
            bibtex_citation="",
        )

        def load_data(self, **_: Any) -> None:
            columns = {
                "image": [image for image, _ in samples],
                "label": [label for _, label in samples],
            }
            split = datasets.Dataset.from_dict(columns)
            self.dataset = datasets.DatasetDict({"test": split})
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return PROMPTS

    run = build_run(tmp_path / "made", "hf DINOv2 + hf CLIP", "linear")
    export_run(run, tmp_path / "out", spec=ExportRunSpec(to="sentence-transformers"))
    model = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    result = mteb.evaluate(model, Drawings(), cache=None, co2_tracker=False)
    found = result.task_results[0].scores["test"][0]["accuracy"]
    ours = apecache.load(run, device="cpu")
    images = torch.from_numpy(ours.encode_image([image for image, _ in samples]))
    texts = torch.from_numpy(ours.encode_text(PROMPTS))
    labels = torch.tensor([label for _, label in samples])
    accuracy = float(((images @ texts.T).argmax(1) == labels).double().mean())
    assert found == pytest.approx(accuracy)
