"""Heads on disk: what is saved comes back bit by bit, and nothing else gets in."""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apecache.errors import MismatchError, RunError
from apecache.fingerprint import Fingerprint
from apecache.heads.build import build_heads
from apecache.heads.head import HeadSpec
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads, save_heads

IMAGE_DIM = 6
TEXT_DIM = 5
PAIRS = {
    "two projections": (HeadSpec(dim=4), HeadSpec(dim=4, input_dropout=0.25)),
    "text mlp": (HeadSpec(kind="identity"), HeadSpec(kind="mlp", depth=2, width=8, skip=True)),
    "image mlp": (
        HeadSpec(kind="mlp", width=3, activation="relu", expansion=2.0),
        HeadSpec(kind="identity"),
    ),
    "tokens": (
        HeadSpec(kind="transformer", dim=4, depth=1, n_heads=2, skip=True),
        HeadSpec(kind="projector", refine=True, standardize=False),
    ),
    "anchors": (HeadSpec(kind="anchors", dim=4), HeadSpec(kind="attention")),
    "several": (
        HeadSpec(
            kind="ensemble",
            parts=(HeadSpec(kind="gated", dim=4, expansion=2), HeadSpec(kind="identity")),
        ),
        HeadSpec(kind="ensemble", parts=(HeadSpec(), HeadSpec(kind="mlp", width=3))),
    ),
    "dictionary": (
        HeadSpec(kind="dictionary", dim=7, top=3),
        HeadSpec(kind="dictionary", dim=7, top=3),
    ),
    "batch norm": (HeadSpec(kind="mlp", width=3, residual=False, norm="batch"), HeadSpec(dim=4)),
}


def make_heads(pair: str = "two projections", seed: int = 0) -> TrainedHeads:
    torch.manual_seed(seed)
    image, text = build_heads(*PAIRS[pair], IMAGE_DIM, TEXT_DIM)
    image.fit_statistics(torch.randn(20, IMAGE_DIM) * 3 + 1)
    text.fit_statistics(torch.randn(20, TEXT_DIM) * 3 + 1)
    sides = (
        TrainedSide(
            head=image,
            encoder={"library": "timm", "name": "vit", "modality": "image"},
            fingerprint=Fingerprint(fields={"weights": "i"}),
        ),
        TrainedSide(
            head=text,
            encoder={"library": "hf", "name": "bert", "modality": "text"},
            fingerprint=Fingerprint(fields={"weights": "t"}),
        ),
    )
    return TrainedHeads(*sides, 14.285713195800781, {"recipe": {"name": "ä \u2028"}, "seed": seed})


def tensors_of(heads: TrainedHeads) -> dict[str, Tensor]:
    sides = (("image", heads.image.head), ("text", heads.text.head))
    return {
        f"{side}.{name}": value for side, head in sides for name, value in head.state_dict().items()
    }


def raw(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.numpy().tobytes()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_heads(make_heads(), tmp_path / "run")
    return tmp_path / "run"


def refused(run: Path) -> str:
    """The message with which a run is refused; on one line."""
    with pytest.raises(RunError) as caught:
        load_heads(run)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --- what is saved comes back ---------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_heads_come_back_bit_by_bit(pair: str, tmp_path: Path) -> None:
    saved = make_heads(pair)
    save_heads(saved, tmp_path / "new" / "run")
    loaded = load_heads(tmp_path / "new" / "run")
    assert tensors_of(loaded).keys() == tensors_of(saved).keys()
    for name, tensor in tensors_of(saved).items():
        assert raw(tensors_of(loaded)[name]) == raw(tensor), name
    assert (loaded.image.head.spec, loaded.text.head.spec) == PAIRS[pair]
    assert (loaded.scale, loaded.training) == (saved.scale, saved.training)
    assert loaded.image.encoder == saved.image.encoder
    assert loaded.text.fingerprint.digest == saved.text.fingerprint.digest
    assert loaded.digest == saved.digest
    shape = (3, IMAGE_DIM) if saved.image.head.spec.cut == "pooled" else (3, 4, IMAGE_DIM)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.image.embed(x), saved.image.embed(x))


