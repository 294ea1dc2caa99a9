"""The shared encoder: what it is made of, what it learns of, and that it trains, goes on and is
served like others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers as hf
from close_reports import assert_close_reports
from small_towers import pictures, sentences, small_bert, small_t5, small_vit
from tiny import make_shapes

from apecache.data.images import load_image
from apecache.data.media import FolderMedia
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import build_tower
from apecache.errors import EncoderError, RecipeError
from apecache.evaluate.embeddings import embed_store
from apecache.extraction.run import ExtractSpec, extract
from apecache.losses.contrastive import Groups, info_nce
from apecache.losses.distillation import distil_contrastive
from apecache.metrics.retrieval import retrieval_report
from apecache.models.dual_encoder import EncoderModel, Teacher, build_shared
from apecache.models.shared_encoder import SharedSide
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.encoders import WEIGHTS, read_tensors
from apecache.runs.load import load_run
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.encoder_data import FitEncoderSpec, open_teacher
from apecache.train.fit_encoder import FitEncoderReport, fit_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SMALL = ("shared.image_blocks=2", "shared.text_blocks=1", "distillation.bank=8")


def small(*settings: str, n: int = 3, dim: int = 5) -> tuple[EncoderModel, torch.Tensor]:
    """A shared encoder of width 16 above small towers, and what its teacher says of `n` images."""
    torch.manual_seed(0)
    teacher = torch.randn(n, dim)
    recipe = load_recipe("shared-encoder", [*SMALL, *settings])
    return build_shared(
        [small_vit(), small_bert()],
        recipe=recipe,
        device=CPU,
        teacher=Teacher(dim=dim, features=teacher),
    ), teacher


# --- what it is -----------------------------------------------------------------------------------


def test_the_published_count_117_million() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0)
        bert = hf.BertModel(hf.BertConfig(), add_pooling_layer=False)
    towers = [
        build_tower(vit, "image", "cls"),
        build_tower(bert, modality="text", pooling="cls", cls_id=101),
    ]
    recipe = load_recipe("shared-encoder", ["distillation.bank=0"])
    with torch.device("meta"):
        model = build_shared(
            towers,
            recipe=recipe,
            device=torch.device("meta"),
            teacher=Teacher(dim=768),
        )
    image = 742_656 + 6 * 7_087_872
    text = 23_837_184 + 6 * 7_087_872
    shared = 7_087_872 + 2 * 768 + 2 * 768 + 768  # block, its layer scales, types and their scale
    assert model.n_trained == image + text + shared + (2 * 768 + 768 * 768 + 768) + 2 == 117_318_146


def test_the_layers_are_shared_and_trained_blocks_end_where_they_should() -> None:
    model, _ = small()
    assert model.image.layers is model.text.layers  # type: ignore[union-attr]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {
        "image.tower.module.blocks.1.norm1.weight",
        "text.tower.module.encoder.layer.0.output.dense.bias",
    } <= names
    assert not any(
        "blocks.2" in name or "layer.1." in name for name in dict(model.named_parameters())
    )
    assert "image.tower.module.norm.weight" not in names
    rows = range(3)
    image, text = model.image.outputs(pictures(3)), model.text.outputs(*sentences())
    model.terms(image, text, rows).total.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names


def test_both_points_are_those_of_a_block_written_down_by_hand() -> None:
    model, _ = small("shared.n_heads=2")
    ids, mask = sentences()
    layers = model.text.layers  # type: ignore[union-attr]
    block = layers.block
    with torch.no_grad():
        block.scale1.uniform_(0.1, 1)
        x = model.text.tower.run_to(1, ids, mask) + layers.types[1] * layers.type_scale  # type: ignore[union-attr]
        q, k, v = block.qkv(
            F.layer_norm(x, (16,), block.norm1.weight, block.norm1.bias, 1e-6)
        ).chunk(3, -1)
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            scores = q[..., head] @ k[..., head].transpose(1, 2) / 8**0.5
            heads.append(
                scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1) @ v[..., head]
            )
        x = x + block.scale1 * block.project(torch.cat(heads, -1))
        inner = block.up(F.layer_norm(x, (16,), block.norm2.weight, block.norm2.bias, 1e-6))
        output = x + block.scale2 * block.down(F.gelu(inner))
        found = model.text.outputs(ids, mask)
    torch.testing.assert_close(
        found,
        torch.cat([inner[:, 0], output[:, 0]], -1),
        atol=1e-5,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        model.text(ids, mask),
        F.normalize(output[:, 0], dim=-1),
        atol=1e-5,
        rtol=1e-4,
    )


def test_it_starts_as_published() -> None:
    model, _ = small()
    layers = model.image.layers  # type: ignore[union-attr]
    assert (layers.block.scale1 == 0.2).all()
    assert (layers.block.scale2 == 0.2).all()
    assert (layers.type_scale == 1e-5).all()
    assert model.shared is not None
    assert model.shared.inner is not model.temperature
    assert model.temperature.scale().item() == pytest.approx(1 / 0.07)


def test_new_layers_are_drawn_as_published() -> None:
    """N(0, .02) cut at one deviation: the standard deviation that is left is .0108."""
    recipe = load_recipe("shared-encoder", [*SMALL, "distillation.bank=8"])
    torch.manual_seed(0)
    model = build_shared(
        [small_vit(embed_dim=64), small_bert(hidden_size=64)],
        recipe=recipe,
        device=CPU,
        teacher=Teacher(dim=64, features=torch.randn(3, 64)),
    )
    assert isinstance(model.image, SharedSide)
    assert model.shared is not None
    assert model.shared.distillation is not None
    block = model.image.layers.block
    drawn = (block.qkv, block.project, block.up, block.down, model.shared.distillation.project)
    for layer in drawn:
        assert float(layer.weight.detach().std()) == pytest.approx(0.0108, rel=0.05)
        assert float(layer.weight.detach().abs().max()) <= 0.02
        assert not layer.bias.any()
    assert float(model.image.layers.types.detach().std()) == pytest.approx(1.0, rel=0.2)
    norms = (block.norm1, block.norm2, model.shared.distillation.norm)
    assert {norm.eps for norm in norms} == {1e-6}


# --- what it learns of ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["contrastive", "mse", "classes"])
def test_the_loss_is_the_mean_of_two_contrasts_plus_the_distillation(kind: str) -> None:
    model, teacher = small(f"distillation.kind={kind}")
    assert model.shared is not None
    distillation = model.shared.distillation
    assert distillation is not None
    if kind == "classes":
        distillation.teacher = teacher.softmax(-1)
    image = torch.randn(3, 80)
    text = torch.randn(3, 80)
    rows = [2, 0, 1]
    with torch.no_grad():
        model.shared.inner.log_scale.fill_(1.0)
        inner = info_nce(
            F.normalize(image[:, :64], dim=-1),
            F.normalize(text[:, :64], dim=-1),
            torch.e,
        )
        outer = info_nce(
            F.normalize(image[:, 64:], dim=-1),
            F.normalize(text[:, 64:], dim=-1),
            1 / 0.07,
        )
        students = [distillation.project(distillation.norm(side[:, 64:])) for side in (image, text)]
        mine = teacher[rows]
        if kind == "contrastive":
            assert distillation.bank is not None
            bank = distillation.bank.entries.clone()
            candidates = torch.cat([F.normalize(mine, dim=-1), bank])
            logits = [F.normalize(s, dim=-1) @ candidates.T / 0.07 for s in students]
            losses = [F.cross_entropy(logit, torch.arange(3)) for logit in logits]
        elif kind == "mse":
            losses = [(s - mine).square().mean() for s in students]
        else:
            p = mine.softmax(-1)
            losses = [(p * (p.log() - s.log_softmax(-1))).sum(-1).mean() for s in students]
        contrastive = (inner + outer) / 2
        terms = model.terms(image, text, rows)
        torch.testing.assert_close(terms.total, contrastive + (losses[0] + losses[1]) / 2)
        torch.testing.assert_close(terms.contrastive, contrastive)
    if kind == "contrastive":
        assert distillation.bank is not None
        torch.testing.assert_close(distillation.bank.entries[:3], F.normalize(mine, dim=-1))
        assert torch.equal(distillation.bank.entries[3:], bank[3:])


def test_images_of_one_group_are_no_wrong_answers_of_the_distillation() -> None:
    """Two images with equal captions: neither teacher's features are wrong for the other's."""
    model, teacher = small()
    assert model.shared is not None
    distillation = model.shared.distillation
    assert distillation is not None
    assert distillation.bank is not None
    bank = distillation.bank.entries.clone()
    outputs = [torch.randn(3, 16), torch.randn(3, 16)]
    group_of_image = torch.tensor([0, 1, 0])
    groups = Groups(image=group_of_image, text=group_of_image)
    with torch.no_grad():
        found = distillation(outputs, [2, 0, 1], groups)
        losses = []
        for output in outputs:
            loss = distil_contrastive(
                F.normalize(distillation.project(distillation.norm(output)), dim=-1),
                teacher=F.normalize(teacher[[2, 0, 1]], dim=-1),
                bank=bank,
                scale=1 / 0.07,
                groups=group_of_image,
            )
            losses.append(loss)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_what_cannot_be_shared() -> None:
    wide = small_bert(hidden_size=32)
    for towers, settings, message in (
        ([small_vit(), wide], [], "the towers are 16 and 32 wide"),
        (
            [small_vit(), small_bert()],
            ["shared.image_blocks=4"],
            "has 3 blocks; set shared.image_blocks",
        ),
        ([small_vit(), small_bert()], ["shared.n_heads=3"], "3 does not divide"),
        ([small_vit(), small_t5()], ["towers.text_pooling=mean"], "no CLS token"),
    ):
        with pytest.raises(RecipeError, match=message):
            build_shared(
                towers,
                recipe=load_recipe("shared-encoder", [*SMALL, *settings]),
                device=CPU,
                teacher=Teacher(dim=5),
            )
    with pytest.raises(RecipeError, match=r"set towers\.freezing to Vuu-Tuu"):
        load_recipe("shared-encoder", ["towers.freezing=Vff-Tuu"])
    with pytest.raises(RecipeError, match="distillation teaches a shared encoder"):
        load_recipe("clip", ["distillation.kind=mse"])


# --- training it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow_text_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_text_encoder: Path) -> Path:
    """The tiny text encoder at the width of the tiny image encoder, 64."""
    folder = tmp_path_factory.mktemp("encoders") / "bert-64"
    hf.AutoTokenizer.from_pretrained(tiny_text_encoder).save_pretrained(folder)
    config = hf.BertConfig.from_pretrained(tiny_text_encoder, hidden_size=64)
    torch.manual_seed(0)
    hf.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    narrow_text_encoder: Path,
) -> Any:
    """24 images; the store has the CLS before the final norm, and the encoder's own pooled
    features."""
    folder = tmp_path_factory.mktemp("shared-data")
    table = make_shapes(folder / "shapes", copies=2)
    own = parse_encoder(f"timm:{tiny_image_encoder}", "image")
    text = parse_encoder(f"hf:{narrow_text_encoder}", "text")
    images = (replace(own, pooling="cls", layer=-1), own)
    extract(open_pairs(table), folder / "store", ExtractSpec(images, (text,), device="cpu"))
    media = FolderMedia(root=table.parent)
    return FeatureStore.open(folder / "store"), lambda key: load_image(key, media).image, own


TEACHER = "distillation.teacher=tiny-vit-cls-layer-1"
SHORT = (
    *SMALL[:2],
    "distillation.bank=16",
    "schedule.batch_size=8",
    "schedule.warmup=0",
    "optimizer.lr=2e-3",
)


def fit(
    data: Any,
    recipe: Recipe,
    out: Path,
    progress: Any = None,
    **settings: Any,
) -> FitEncoderReport:
    store, open_image, own = data
    spec = FitEncoderSpec(image=own, splits=SplitSpec(dev="val"), device="cpu", **settings)
    return fit_encoder(
        store,
        recipe=recipe,
        out=out,
        spec=spec,
        open_image=open_image,
        progress=progress or (lambda _: None),
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("shared-encoder", (TEACHER,)),
        ("shared-encoder", (TEACHER, "distillation.kind=mse")),
        ("see-hear-read", ("distillation.teacher=tiny-vit",)),
    ],
)
def test_it_learns_and_is_served_as_it_was_measured(
    name: str,
    settings: tuple[str, ...],
    data: Any,
    tmp_path: Path,
) -> None:
    losses: list[float] = []
    recipe = load_recipe(name, [*SHORT, *settings, "schedule.epochs=12"])
    report = fit(
        data,
        recipe=recipe,
        out=tmp_path / "run",
        progress=lambda line: losses.append(line["loss"]),
    )
    assert losses[-1] < 0.85 * losses[1]
    assert report.cached == ()
    found = embed_store(load_run(tmp_path / "run"), store=data[0], split="val", open_image=data[1])
    served = retrieval_report(
        found.image,
        found.text,
        found.image_of_text,
        relevance=found.relevance,
    )
    assert_close_reports(served, report.dev)
    assert not any(".bank." in name for name in read_tensors(tmp_path / "run" / WEIGHTS)[0])


class StoppedError(Exception):
    pass


def test_broken_off_it_goes_on_to_the_same_bits_bank_included(data: Any, tmp_path: Path) -> None:
    recipe = load_recipe("shared-encoder", [*SHORT, TEACHER, "schedule.epochs=3"])

    def stop(line: dict[str, Any]) -> None:
        if line["epoch"] == 1:
            raise StoppedError

    losses: list[float] = []
    fit(
        data,
        recipe=recipe,
        out=tmp_path / "whole",
        progress=lambda line: losses.append(line["loss"]),
        slice_size=3,
    )
    with pytest.raises(StoppedError):
        fit(
            data,
            recipe=recipe,
            out=tmp_path / "broken",
            progress=stop,
            slice_size=3,
            save_seconds=0,
        )
    after: list[float] = []
    fit(
        data,
        recipe=recipe,
        out=tmp_path / "broken",
        progress=lambda line: after.append(line["loss"]),
        slice_size=3,
    )
    assert after == losses[1:]  # the last checkpoint was within the first epoch
    whole, broken = (read_tensors(tmp_path / run / WEIGHTS)[0] for run in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(broken[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            ["distillation.teacher=dino"],
            RecipeError,
            "features tiny-vit, tiny-vit-cls-layer-1, but not the teacher 'dino'",
        ),
        ([TEACHER, "distillation.kind=classes"], EncoderError, "their own pooling only"),
    ],
)
def test_a_teacher_that_is_not_there_is_named(
    settings: list[str],
    error: type[Exception],
    message: str,
    data: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        fit(data, load_recipe("shared-encoder", [*SHORT, *settings]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_supervised_teacher_gives_the_distribution_of_its_whole_model(
    data: Any,
    tiny_image_encoder: Path,
) -> None:
    store, open_image, _ = data
    recipe = load_recipe("see-hear-read", ["distillation.teacher=tiny-vit"])
    teacher = open_teacher(store, recipe, CPU)
    assert teacher is not None
    from apecache.encoders.load import load_image_encoder

    encoder = load_image_encoder(parse_encoder(f"timm:{tiny_image_encoder}", "image"), "cpu")
    model = timm.create_model(f"local-dir:{tiny_image_encoder}", pretrained=True).eval()
    pixels = torch.stack([encoder.preprocess(open_image(key)) for key in store.pairs.keys[:4]])
    with torch.no_grad():
        torch.testing.assert_close(teacher.taught[:4], model(pixels).softmax(-1), atol=2e-3, rtol=0)
