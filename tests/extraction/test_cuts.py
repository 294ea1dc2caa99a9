"""Several arrays in one pass: tokens, layers, several encoders, views. Each array is what it would
be alone."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from numpy.typing import NDArray
from PIL import Image
from tiny import draw_landscape, squash, tree
from typer.testing import CliRunner

from apecache.data.augment import Views
from apecache.data.images import load_image
from apecache.data.sources import open_pairs
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import MismatchError, OptionError
from apecache.extraction.recheck import spot_check, tolerance_of
from apecache.extraction.repair import repair
from apecache.extraction.run import ExtractSpec, extract
from apecache.extraction.shard_range import parse_part
from apecache.store.layout import chunk_name
from apecache.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def image(tiny_image_encoder: Path) -> EncoderSpec:
    return parse_encoder(f"timm:{tiny_image_encoder}", "image")


@pytest.fixture
def text(tiny_text_encoder: Path) -> EncoderSpec:
    return parse_encoder(f"hf:{tiny_text_encoder}", "text")


def options(**changes: Any) -> ExtractSpec:
    return ExtractSpec(
        **{"image_batch": 4, "text_batch": 4, "shard_rows": 5, "device": "cpu", **changes}
    )


def run(table: Path, store: Path, spec: ExtractSpec) -> FeatureStore:
    extract(open_pairs(table), store, spec)
    return FeatureStore.open(store)


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    x = a.reshape(len(a), -1).astype(np.float64)
    y = b.reshape(len(b), -1).astype(np.float64)
    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())


def test_cuts_of_one_model_and_a_second_encoder_are_what_each_is_alone(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
) -> None:
    """The second one is the same architecture at another resolution: another model with other
    pixels."""
    other = replace(image, resolution=64)
    specs = (
        image,
        replace(image, pooling="tokens", layer=-1),
        replace(image, pooling="cls+mean"),
        other,
    )
    store = run(shapes_once, tmp_path / "all", options(image=specs))
    assert len(store.arrays("image")) == 4
    for number, spec in enumerate(specs):
        alone = run(shapes_once, tmp_path / str(number), options(image=spec)).array("image")
        together = store.array("image", spec.slug)
        assert together.load().tobytes() == alone.load().tobytes()
        assert together.record.fingerprint == alone.record.fingerprint
        assert together.content() == alone.content()
    tokens = store.array("image", specs[1].slug)
    assert tokens.load().shape == (12, tokens.tokens, tokens.dim)


def test_an_image_is_decoded_once_for_all_arrays(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
) -> None:
    read: list[str] = []
    source = open_pairs(shapes_once)

    class Counted:
        place = source.media.place
        exists = source.media.exists

        def read(self, key: str) -> bytes:
            read.append(key)
            return source.media.read(key)

    several = (image, replace(image, pooling="max"), replace(image, resolution=64))
    extract(replace(source, media=Counted()), tmp_path / "store", options(image=several, workers=0))
    assert sorted(read) == sorted(source.keys)


def test_ragged_tokens_are_each_captions_own(
    shapes_once: Path,
    tmp_path: Path,
    text: EncoderSpec,
) -> None:
    spec = replace(text, pooling="tokens")
    store = run(shapes_once, tmp_path / "store", options(text=(spec, text)))
    array = store.array("text", spec.slug)
    encoder = load_text_encoder(spec, "cpu")
    ids = encoder.tokenize(list(store.pairs.captions)).ids
    lengths = array.load_lengths()
    assert lengths is not None
    assert lengths.tolist() == [len(one) for one in ids]
    assert array.tokens == max(lengths)
    features = array.load()
    for row, one in enumerate(ids):
        single = encoder.encode_ids([one])[0].numpy()
        assert cosine(features[row : row + 1, : len(one)], single[None]) > 0.9999
        assert not features[row, len(one) :].any()
    assert cosine(store.array("text", text.slug).load(), load_text_encoder(text, "cpu").encode(
        list(store.pairs.captions)).numpy()) > 0.9999  # fmt: skip


def test_appended_captions_may_be_longer(shapes: Path, tmp_path: Path, text: EncoderSpec) -> None:
    spec = options(text=replace(text, pooling="tokens"))
    first = run(shapes, tmp_path / "store", spec).array("text")
    before = first.load()
    width = first.tokens
    with shapes.open("a") as file:
        file.write(
            "images/new.png\ta red circle and a blue square and a green triangle on "
            "white\ttrain\tx\ten\n"
        )
    grown = run(shapes, tmp_path / "store", spec).array("text")
    assert grown.tokens is not None
    assert width is not None
    assert grown.tokens > width
    features = grown.load()
    lengths = grown.load_lengths()
    assert features.shape == (25, grown.tokens, grown.dim)
    assert features[:24, :width].tobytes() == before.tobytes()
    assert not features[:24, width:].any()
    assert lengths is not None
    assert lengths[24] == grown.tokens


def test_killed_between_the_commits_of_two_arrays_the_rest_is_made_and_equal(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import apecache.extraction.run as extraction

    spec = options(image=(image, replace(image, pooling="max")))
    whole = run(shapes_once, tmp_path / "whole", spec)
    real = extraction.commit_shard
    calls = iter(range(3))

    def commit(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "commit_shard", commit)
        with pytest.raises(KeyboardInterrupt):
            run(shapes_once, tmp_path / "cut", spec)
    assert [len(array.commits) for array in FeatureStore.open(tmp_path / "cut").arrays()] == [2, 1]
    report = extract(open_pairs(shapes_once), tmp_path / "cut", spec)
    assert [array.n_encoded for array in report.arrays] == [2, 7]
    assert tree(tmp_path / "cut") == tree(whole.path)


def test_what_was_asked_for_together_is_no_mismatch_but_a_third_one_is(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
) -> None:
    both = (image, replace(image, pooling="max"))
    run(shapes_once, tmp_path / "store", options(image=both))
    assert extract(open_pairs(shapes_once), tmp_path / "store", options(image=both)).nothing_to_do
    assert extract(
        open_pairs(shapes_once),
        tmp_path / "store",
        options(image=both[1]),
    ).nothing_to_do
    third = replace(image, pooling="mean")
    with pytest.raises(MismatchError, match="add --add"):
        run(shapes_once, tmp_path / "store", options(image=third))
    assert len(run(shapes_once, tmp_path / "store", options(image=third, add=True)).arrays()) == 3


# Views


def test_views_are_the_encoders_features_of_the_augmented_images(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
) -> None:
    views = Views(3, seed=5, scale=(0.5, 1.0))
    store = run(shapes_once, tmp_path / "store", options(image=image, views=views))
    array = store.array("image")
    assert (array.name, array.views, array.row_shape) == (f"{image.slug}-3views", 3, (3, array.dim))
    features = array.load()
    encoder = load_image_encoder(image, "cpu")
    media = open_pairs(shapes_once).media
    for row, key in enumerate(store.pairs.keys):
        loaded = load_image(key, media)
        pixels = torch.stack(
            [encoder.preprocess(view) for view in views.of(loaded.image, loaded.digest)]
        )
        assert cosine(features[row], encoder.encode(pixels).numpy()) > 0.9999
    assert (
        array.record.encoder == encoder.fingerprint
    )  # a head that is trained on views serves plain images
    assert extract(
        open_pairs(shapes_once),
        store.path,
        options(image=image, views=views),
    ).nothing_to_do


def test_views_show_random_crops_whole_to_an_encoder_that_crops(
    cropping_image_encoder: Path,
    tmp_path: Path,
) -> None:
    photos = [draw_landscape(60, 40, (0, white)) for white in (255, 200, 160)]
    lines = ["image\tcaption"]
    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png\ta landscape")
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    image = parse_encoder(f"timm:{cropping_image_encoder}", "image")
    whole = Views(1, scale=(1.0, 1.0), ratio=(1.5, 1.5), flip=False, operations=0)
    table = tmp_path / "pairs.tsv"
    store = run(table, tmp_path / "store", options(image=image, views=whole))
    encoder = load_image_encoder(image, "cpu")
    features = torch.from_numpy(store.array("image").load()[:, 0].astype(np.float32))
    squashed = encoder.encode(torch.stack([squash(photo) for photo in photos]))
    squares = [photo.resize((60, 60), Image.Resampling.BICUBIC) for photo in photos]
    cropped = encoder.encode(torch.stack([encoder.preprocess(square) for square in squares]))
    cut_away = (cropped - squashed).norm(dim=1)
    assert ((features - squashed).norm(dim=1) < 0.25 * cut_away).all()


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"scale": (0.4, 1.0)}, {"operations": 1}, {"flip": False}],
)
def test_other_views_are_other_features(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
    change: dict[str, Any],
) -> None:
    views = Views(2, seed=5)
    run(shapes_once, tmp_path / "store", options(image=image, views=views))
    with pytest.raises(MismatchError, match=f"views.{next(iter(change))}"):
        run(shapes_once, tmp_path / "store", options(image=image, views=replace(views, **change)))


def test_views_and_plain_images_lie_beside_each_other_and_are_repaired(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
) -> None:
    run(shapes_once, tmp_path / "store", options(image=image))
    with pytest.raises(MismatchError, match="views"):
        run(shapes_once, tmp_path / "store", options(image=image, views=Views(2)))
    store = run(shapes_once, tmp_path / "store", options(image=image, views=Views(2), add=True))
    assert [array.views for array in store.arrays()] == [None, 2]
    before = tree(store.path)
    for array in store.arrays():
        (store.path / chunk_name(array.record, "features", 1)).unlink()
    report = repair(store.path, open_pairs(shapes_once), ExtractSpec(device="cpu"))
    assert report.shards == {
        f"image/{image.slug}": (1,), f"image/{image.slug}-2views": (1,),
    }  # fmt: skip
    assert tree(store.path) == before


# The command


def test_the_command_takes_several_encoders_cuts_and_views(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    store = tmp_path / "store"
    command = ["extract", str(shapes_once), "--store", str(store), "--device", "cpu", "--json"]
    command += [
        "--image",
        f"timm:{tiny_image_encoder}",
        "--image-cut",
        "default",
        "--image-cut",
        "tokens@-1",
    ]
    command += [
        "--text",
        f"hf:{tiny_text_encoder}",
        "--text-cut",
        "tokens",
        "--text-prefix",
        "a photo: ",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    names = [array["name"] for array in json.loads(result.stdout)["arrays"]]
    assert names == ["tiny-vit", "tiny-vit-tokens-layer-1", "tiny-bert-tokens-prefix-a-photo"]
    views = [
        *command[:6],
        "--image",
        f"timm:{tiny_image_encoder}",
        "--views",
        "2,scale=0.5-1",
        "--add",
    ]
    assert CliRunner().invoke(app, views).exit_code == 0
    assert FeatureStore.open(store).array("image", "tiny-vit-2views").views == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image-cut", "men"], "cut 'men': expected one of"),
        (["--image-cut", "default@2"], "no pooling of its own"),
        (["--views", "2,scale=2-1"], "--views 2,scale=2-1: expected a count"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(
    shapes_once: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    arguments: list[str],
    said: str,
) -> None:
    command = [
        "extract",
        str(shapes_once),
        "--store",
        str(tmp_path / "s"),
        "--image",
        f"timm:{tiny_image_encoder}",
    ]
    result = CliRunner().invoke(app, [*command, *arguments])
    assert result.exit_code == OptionError.exit_code
    assert said in result.output
    assert not (tmp_path / "s").exists()


def test_int8_tokens_are_resumed_and_repaired_to_the_same_bytes(
    shapes_once: Path,
    tmp_path: Path,
    image: EncoderSpec,
    text: EncoderSpec,
) -> None:
    specs = {"image": replace(image, pooling="tokens"), "text": replace(text, pooling="tokens")}
    small = options(**specs, storage_dtype="int8")
    whole = run(shapes_once, tmp_path / "whole", small)
    half = run(shapes_once, tmp_path / "half", options(**specs))
    for modality in ("image", "text"):
        array = whole.array(modality)  # type: ignore[arg-type]
        wider = half.array(modality)  # type: ignore[arg-type]
        assert cosine(array.load(), wider.load()) > 0.9999
        assert array.row_bytes / wider.row_bytes == (array.dim + 4) / (2 * array.dim)
        assert array.record.encoder == wider.record.encoder
    run(shapes_once, tmp_path / "resumed", replace(small, part=parse_part("1/2")))
    resumed = run(
        shapes_once,
        tmp_path / "resumed",
        small,
    )  # what is there is first encoded again and compared
    assert tree(tmp_path / "resumed") == tree(tmp_path / "whole")
    for part in ("features", "scale"):
        (tmp_path / "resumed" / chunk_name(resumed.array("image").record, part, 1)).unlink()
        mended = repair(tmp_path / "resumed", open_pairs(shapes_once), ExtractSpec(device="cpu"))
        assert mended.after.sound
        assert tree(tmp_path / "resumed") == tree(tmp_path / "whole")
    with pytest.raises(MismatchError, match="dtype"):
        run(shapes_once, tmp_path / "half", small)


def test_a_check_of_int8_features_does_not_mind_their_rounding_but_minds_a_change(
    write_store: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = np.full((6, 64), 0.45, np.float32)
    features[:, 0] = (
        100  # one long number, as transformers have them: the others are rounded to 0 or 0.79
    )
    kept = features.astype(np.float16)
    array = write_store(tmp_path / "s", kept, kept, list(range(6)), [""] * 6, storage="int8").array(
        "image"
    )
    assert cosine(array.load(), features) < 1 - tolerance_of(array.record)
    job: Any = SimpleNamespace(targets=(SimpleNamespace(record=array.record),))
    monkeypatch.setattr(
        "apecache.extraction.recheck._encode_rows",
        lambda job, place, rows: features[rows],
    )
    spot_check(array.files, job, 0)
    monkeypatch.setattr(
        "apecache.extraction.recheck._encode_rows",
        lambda job, place, rows: features[rows, ::-1],
    )
    with pytest.raises(MismatchError, match="come out otherwise now"):
        spot_check(array.files, job, 0)
