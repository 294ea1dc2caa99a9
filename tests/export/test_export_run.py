"""What other programs get from a run computes what the run computes."""

import json
from pathlib import Path

import pytest
import torch
from apecache_cli.app import app
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

from apecache.errors import RunError
from apecache.export.export_run import ExportRunSpec, export_run
from apecache.export.onnx import export_onnx
from apecache.export.onnx_graph import OPSET
from apecache.export.weights import export_safetensors
from apecache.heads.build import build_head
from apecache.heads.head import Head, HeadSpec, mask_of
from apecache.runs.heads import TrainedHeads, TrainedSide, load_heads
from benchmarks.small_encoders import build_run

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


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_one_thing_and_never_over_another(
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    runner = CliRunner()
    out = str(tmp_path / "out")
    assert runner.invoke(app, ["export-run", str(tiny_run), out]).exit_code == 2
    assert runner.invoke(app, ["export-run", str(tiny_run), out, "--to", "onxx"]).exit_code == 2
    command = ["export-run", str(tiny_run), out, "--to", "safetensors"]
    assert runner.invoke(app, [*command, "--dtype", "int8"]).exit_code == 2
    assert runner.invoke(app, [*command, "--text-only"]).exit_code == 2
    result = runner.invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report["wrote"]) == {path.name for path in (tmp_path / "out").iterdir()}
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert runner.invoke(app, command).exit_code == 3


def test_a_run_that_a_format_cannot_hold_leaves_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    run = build_run(tmp_path / "made", "timm + hf BERT", "gated")
    for name in ("sentence-transformers", "open_clip", "transformers"):
        with pytest.raises(RunError, match=r"head is of kind gated; .* can hold"):
            export_run(run, tmp_path / "out", ExportRunSpec(to=name))  # type: ignore[arg-type]
        assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_export_that_differs_from_the_run_gets_no_name(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("sentence_transformers")
    from apecache.export import head_chain

    real = head_chain.affine_of
    monkeypatch.setattr(head_chain, "affine_of", lambda head: (real(head)[0], 2 * real(head)[1]))
    with pytest.raises(RunError, match="differs from the run by"):
        export_run(tiny_run, tmp_path / "out", ExportRunSpec(to="sentence-transformers"))
    assert list(tmp_path.iterdir()) == []
