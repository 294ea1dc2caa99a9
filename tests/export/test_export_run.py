"""What other programs get from a run computes what the run computes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from apecache_cli.app import app
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

import apecache
from apecache.errors import MismatchError, RunError
from apecache.export.onnx import OPSET, export_onnx
from apecache.export.sentence_transformers import export_sentence_transformers
from apecache.export.weights import export_safetensors
from apecache.heads.build import build_head
from apecache.heads.head import Head, HeadSpec, mask_of
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads

POOLED = [
    HeadSpec(kind="identity"),
    HeadSpec(kind="linear"),
    HeadSpec(kind="mlp", width=16, depth=1),
    HeadSpec(kind="mlp", width=16, depth=1, residual=False, norm="batch"),
    HeadSpec(kind="gated", skip=True),
    HeadSpec(kind="fusemix", depth=1),
    HeadSpec(kind="dictionary", top=3),
]
TOKENS = [
    HeadSpec(kind="transformer", depth=1, n_heads=2),
    HeadSpec(kind="attention", n_heads=2),
    HeadSpec(kind="anchors"),
    HeadSpec(kind="projector", refine=True),
]


@pytest.fixture(scope="module")
def heads(tiny_run: Path) -> TrainedHeads:
    return load_heads(tiny_run)


def filled(spec: HeadSpec, in_dim: int = 12) -> Head:
    """A head whose statistics are not those of a new one."""
    torch.manual_seed(0)
    head = (
        build_head(spec, in_dim, in_dim if spec.kind == "identity" else 8)
        .eval()
        .requires_grad_(False)
    )
    head.mean.normal_()
    head.deviation.uniform_(0.5, 2)
    for name, tensor in head.state_dict().items():
        if name.endswith("entries"):
            tensor.normal_()
    return head


def with_heads(heads: TrainedHeads, image: Head, text: Head) -> TrainedHeads:
    sides = (
        TrainedSide(head=head, encoder=side.encoder, fingerprint=side.fingerprint)
        for head, side in ((image, heads.image), (text, heads.text))
    )
    return TrainedHeads(*sides, heads.scale, heads.training)


# --- onnx -----------------------------------------------------------------------------------------


def pairs(specs: list[HeadSpec]) -> list[tuple[HeadSpec, HeadSpec]]:
    return [(specs[i], specs[min(i + 1, len(specs) - 1)]) for i in range(0, len(specs), 2)]


@pytest.mark.parametrize("specs", pairs(POOLED), ids=lambda pair: f"{pair[0].kind}-{pair[1].kind}")
def test_graphs_of_pooled_heads_compute_the_heads(
    specs: tuple[HeadSpec, HeadSpec],
    heads: TrainedHeads,
    tmp_path: Path,
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = with_heads(heads, *(filled(spec) for spec in specs))
    assert export_onnx(made, tmp_path) == ["image.onnx", "text.onnx", "heads.json"]
    for name, side in (("image", made.image), ("text", made.text)):
        session = runtime.InferenceSession(
            tmp_path / f"{name}.onnx",
            providers=["CPUExecutionProvider"],
        )
        for rows in (1, 7):
            features = torch.randn(rows, 12)
            (found,) = session.run(["embeddings"], {"features": features.numpy()})
            assert_close(torch.from_numpy(found), side.embed(features), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("specs", pairs(TOKENS), ids=lambda pair: f"{pair[0].kind}-{pair[1].kind}")
def test_graphs_of_heads_on_tokens_compute_the_heads(
    specs: tuple[HeadSpec, HeadSpec],
    heads: TrainedHeads,
    tmp_path: Path,
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = with_heads(heads, *(filled(spec) for spec in specs))
    export_onnx(made, tmp_path)
    for name, side in (("image", made.image), ("text", made.text)):
        session = runtime.InferenceSession(
            tmp_path / f"{name}.onnx",
            providers=["CPUExecutionProvider"],
        )
        for rows, length in ((1, 4), (6, 9)):
            features = torch.randn(rows, length, 12)
            lengths = torch.arange(rows) % length + 1
            inputs = {"features": features.numpy(), "mask": mask_of(lengths, features).numpy()}
            (found,) = session.run(["embeddings"], inputs)
            assert_close(
                torch.from_numpy(found),
                side.embed(features, lengths),
                atol=1e-5,
                rtol=1e-4,
            )


def test_a_graph_names_its_opset(heads: TrainedHeads, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    export_onnx(heads, tmp_path)
    found = {
        entry.domain: entry.version for entry in onnx.load(tmp_path / "image.onnx").opset_import
    }
    assert found[""] == OPSET == json.loads((tmp_path / "heads.json").read_text())["opset"]


# --- safetensors ----------------------------------------------------------------------------------


def test_plain_tensors_build_the_heads_again(heads: TrainedHeads, tmp_path: Path) -> None:
    assert export_safetensors(heads, tmp_path) == [
        "image.safetensors",
        "text.safetensors",
        "heads.json",
    ]
    described = json.loads((tmp_path / "heads.json").read_text())
    assert described["scale"] == heads.scale
    for name, side in (("image", heads.image), ("text", heads.text)):
        about = described[name]
        head = build_head(HeadSpec.model_validate(about["head"]), about["in_dim"], about["out_dim"])
        head.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
        features = torch.randn(5, about["in_dim"])
        again = TrainedSide(head=head, encoder=side.encoder, fingerprint=side.fingerprint)
        assert torch.equal(again.embed(features), side.embed(features))


# --- sentence-transformers ------------------------------------------------------------------------


TEXTS = ["a red circle", "the photo of a blue square on white " * 4, "drawing"]


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("linear", {}),
        ("identity", {}),
        ("linear", {"pooling": "cls"}),
        ("linear", {"pooling": "max"}),
        ("linear", {"prefix": "the ", "max_tokens": 6}),
    ],
)
def test_a_sentence_transformer_encodes_as_the_run_does(
    kind: str,
    changed: dict[str, str],
    heads: TrainedHeads,
    tmp_path: Path,
) -> None:
    library = pytest.importorskip("sentence_transformers")
    from apecache.encoders.load import load_text_encoder
    from apecache.encoders.spec import spec_from_json

    spec = replace(spec_from_json(heads.text.encoder), **changed)  # type: ignore[arg-type]
    encoder = load_text_encoder(spec, "cpu")
    side = TrainedSide(
        head=filled(HeadSpec(kind=kind), encoder.dim),
        encoder=vars(spec),
        fingerprint=encoder.fingerprint,
    )  # type: ignore[arg-type]
    export_sentence_transformers(replace(heads, text=side), tmp_path / "out")
    found = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    wanted = side.embed(encoder.encode(TEXTS)).numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-5
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3


def test_an_encoder_of_sentence_transformers_goes_along_whole(
    heads: TrainedHeads,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from apecache.encoders.load import load_text_encoder
    from apecache.encoders.spec import parse_encoder

    model = library.SentenceTransformer(
        modules=[Transformer(str(tiny_text_encoder)), Pooling(32, "cls")],
        device="cpu",
    )
    model.save(str(tmp_path / "st"), create_model_card=False)
    spec = replace(parse_encoder(f"st:{tmp_path / 'st'}", "text"), prefix="a ", max_tokens=7)
    encoder = load_text_encoder(spec, "cpu")
    side = TrainedSide(
        head=filled(HeadSpec(kind="linear"), encoder.dim),
        encoder=vars(spec),
        fingerprint=encoder.fingerprint,
    )
    export_sentence_transformers(replace(heads, text=side), tmp_path / "out")
    found = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS)
    assert np.abs(found - side.embed(encoder.encode(TEXTS)).numpy()).max() < 1e-5


def test_heads_and_encoders_that_do_not_fit_are_named(
    heads: TrainedHeads,
    other_text_encoder: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("sentence_transformers")
    from apecache.encoders.spec import parse_encoder

    deep = TrainedSide(
        head=filled(HeadSpec(kind="gated"), 32),
        encoder=heads.text.encoder,
        fingerprint=heads.text.fingerprint,
    )
    with pytest.raises(
        RunError,
        match="of kind gated; a sentence-transformers folder can hold linear and identity",
    ):
        export_sentence_transformers(replace(heads, text=deep), tmp_path / "out")
    layered = TrainedSide(
        head=heads.text.head,
        encoder={**heads.text.encoder, "layer": 1, "pooling": "mean"},
        fingerprint=heads.text.fingerprint,
    )
    with pytest.raises(
        RunError,
        match="layer 1: a sentence-transformers folder can hold st: encoders",
    ):
        export_sentence_transformers(replace(heads, text=layered), tmp_path / "out")
    with pytest.raises(MismatchError, match="not of the encoder"):
        export_sentence_transformers(
            heads,
            tmp_path / "out",
            parse_encoder(f"hf:{other_text_encoder}", "text"),
        )
    assert not (tmp_path / "out").exists()


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_one_thing_and_never_over_another(
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    runner = CliRunner()
    out = str(tmp_path / "out")
    assert runner.invoke(app, ["export-run", str(tiny_run), out]).exit_code == 2
    assert (
        runner.invoke(app, ["export-run", str(tiny_run), out, "--onnx", "--safetensors"]).exit_code
        == 2
    )
    result = runner.invoke(app, ["export-run", str(tiny_run), out, "--safetensors", "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["wrote"]) == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert runner.invoke(app, ["export-run", str(tiny_run), out, "--safetensors"]).exit_code == 3


def test_a_command_makes_the_model_that_load_is(tiny_run: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, ["export-run", str(tiny_run), out, "--sentence-transformers"])
    assert result.exit_code == 0, result.output
    found = library.SentenceTransformer(out, device="cpu").encode(TEXTS)
    assert np.abs(found - apecache.load(tiny_run, device="cpu").encode_text(TEXTS)).max() < 1e-5
