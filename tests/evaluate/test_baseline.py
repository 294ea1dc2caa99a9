"""A ready-made model beside a run: the same queries, its own embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from PIL import Image
from typer.testing import CliRunner

from apecache.errors import OptionError
from apecache.evaluate.baseline import embed_baseline, load_baseline
from apecache.evaluate.embeddings import embed_store
from apecache.metrics.retrieval import retrieval_report
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore
from benchmarks.small_encoders import build_clip_text, build_open_clip_image

pytest.importorskip("transformers")


NAME = "tiny-clip"
TAG = "made_here"
TAGGED = f"open_clip:{NAME}/{TAG}"


@pytest.fixture
def tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CLIP of open_clip with random weights, by a name and a tag that the library then knows."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path / "weights"
    folder.mkdir()
    build_open_clip_image(folder)
    described = json.loads((folder / "open_clip_config.json").read_text())
    config = tmp_path / f"{NAME}.json"
    config.write_text(json.dumps(described["model_cfg"]))
    open_clip.add_model_config(config)
    tag = {**described["preprocess_cfg"], "file": str(folder / "open_clip_model.safetensors")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {TAG: tag})
    return TAGGED


def own_figures(images: list[Path], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What open_clip itself makes of images and texts, L2-normalized."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=TAG)
    model.eval()
    tokenizer = open_clip.get_tokenizer(NAME)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in images])
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokenizer(texts), normalize=True)
    return image, text


@pytest.mark.filterwarnings("ignore")
def test_retrieval_beside_open_clip_by_name_and_tag(
    tagged: str,
    tiny_run: Path,
    tiny_store: Path,
) -> None:
    command = ["evaluate", str(tiny_run), "--store", str(tiny_store), "--baseline", tagged]
    result = CliRunner().invoke(app, [*command, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["baseline"]
    assert found["name"] == tagged
    store = FeatureStore.open(tiny_store)
    embedded = embed_store(load_heads(tiny_run), store, split="val")
    root = Path(str(store.source["root"]))
    images = [root / str(store.pairs.keys[row]) for row in embedded.image_rows]
    texts = [str(store.pairs.captions[row]) for row in embedded.text_rows]
    image, text = own_figures(images, texts)
    expected = retrieval_report(
        image,
        text,
        embedded.image_of_text,
        relevance=embedded.relevance,
    )
    assert found["image_to_text"] == {
        str(k): pytest.approx(value, abs=1e-3) for k, value in expected.image_to_text.items()
    }
    assert found["text_to_image"] == {
        str(k): pytest.approx(value, abs=1e-3) for k, value in expected.text_to_image.items()
    }
    shown = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "tiny" in shown.output


@pytest.mark.filterwarnings("ignore")
def test_zero_shot_beside_open_clip_by_name_and_tag(
    tagged: str,
    tiny_run: Path,
    shapes: Path,
) -> None:
    command = ["evaluate", str(tiny_run), "--task", "zeroshot", "--labels", str(shapes)]
    more = ["--baseline", tagged, "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, *more, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    classes = sorted({path.stem.split("-")[1] for path in (shapes.parent / "images").iterdir()})
    images = sorted((shapes.parent / "images").iterdir())
    image, text = own_figures(images, [f"a photo of {name}" for name in classes])
    labels = torch.tensor([classes.index(path.stem.split("-")[1]) for path in images])
    accuracy = 100 * float(((image @ text.T).argmax(1) == labels).double().mean())
    assert report["baseline"]["top1"] == pytest.approx(accuracy, abs=1e-3)
    assert report["baseline"]["name"] == tagged
    shown = CliRunner().invoke(app, [*command, *more])
    assert "tiny" in shown.output


@pytest.mark.filterwarnings("ignore")
def test_the_page_has_a_row_of_open_clip(
    tagged: str,
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    command = ["report", str(tiny_run), "--store", str(tiny_store), "--split", "val"]
    more = ["--baseline", tagged, "--out", str(tmp_path / "page.html"), "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    assert f"{tagged} (ready-made)" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("task", ["retrieval", "zeroshot"])
def test_a_wrong_name_is_refused_before_anything_is_encoded(
    task: str,
    tiny_run: Path,
    tiny_store: Path,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("open_clip")
    from apecache.runs import load

    monkeypatch.setattr(load, "load_run", None)
    data = ["--store", str(tiny_store)] if task == "retrieval" else ["--labels", str(shapes)]
    command = ["evaluate", str(tiny_run), "--task", task, *data, "--device", "cpu", "--baseline"]
    for name, message, code in (
        ("open_clip:ViT-B-33/openai", "no pretrained model 'ViT-B-33'", 3),
        ("open_clip:ViT-B-32/none", "the tags of ViT-B-32 are", 3),
        ("timm:vit", "expected open_clip:NAME/TAG or hf:ID", 2),
    ):
        result = CliRunner().invoke(app, [*command, name])
        assert (result.exit_code, message in " ".join(result.output.split())) == (code, True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of transformers with random weights, by its name."""
    return str(build_clip_text(tmp_path_factory.mktemp("clip")))


def test_the_baseline_answers_the_queries_of_the_run(
    clip: str,
    tiny_run: Path,
    tiny_store: Path,
) -> None:
    store = FeatureStore.open(tiny_store)
    reference = embed_store(load_heads(tiny_run), store, split="val")
    baseline = load_baseline(clip, "cpu")
    root = Path(str(store.source["root"]))
    embedded = embed_baseline(
        baseline,
        store=store,
        reference=reference,
        open_image=lambda key: str(root / key),
    )
    assert np.array_equal(embedded.image_rows, reference.image_rows)
    assert np.array_equal(embedded.text_rows, reference.text_rows)
    captions = [str(store.pairs.captions[row]) for row in embedded.text_rows]
    expected = torch.nn.functional.normalize(baseline.text.loaded.encode(captions), dim=-1)  # type: ignore[union-attr]
    assert torch.allclose(embedded.text, expected, atol=1e-5)
    assert torch.allclose(embedded.image.norm(dim=1), torch.ones(len(embedded.image)), atol=1e-5)


def test_the_command_shows_both_on_the_same_split(
    clip: str,
    tiny_run: Path,
    tiny_store: Path,
    tmp_path: Path,
) -> None:
    store = FeatureStore.open(tiny_store)
    lines = ["text\timage\tgrade", f"{store.pairs.keys[8]}#0\t{store.pairs.keys[9]}\t2"]
    (tmp_path / "more.tsv").write_text("\n".join(lines) + "\n")
    command = ["evaluate", str(tiny_run), "--store", str(tiny_store), "--baseline", clip]
    more = ["--relevance", str(tmp_path / "more.tsv"), "--json", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, *more])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["baseline"]["name"] == clip
    for key in ("n_images", "n_texts", "chance"):
        assert report["baseline"][key] == report[key]
    assert report["baseline"]["image_to_text"] != report["image_to_text"]
    assert report["graded"]["n_pairs"] + report["graded"]["n_unknown"] == 1
    run = load_heads(tiny_run)
    embedded = embed_store(run, store, split="val")
    expected = retrieval_report(embedded.image, embedded.text, embedded.image_of_text)
    assert report["n_images"] == expected.n_images
    shown = CliRunner().invoke(app, [*command, *more[:2], "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert "nDCG" in shown.output


def test_a_pair_without_one_space_is_refused(tiny_text_encoder: Path) -> None:
    with pytest.raises(OptionError, match="expected open_clip:NAME/TAG or hf:ID"):
        load_baseline("timm:test_vit")
