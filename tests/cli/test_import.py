"""Features that exist, from file to R@1 by commands: one import and one fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apecache_cli.app import app
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

runner = CliRunner()
N_IMAGES = 120
CASES = Path(__file__).parents[3] / "shared" / "cases" / "B-own-features"


def call(*arguments: object) -> Result:
    return runner.invoke(app, [str(argument) for argument in arguments])


def call_json(*arguments: object) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def paired(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return features of images and texts that share a cause, as two encoders' would."""
    generator = np.random.default_rng(seed)
    cause = generator.standard_normal((N_IMAGES, 8)).astype(np.float32)
    image = cause @ generator.standard_normal((8, 24)).astype(np.float32)
    text = cause @ generator.standard_normal((8, 16)).astype(np.float32)
    return image, text


KEYS = [f"photos/{row}.jpg" for row in range(N_IMAGES)]
CAPTIONS = [f"caption {row}" for row in range(N_IMAGES)]


def write_clip_retrieval(folder: Path) -> tuple[object, ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image, text = paired()
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, rows in enumerate((slice(0, 50), slice(50, N_IMAGES))):
        np.save(folder / f"img_emb/img_emb_{number}.npy", image[rows].astype(np.float16))
        np.save(folder / f"text_emb/text_emb_{number}.npy", text[rows].astype(np.float16))
        metadata = pa.table({"image_path": KEYS[rows], "caption": CAPTIONS[rows]})
        pq.write_table(metadata, folder / f"metadata/metadata_{number}.parquet")
    return (folder,)


def write_own_export(folder: Path) -> tuple[object, ...]:
    import apecache

    image, text = paired()
    apecache.FeatureStore.from_arrays(image, text, path=folder / "first")
    assert call("export", folder / "first", folder / "out.npz", "--npz").exit_code == 0
    return (folder / "out.npz",)


def write_thingsvision(folder: Path) -> tuple[object, ...]:
    image, text = paired()
    (folder / "dino").mkdir(parents=True)
    order = np.random.default_rng(1).permutation(N_IMAGES)
    np.save(folder / "dino/features.npy", image[order])
    names = "\n".join(KEYS[row].removeprefix("photos/") for row in order)
    (folder / "dino/file_names.txt").write_text(names)
    np.save(folder / "text.npy", text)
    (folder / "texts.txt").write_text("\n".join(KEYS))
    rows = [f"{key}\t{caption}" for key, caption in zip(KEYS, CAPTIONS, strict=True)]
    (folder / "pairs.tsv").write_text("\n".join(["image\tcaption", *rows]) + "\n")
    return (
        "--image",
        folder / "dino",
        "--text",
        folder / "text.npy",
        "--text-keys",
        folder / "texts.txt",
        "--pairs",
        folder / "pairs.tsv",
        "--match-keys",
        "name",
    )


@pytest.mark.parametrize(
    "write",
    [write_clip_retrieval, write_own_export, write_thingsvision],
    ids=["clip-retrieval", "own export", "thingsvision"],
)
def test_from_file_to_recall_in_one_import_and_one_fit(write: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    store = tmp_path / "store"
    splits = ("--split-fraction", "train=.7,val=.3")
    told = call_json("import", *source, "--store", store, *splits)
    assert [array["n_imported"] for array in told["arrays"]] == [N_IMAGES, N_IMAGES]
    fit = call_json(
        "fit-head",
        store,
        "--recipe",
        "projection",
        "--out",
        tmp_path / "run",
        "--dev-split",
        "val",
        "--set",
        "schedule.epochs=5",
    )
    assert fit
    report = call_json("evaluate", tmp_path / "run", "--store", store, "--split", "val")
    recall = report["image_to_text"]["1"]
    assert recall > 60, "rows of the two sides do not belong together"


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared inputs are not here")
@pytest.mark.parametrize(
    "arguments",
    [
        ("clip-retrieval",),
        ("mine.npz",),
        ("emb.parquet",),
        ("f.npz", "--by-row"),
        ("f.pt", "--by-row"),
        ("f.h5", "--by-row"),
        ("thingsvision", "--modality", "image"),
        ("text.npy", "--modality", "text"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_shared_inputs_are_imported(arguments: tuple[str, ...], tmp_path: Path) -> None:
    told = call_json("import", CASES / arguments[0], *arguments[1:], "--store", tmp_path / "store")
    assert all(array["n_imported"] == array["rows"] for array in told["arrays"])
    assert call("verify", tmp_path / "store").exit_code == 0
    again = call("import", CASES / arguments[0], *arguments[1:], "--store", tmp_path / "store")
    assert again.exit_code == 0, again.output
    assert "nothing to do" in again.stdout


@pytest.fixture
def npy(tmp_path: Path) -> Path:
    np.save(tmp_path / "x.npy", paired()[0])
    return tmp_path / "x.npy"


def test_what_is_left_out_and_what_live_queries_need_is_said(npy: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("\n".join(["a", *KEYS[:-1]]))
    (tmp_path / "pairs.tsv").write_text(
        "\n".join(["image\tcaption", *(f"{key}\tc" for key in KEYS)]) + "\n"
    )
    result = call(
        "import",
        npy,
        "--modality",
        "image",
        "--pairs",
        tmp_path / "pairs.tsv",
        "--store",
        tmp_path / "s",
    )
    assert result.exit_code == 0, result.output
    assert "1 images that are not in the table" in result.stderr
    assert f"{KEYS[-1]}): missing" in result.stderr
    assert "live queries do not; for those name it with --image-encoder" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "nothing to import"),
        (("--modality", "image"), 2, "--modality is the side of SOURCE"),
        (("x.npy", "--modality", "audio"), 2, "--modality audio: expected one of image, text"),
        (("x.npy", "--name", "a"), 2, "SOURCE with --modality"),
        (("--image-name", "a"), 2, "--image-name is about the features of --image"),
        (("x.npy", "--modality", "image", "--image", "x.npy"), 2, "give one of them"),
        (("x.npy",), 3, "say of which side they are with --modality image"),
        (("y.npy", "--modality", "image"), 3, "no such file or folder; did you mean x.npy?"),
        (("--image", "x.npy", "--text", "x.npy"), 3, "pair row with row with --by-row"),
        (("x.npy", "--modality", "text", "--match-keys", "nam"), 2, "did you mean name?"),
        (("x.npy", "--modality", "text", "--encoder", "x"), 3, "LIBRARY:NAME"),
        (("x.npy", "--modality", "text", "--storage", "f16"), 2, "expected one of float16"),
    ],
)
def test_refusals_name_the_option_that_mends_them(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    npy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("import", *arguments, "--store", "s")
    assert (result.exit_code, message in result.stderr) == (code, True), result.output
    assert not (tmp_path / "s").exists()


def test_a_changed_source_has_the_exit_code_of_a_mismatch(npy: Path, tmp_path: Path) -> None:
    arguments = ("import", npy, "--modality", "image", "--store", tmp_path / "s")
    assert call(*arguments).exit_code == 0
    np.save(npy, paired(1)[0])
    result = call(*arguments)
    assert result.exit_code == 4
    assert "import.source" in result.stderr


def test_audio_is_a_side_as_well(tmp_path: Path) -> None:
    """The example of the documentation."""
    audio, text = paired()
    np.save(tmp_path / "clap_audio.npy", audio)
    np.save(tmp_path / "e5_text.npy", np.repeat(text, 2, axis=0))
    clips = [f"clip-{row}" for row in range(N_IMAGES)]
    (tmp_path / "clips.txt").write_text("\n".join(clips))
    (tmp_path / "captions.txt").write_text("\n".join(np.repeat(clips, 2)))
    told = call_json(
        "import",
        "--image",
        tmp_path / "clap_audio.npy",
        "--image-keys",
        tmp_path / "clips.txt",
        "--text",
        tmp_path / "e5_text.npy",
        "--text-keys",
        tmp_path / "captions.txt",
        "--store",
        tmp_path / "store",
    )
    assert (told["n_images"], told["n_texts"]) == (N_IMAGES, 2 * N_IMAGES)
    assert call_json("info", tmp_path / "store")["n_texts"] == 2 * N_IMAGES
