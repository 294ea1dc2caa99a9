"""Zero-shot classification by the run's own encoders, its prompts, and the cache beside the run."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.data.pairs import PairSource
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.encoders.encoder import TextEncoder
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import BadRowsError, DataError, ManifestError, MismatchError, OptionError
from apecache.evaluate.class_names import ClassNames
from apecache.evaluate.labeled import LabeledSpec
from apecache.evaluate.prompts import TEMPLATES
from apecache.evaluate.zeroshot import (
    ZeroShotSpec,
    class_embeddings,
    classification_report,
    zero_shot,
)
from apecache.extraction.run import ExtractionState
from apecache.runs.heads import TrainedHeads, load_heads
from apecache.runs.load import Embed

CLASSES = ("circle", "square", "triangle")


@pytest.fixture
def heads(tiny_run: Path) -> TrainedHeads:
    return load_heads(tiny_run)


@pytest.fixture(scope="module")
def text_encoder(tiny_run: Path) -> TextEncoder:
    return load_text_encoder(EncoderSpec(**load_heads(tiny_run).text.encoder), "cpu")


def spec_for(
    labels: Path, caches: Path, root: Path | None = None, split: str | None = None, image: Any = None,
    max_bad: float = 0.01, **options: Any,
) -> ZeroShotSpec:  # fmt: skip
    source = open_pairs(labels, OpenSpec(root=root, require=("image", "label")))
    splits = () if split is None else (split,)
    return ZeroShotSpec(
        LabeledSpec(
            source,
            caches=caches,
            splits=splits,
            encoder=image,
            device="cpu",
            max_bad=max_bad,
        ),
        **options,
    )


def by_heads(heads: TrainedHeads, encoder: TextEncoder) -> Embed:
    return lambda texts: heads.text.embed(encoder.encode(texts))


def embed_images(heads: TrainedHeads, keys: list[str], root: Path) -> Tensor:
    encoder = load_image_encoder(EncoderSpec(**heads.image.encoder), "cpu")
    pixels = torch.stack(
        [encoder.preprocess(load_image(key, FolderMedia(root=root)).image) for key in keys]
    )
    return heads.image.embed(encoder.encode(pixels))


# --- prompts --------------------------------------------------------------------------------------


def embed_texts(heads: TrainedHeads, encoder: TextEncoder, *texts: str) -> Tensor:
    return torch.cat([heads.text.embed(encoder.encode([text])) for text in texts])


def test_a_class_is_the_mean_of_its_prompts_each_normalized_first(
    heads: TrainedHeads,
    text_encoder: TextEncoder,
) -> None:
    templates = ("a photo of {}", "the {} in red {}", "{}")
    found = class_embeddings(by_heads(heads, text_encoder), CLASSES, templates)
    for row, name in enumerate(CLASSES):
        single = embed_texts(
            heads,
            text_encoder,
            f"a photo of {name}",
            f"the {name} in red {name}",
            name,
        )
        torch.testing.assert_close(
            found[row],
            F.normalize(single.mean(0), dim=0),
            rtol=1e-4,
            atol=1e-5,
        )


def test_underscores_in_class_names_are_spaces(
    heads: TrainedHeads,
    text_encoder: TextEncoder,
) -> None:
    found = class_embeddings(by_heads(heads, text_encoder), ("red_circle",), ("a {}",))
    torch.testing.assert_close(
        found,
        embed_texts(heads, text_encoder, "a red circle"),
        rtol=1e-4,
        atol=1e-5,
    )
    other = embed_texts(heads, text_encoder, "a red_circle")
    assert not torch.allclose(found, other, atol=1e-3)


def test_lilts_prompt_is_the_default(tmp_path: Path) -> None:
    spec = ZeroShotSpec(LabeledSpec(PairSource(()), tmp_path))
    assert spec.templates == TEMPLATES == ("a photo of {}",)


@pytest.mark.parametrize("templates", [("a photo",), ("a {}", "a photo of { }"), ("",)])
def test_a_template_without_a_place_for_the_class_is_refused_before_anything_is_read(
    templates: tuple[str, ...],
    heads: TrainedHeads,
    tmp_path: Path,
) -> None:
    with pytest.raises(OptionError, match=r"has no \{\} for the class name") as caught:
        zero_shot(heads, ZeroShotSpec(LabeledSpec(PairSource(()), tmp_path / "caches"), templates))
    assert caught.value.exit_code == 2


# --- the report -----------------------------------------------------------------------------------


def test_images_are_classified_by_their_nearest_class_name(
    heads: TrainedHeads,
    text_encoder: TextEncoder,
    shapes: Path,
    tmp_path: Path,
) -> None:
    templates = ("a photo of {}", "a drawing of {}")
    report = zero_shot(heads, spec_for(shapes, tmp_path / "caches", templates=templates))
    keys = sorted(
        str(path.relative_to(shapes.parent)) for path in (shapes.parent / "images").iterdir()
    )
    labels = [Path(key).stem.split("-")[1] for key in keys]
    scores = (
        embed_images(heads, keys, shapes.parent)
        @ class_embeddings(by_heads(heads, text_encoder), CLASSES, templates).T
    )
    predicted = [CLASSES[row] for row in scores.argmax(1)]
    right = [a == b for a, b in zip(predicted, labels, strict=True)]
    assert report.top1 == pytest.approx(100 * sum(right) / 12)
    recalls = [
        sum(r for r, label in zip(right, labels, strict=True) if label == name) / 4
        for name in CLASSES
    ]
    assert report.mean_per_class == pytest.approx(100 * sum(recalls) / 3)
    assert (report.top5, report.n_images, report.n_classes) == (100, 12, 3)
    assert (report.chance_top1, report.chance_top5) == (pytest.approx(100 / 3), 100)
    assert (report.templates, report.classes) == (templates, CLASSES)


@st.composite
def score_tables(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    n_classes = draw(st.integers(1, 7))
    row = st.lists(st.integers(-2, 2), min_size=n_classes, max_size=n_classes)
    scores = draw(st.lists(row, min_size=1, max_size=8))
    return scores, draw(
        st.lists(st.integers(0, n_classes - 1), min_size=len(scores), max_size=len(scores))
    )


@settings(deadline=None, max_examples=100)
@given(score_tables())
def test_accuracies_equal_their_definition_with_ties_counted_as_wrong(
    table: tuple[list[list[int]], list[int]],
) -> None:
    scores, targets = table
    n_classes = len(scores[0])
    report = classification_report(
        torch.tensor(scores).float(),
        targets,
        tuple(map(str, range(n_classes))),
    )
    ranks = [
        sorted(range(n_classes), key=lambda c: (-row[c], c == target)).index(target)
        for row, target in zip(scores, targets, strict=True)
    ]
    assert report.top1 == pytest.approx(100 * sum(rank == 0 for rank in ranks) / len(ranks))
    assert report.top5 == pytest.approx(100 * sum(rank < 5 for rank in ranks) / len(ranks))
    of_class = {
        c: [r == 0 for r, t in zip(ranks, targets, strict=True) if t == c] for c in set(targets)
    }
    assert report.mean_per_class == pytest.approx(
        100 * sum(sum(h) / len(h) for h in of_class.values()) / len(of_class)
    )
    assert report.counts == tuple(targets.count(c) for c in range(n_classes))
    assert report.empty == tuple(str(c) for c in range(n_classes) if c not in targets)
    assert sum(count for *_, count in report.confusions) == sum(rank > 0 for rank in ranks)
    assert all(truth != taken for truth, taken, _ in report.confusions)
    assert report.chance_top1 == pytest.approx(100 / n_classes)
    assert report.chance_top5 == pytest.approx(min(100, 500 / n_classes))


def test_scores_that_are_all_alike_classify_nothing() -> None:
    report = classification_report(torch.ones(6, 3), [0, 1, 2] * 2, CLASSES)
    assert report.top1 == report.mean_per_class == 0


def test_confusions_name_the_class_and_what_it_was_taken_for_the_most_frequent_first() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0]] * 3 + [[0.0, 1.0, 2.0]] + [[0.0, 0.0, 1.0]])
    report = classification_report(scores, [0, 0, 0, 1, 2], CLASSES)
    assert report.confusions == (("circle", "square", 3), ("square", "triangle", 1))


# --- names of classes -----------------------------------------------------------------------------


def test_names_from_elsewhere_are_the_candidates_and_those_without_images_are_told(
    heads: TrainedHeads,
    text_encoder: TextEncoder,
    shapes: Path,
    tmp_path: Path,
) -> None:
    spoken = ("a white circle", "the square", "drawing of a photo", "triangle")
    names = ClassNames(names=spoken, origin="file", labels=("circle", "square", "*", "triangle"))
    report = zero_shot(
        heads,
        spec_for(shapes, tmp_path / "caches", templates=("{c}",), names=names),
    )
    assert (report.classes, report.counts, report.empty) == (
        names.names,
        (4, 4, 0, 4),
        (spoken[2],),
    )
    assert (report.n_classes, report.matched, report.templates) == (4, "by label", ("{}",))
    keys = sorted(
        str(path.relative_to(shapes.parent)) for path in (shapes.parent / "images").iterdir()
    )
    targets = torch.tensor([(0, 1, 3)[CLASSES.index(Path(key).stem.split("-")[1])] for key in keys])
    weights = class_embeddings(by_heads(heads, text_encoder), names.names, ("{}",))
    found = (embed_images(heads, keys, shapes.parent) @ weights.T).argmax(1)
    assert report.top1 == pytest.approx(100 * float((found == targets).double().mean()))


def test_a_label_without_a_name_is_refused_before_anything_is_encoded(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    names = ClassNames(names=("circle", "square"), origin="names.txt")
    with pytest.raises(
        OptionError,
        match=r"1 of 3 labels are none of names\.txt's 2 classes \('triangle'\)",
    ):
        zero_shot(heads, spec_for(shapes, tmp_path / "caches", names=names))
    assert not (tmp_path / "caches").exists()


# --- the table ------------------------------------------------------------------------------------


def test_only_the_images_of_the_asked_split_are_classified(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    report = zero_shot(heads, spec_for(shapes, tmp_path / "caches", split="val"))
    assert (report.n_images, report.classes) == (4, ("triangle",))


def test_a_split_that_is_not_there_is_refused_with_the_nearest(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ManifestError,
        match=r"no split 'vall'; found: train, val; did you mean val\?",
    ):
        zero_shot(heads, spec_for(shapes, tmp_path / "caches", split="vall"))


def write_labels(shapes: Path, rows: list[tuple[str, str]]) -> Path:
    table = shapes.with_name("labels.tsv")
    table.write_text(
        "image\tlabel\n" + "".join(f"{key}\t{label}\n" for key, label in rows),
        encoding="utf-8",
    )
    return table


@pytest.mark.parametrize("label", ["", "  "])
def test_an_image_without_a_label_is_refused_by_name(
    label: str,
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    table = write_labels(
        shapes,
        [("images/red-circle-0.png", "circle"), ("images/red-square-0.png", label)],
    )
    with pytest.raises(
        ManifestError,
        match=r"labels\.tsv: image images/red-square-0\.png has no label",
    ):
        zero_shot(heads, spec_for(table, tmp_path / "caches"))
    assert not (tmp_path / "caches").exists()


def test_a_table_without_labels_is_refused(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    shapes.write_text("image\tcaption\tlabels\nimages/red-circle-0.png\tx\ty\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"no column 'label'.*did you mean labels"):
        zero_shot(heads, spec_for(shapes, tmp_path / "caches"))


# --- images that cannot be read -------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_left_out(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    (shapes.parent / "images" / "red-circle-0.png").write_bytes(b"<html>")
    with pytest.raises(BadRowsError, match="1 of 12 image rows could not be encoded"):
        zero_shot(heads, spec_for(shapes, tmp_path / "caches"))
    report = zero_shot(heads, spec_for(shapes, tmp_path / "caches", max_bad=0.1))
    assert (report.n_images, report.n_classes) == (11, 3)


def test_a_class_whose_images_cannot_be_read_stays_a_class(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    """Otherwise the task would become easier with every broken file."""
    for path in (shapes.parent / "images").glob("*circle*"):
        path.write_bytes(b"")
    report = zero_shot(heads, spec_for(shapes, tmp_path / "caches", max_bad=0.5))
    assert (report.n_images, report.classes, report.empty) == (8, CLASSES, ("circle",))


def test_a_table_of_which_no_image_can_be_read_is_refused(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    for path in (shapes.parent / "images").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"pairs\.tsv: none of its 12 images could be read"):
        zero_shot(heads, spec_for(shapes, tmp_path / "caches", max_bad=1.0))


# --- the cache ------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def told(now: ExtractionState) -> tuple[str, int, int]:
    return now.modality, now.done, now.rows


def test_the_second_time_nothing_is_encoded(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    spec = spec_for(shapes, tmp_path / "caches")
    first: list[tuple[str, int, int]] = []
    second: list[tuple[str, int, int]] = []
    report = zero_shot(heads, spec, lambda now: first.append(told(now)))
    assert (first[0], first[-1]) == (("image", 0, 12), ("image", 12, 12))
    before = snapshot(tmp_path / "caches")
    assert zero_shot(heads, spec, lambda now: second.append(told(now))) == report
    assert second == [("image", 12, 12)]
    assert snapshot(tmp_path / "caches") == before


def test_other_prompts_use_the_same_cache(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    zero_shot(heads, spec_for(shapes, tmp_path / "caches"))
    calls: list[tuple[str, int, int]] = []
    zero_shot(
        heads,
        spec_for(shapes, tmp_path / "caches", templates=("a {}",)),
        lambda now: calls.append(told(now)),
    )
    assert calls == [("image", 12, 12)]


def test_the_same_table_with_files_in_another_folder_has_another_cache(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    """Keys and labels are the same, pixels are not: what was cached of one folder must not answer
    for the other."""
    other = tmp_path / "other"
    shutil.copytree(shapes.parent, other)
    circles, squares = (
        sorted((other / "images").glob(f"*{shape}*")) for shape in ("circle", "square")
    )
    for circle, square in zip(circles, squares, strict=True):
        pixels = circle.read_bytes(), square.read_bytes()
        circle.write_bytes(pixels[1])
        square.write_bytes(pixels[0])
    caches = tmp_path / "caches"
    zero_shot(heads, spec_for(shapes, caches))
    shared = zero_shot(heads, spec_for(shapes, caches, root=other))
    assert shared == zero_shot(heads, spec_for(shapes, tmp_path / "fresh", root=other))
    assert len(list(caches.iterdir())) == 2


# --- encoders that have moved or are not the run's ------------------------------------------------


def test_encoders_that_have_moved_are_found_where_they_are_said_to_be(
    heads: TrainedHeads,
    shapes: Path,
    tmp_path: Path,
) -> None:
    wanted = zero_shot(heads, spec_for(shapes, tmp_path / "caches"))
    moved = {
        side: EncoderSpec(**encoder).with_name(
            f"{encoder['library']}:{shutil.copytree(encoder['name'], tmp_path / 'moved' / side)}"
        )
        for side, encoder in (("image", heads.image.encoder), ("text", heads.text.encoder))
    }
    assert zero_shot(heads, spec_for(shapes, tmp_path / "elsewhere", **moved)) == wanted


@pytest.fixture
def changed_image_encoder(tiny_image_encoder: Path, tmp_path: Path) -> Path:
    """The tiny encoder, under its own name, after one weight has changed."""
    folder = shutil.copytree(tiny_image_encoder, tmp_path / "changed" / tiny_image_encoder.name)
    weights = load_file(folder / "model.safetensors")
    weights["cls_token"][0, 0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    return folder


def test_an_image_encoder_that_is_not_the_runs_is_refused_and_leaves_no_trace_in_the_cache(
    heads: TrainedHeads,
    shapes: Path,
    changed_image_encoder: Path,
    tmp_path: Path,
) -> None:
    wrong = parse_encoder(f"timm:{changed_image_encoder}", "image")
    with pytest.raises(
        MismatchError,
        match=r"image encoder .* is not of the encoder .* weights: ",
    ) as caught:
        zero_shot(heads, spec_for(shapes, tmp_path / "caches", image=wrong))
    assert caught.value.exit_code == 4
    assert zero_shot(heads, spec_for(shapes, tmp_path / "caches")).n_images == 12


def test_a_text_encoder_that_is_not_the_runs_is_refused(
    heads: TrainedHeads,
    shapes: Path,
    other_text_encoder: Path,
    tmp_path: Path,
) -> None:
    wrong = parse_encoder(f"hf:{other_text_encoder}", "text")
    with pytest.raises(MismatchError, match=r"text encoder .* is not of the encoder .* weights: "):
        zero_shot(heads, spec_for(shapes, tmp_path / "caches", text=wrong))
    assert not (tmp_path / "caches").exists()


def test_a_report_can_be_written_as_json(heads: TrainedHeads, shapes: Path, tmp_path: Path) -> None:
    report = zero_shot(heads, spec_for(shapes, tmp_path / "caches"))
    assert json.loads(json.dumps(asdict(report)))["classes"] == list(CLASSES)