def test_loaded_heads_are_frozen_and_in_evaluation_mode(run: Path) -> None:
    heads = load_heads(run)
    for side in (heads.image, heads.text):
        assert not side.head.training
        assert not any(parameter.requires_grad for parameter in side.head.parameters())
        assert {tensor.device.type for tensor in side.head.state_dict().values()} == {"cpu"}


def test_loading_makes_no_weights_only_to_throw_them_away(run: Path) -> None:
    """Seen by the random numbers that they would cost; what the files only claim is never allocated
    either."""
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    load_heads(run)
    assert torch.equal(torch.rand(3), wanted)


def test_a_run_is_two_files_and_one_of_them_is_plain_json(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir()) == ["head.json", "head.safetensors"]
    value = json.loads((run / "head.json").read_text(encoding="utf-8"))
    assert value["image"]["dim"] == IMAGE_DIM
    assert value["text"]["fingerprint"] == {"weights": "t"}


def test_saving_again_replaces_the_heads(run: Path) -> None:
    other = make_heads(seed=1)
    save_heads(other, run)
    assert load_heads(run).digest == other.digest


# --- embedding ------------------------------------------------------------------------------------


def test_embedding_in_parts_equals_embedding_at_once() -> None:
    side = make_heads().image
    x = torch.randn(11, IMAGE_DIM, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(side.embed(x, batch=4), side.embed(x))
    torch.testing.assert_close(side.embed(x, batch=4), side.head(x).detach())


def test_embedding_nothing_gives_no_rows_of_the_right_width() -> None:
    assert make_heads().image.embed(torch.empty(0, IMAGE_DIM)).shape == (0, 4)


def test_embedding_switches_dropout_off() -> None:
    side = make_heads().text
    side.head.train()
    x = torch.randn(5, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    assert torch.equal(side.embed(x), side.embed(x))


def test_the_encoder_that_a_head_was_trained_on_is_accepted() -> None:
    make_heads().image.require_encoder(Fingerprint(fields={"weights": "i"}), "here")


def test_another_encoder_is_refused_with_the_fields_that_differ() -> None:
    with pytest.raises(
        MismatchError,
        match=r"store/x is not of the encoder .* weights: other here, i in the store",
    ) as e:
        make_heads().image.require_encoder(Fingerprint(fields={"weights": "other"}), "store/x")
    assert e.value.exit_code == 4
    assert e.value.differences == (("weights", "other", "i"),)


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(tensors_of(make_heads())))
def test_the_smallest_change_of_one_number_changes_the_digest(name: str) -> None:
    heads = make_heads()
    before = heads.digest
    flat = tensors_of(heads)[name].view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    assert heads.digest != before


@pytest.mark.parametrize("part", ["scale", "encoder", "fingerprint"])
def test_the_digest_covers_scale_and_encoders(part: str) -> None:
    heads = make_heads()
    changed = {
        "scale": TrainedHeads(heads.image, heads.text, heads.scale + 1),
        "encoder": TrainedHeads(
            TrainedSide(head=heads.image.head, encoder={}, fingerprint=heads.image.fingerprint),
            heads.text,
            heads.scale,
        ),
        "fingerprint": TrainedHeads(
            TrainedSide(
                head=heads.image.head,
                encoder=heads.image.encoder,
                fingerprint=Fingerprint(fields={}),
            ),
            heads.text,
            heads.scale,
        ),
    }
    assert changed[part].digest != heads.digest


def test_the_digest_does_not_depend_on_how_the_heads_were_trained() -> None:
    heads = make_heads()
    assert (
        TrainedHeads(
            heads.image,
            text=heads.text,
            scale=heads.scale,
            training={"seconds": 9},
        ).digest
        == heads.digest
    )


# --- what is refused ------------------------------------------------------------------------------


def test_a_missing_run_is_refused_with_the_nearest_name(run: Path) -> None:
    message = refused(run.with_name("rum"))
    assert "did you mean run?" in message
    assert "apecache fit-head" in message


def test_a_folder_without_a_head_is_no_finished_run(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text("")
    message = refused(tmp_path)
    assert "is not a finished run: it has no head.json" in message
    assert "did you mean" not in message


def test_a_run_below_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "not a finished run" in refused(tmp_path / "no" / "run")


def test_a_newer_format_is_refused_by_its_number(run: Path) -> None:
    rewrite(run, lambda value: value | {"format": 2})
    assert "has format 2; this apecache reads up to 1: upgrade" in refused(run)


def rewrite(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = run / "head.json"
    path.write_text(
        json.dumps(change(json.loads(path.read_text(encoding="utf-8")))),
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"3",
        b'{"format": "1"}',
        b'{"format": 1}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 1, "image": 3, "text": 3, "scale": 1, "training": {}}',
        pickle.dumps({"format": 1}),
    ],
    ids=lambda data: repr(data[:16]),
)
def test_a_damaged_description_is_refused(data: bytes, run: Path) -> None:
    (run / "head.json").write_bytes(data)
    message = refused(run)
    assert "head.json is damaged" in message
    assert "train again" in message


@pytest.mark.parametrize("key", ["format", "image", "text", "scale", "training"])
def test_a_description_that_lacks_a_part_is_refused(key: str, run: Path) -> None:
    rewrite(run, lambda value: {name: part for name, part in value.items() if name != key})
    assert "head.json is damaged" in refused(run)


@pytest.mark.parametrize(
    "value",
    [None, -1, 10**13, 10**30, 1e400, float("nan"), "x", [[]], {}],
    ids=repr,
)
def test_a_wrong_value_anywhere_in_the_description_never_gets_past_a_typed_error(
    value: Any,
    run: Path,
) -> None:
    """Sizes in particular: a head of 10^13 features is refused before anything of that size is
    allocated."""
    whole = json.loads((run / "head.json").read_text(encoding="utf-8"))
    n_refused = 0
    for path in places(whole):
        (run / "head.json").write_text(json.dumps(replaced(whole, path, value)), encoding="utf-8")
        try:
            heads = load_heads(run)
        except RunError:
            n_refused += 1
            refused(run)
        else:
            assert heads.digest, path
            assert heads.image.embed(torch.ones(1, IMAGE_DIM)).isfinite().all(), path
    assert n_refused >= 8


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values below a JSON object."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[str, ...], new: Any) -> Any:
    return {**value, path[0]: replaced(value[path[0]], path[1:], new)} if path else new


def change_tensors(run: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(run / "head.safetensors")
    change(tensors)
    save_file(tensors, run / "head.safetensors")


WEIGHT = "image.body.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "extra"),
        (lambda t: t.pop(WEIGHT), WEIGHT),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}), WEIGHT),
        (lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}), WEIGHT),
        (lambda t: t.update({WEIGHT: t[WEIGHT].double()}), WEIGHT),
        (lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)}), WEIGHT),
        (lambda t: t[WEIGHT][0, 0].fill_(torch.nan), WEIGHT),
        (lambda t: t["text.deviation"][0].fill_(torch.inf), "text.deviation"),
    ],
    ids=[
        "extra",
        "missing",
        "other shape",
        "transposed",
        "double",
        "eight bits",
        "NaN",
        "infinite",
    ],
)
def test_tensors_that_are_not_the_heads_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], object],
    named: str,
    run: Path,
) -> None:
    change_tensors(run, change)
    message = refused(run)
    assert "does not hold the heads of head.json" in message
    assert named in message


def test_weights_of_other_heads_are_refused(run: Path, tmp_path: Path) -> None:
    save_heads(make_heads("text mlp"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "head.safetensors", run)
    assert "does not hold the heads" in refused(run)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: cut(path, 0),
        lambda path: cut(path, 3),
        lambda path: cut(path, 30),
        lambda path: cut(path, path.stat().st_size - 1),
        lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["empty", "3 bytes", "half a header", "last byte", "endless header", "missing", "a folder"],
)
def test_weights_that_cannot_be_read_are_refused(
    damage: Callable[[Path], object],
    run: Path,
) -> None:
    damage(run / "head.safetensors")
    assert "head.safetensors cannot be read" in refused(run)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write",
    [lambda b, p: p.write_bytes(pickle.dumps(b)), torch.save],
    ids=["pickle", "torch"],
)
def test_a_pickle_under_the_name_of_the_weights_is_refused_and_never_run(
    write: Callable[[object, Path], object],
    run: Path,
    tmp_path: Path,
) -> None:
    write(Bomb(tmp_path / "exploded"), run / "head.safetensors")
    assert "cannot be read" in refused(run)
    assert not (tmp_path / "exploded").exists()
