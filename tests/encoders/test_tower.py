"""Towers: equal to the libraries' own forward, whole and cut; the same parts in every family; the
CLS row alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import Tensor, nn

from apecache.encoders.encoder import pool_tokens
from apecache.encoders.load import shape_tower
from apecache.encoders.module_places import EMBEDDING_PLACES
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import Tower, build_tower, tower_of
from apecache.errors import EncoderError

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
PIXELS = {"image_size": 16, "patch_size": 4}
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "vocab_size": 60}
HF_IMAGE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit (ViT, DINO)": (hf.ViTModel, hf.ViTConfig, {**SMALL, **PIXELS}),
    "deit": (hf.DeiTModel, hf.DeiTConfig, {**SMALL, **PIXELS}),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config, {**SMALL, **PIXELS, "intermediate_size": 64}),
    "dinov2 with registers": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig,
        {**SMALL, **PIXELS},
    ),
    "dinov3": (
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig,
        {**SMALL, **PIXELS, "num_register_tokens": 2, "key_bias": True},
    ),
    "beit": (hf.BeitModel, hf.BeitConfig, {**SMALL, **PIXELS, "use_relative_position_bias": True}),
    "beit, one table of positions": (
        hf.BeitModel,
        hf.BeitConfig,
        {**SMALL, **PIXELS, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "data2vec, fine-tuned": (
        lambda config: hf.Data2VecVisionModel(config, add_pooling_layer=True),
        hf.Data2VecVisionConfig,
        {**SMALL, **PIXELS, "use_relative_position_bias": True},
    ),
    "data2vec": (
        hf.Data2VecVisionModel,
        hf.Data2VecVisionConfig,
        {**SMALL, **PIXELS, "use_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "data2vec, one table of positions": (
        hf.Data2VecVisionModel,
        hf.Data2VecVisionConfig,
        {**SMALL, **PIXELS, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
    ),
}
CONTRASTIVE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "clip": (
        hf.CLIPVisionModelWithProjection,
        hf.CLIPVisionConfig,
        {**SMALL, **PIXELS, "projection_dim": 8},
    ),
    "clip, without its projection": (hf.CLIPVisionModel, hf.CLIPVisionConfig, {**SMALL, **PIXELS}),
    "metaclip 2": (
        hf.MetaClip2VisionModelWithProjection,
        hf.MetaClip2VisionConfig,
        {**SMALL, **PIXELS, "projection_dim": 8},
    ),
    "siglip (SigLIP 2)": (hf.SiglipVisionModel, hf.SiglipVisionConfig, {**SMALL, **PIXELS}),
    "siglip, without its head": (
        hf.SiglipVisionModel,
        hf.SiglipVisionConfig,
        {**SMALL, **PIXELS, "vision_use_head": False},
    ),
}
"""Image towers that were trained with texts."""
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 4},
    "vit_base_patch32_clip_224": {"patch_size": 4},
    "beit_base_patch16_224": {},
    "vit_base_patch16_siglip_224": {},
    "eva02_tiny_patch14_224": {"patch_size": 4},
    "eva_giant_patch14_224": {"patch_size": 4},
    "vit_small_patch16_dinov3": {"patch_size": 4},
    "vit_small_patch16_rope_mixed_224": {"patch_size": 4},
    "vit_pe_core_tiny_patch16_384": {"patch_size": 4},
}
HF_TEXT: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert (mBERT, MiniLM, E5)": (hf.BertModel, hf.BertConfig, {**SMALL, "vocab_size": 60}),
    "roberta": (hf.RobertaModel, hf.RobertaConfig, {**SMALL, "vocab_size": 60}),
    "xlm-roberta (E5)": (hf.XLMRobertaModel, hf.XLMRobertaConfig, {**SMALL, "vocab_size": 60}),
    "mpnet": (hf.MPNetModel, hf.MPNetConfig, {**SMALL, "vocab_size": 60}),
    "distilbert": (
        hf.DistilBertModel,
        hf.DistilBertConfig,
        {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "vocab_size": 60},
    ),
    "modernbert": (
        hf.ModernBertModel,
        hf.ModernBertConfig,
        # Of three blocks the first and the last see all tokens, the middle one two each way.
        {
            **SMALL,
            "vocab_size": 60,
            "pad_token_id": 0,
            "local_attention": 4,
            "global_attn_every_n_layers": 2,
        },
    ),
    "qwen3": (
        hf.Qwen3Model,
        hf.Qwen3Config,
        {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 60, "pad_token_id": 0},
    ),
    "deberta-v3": (
        hf.DebertaV2Model,
        hf.DebertaV2Config,
        {
            **SMALL,
            "vocab_size": 60,
            "relative_attention": True,
            "position_buckets": 4,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "t5 encoder": (hf.T5EncoderModel, hf.T5Config, T5_SIZES),
    "mt5 encoder": (hf.MT5EncoderModel, hf.MT5Config, T5_SIZES),
}


def randomize(module: Any) -> Any:
    """Large random weights, norms and zero-initialized tables too: what is left out shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.2 + (0.5 if parameter.ndim == 1 else 0.0)
            )
    return module.eval()


def hf_model(entry: tuple[Any, Any, dict[str, Any]]) -> Any:
    model, config, settings = entry
    return randomize(model(config(**settings)))


def timm_model(name: str, **settings: Any) -> Any:
    sizes = {"img_size": 16, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "depth": 3}
    return randomize(timm.create_model(name, pretrained=False, num_classes=0, **sizes | settings))


def bert_tower(cls_id: int | None = 2, pooling: Any = "cls") -> Tower:
    return build_tower(
        hf_model(HF_TEXT["bert (mBERT, MiniLM, E5)"]),
        modality="text",
        pooling=pooling,
        cls_id=cls_id,
    )


def pictures() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def sentences(pad: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 6:] = 0
    return ids.where(mask == 1, pad), mask


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def equal_whole_and_cut(
    tower: Tower,
    expected: Tensor,
    inputs: Tensor,
    mask: Tensor | None = None,
) -> None:
    assert expected.abs().max() > 0.1
    same(tower(inputs, mask), expected)
    for cut in (*range(tower.n_blocks + 1), "pooled"):
        same(tower.forward_from(cut, tower.run_to(cut, inputs, mask), mask), expected)


@pytest.mark.parametrize("name", HF_IMAGE)
@pytest.mark.parametrize("pooling", ["default", "mean", "max", "cls+mean"])
def test_transformers_images(name: str, pooling: Any) -> None:
    module = hf_model(HF_IMAGE[name])
    tower = build_tower(module, "image", pooling)
    with torch.no_grad():
        output = module(pictures())
    tokens = output.last_hidden_state
    n_prefix = tokens.shape[1] - 16
    expected = pool_tokens(
        tokens,
        mask=None,
        pooling="cls" if pooling == "default" else pooling,
        n_prefix=n_prefix,
    )
    if pooling == "default" and getattr(module.config, "use_mean_pooling", False):
        expected = output.pooler_output
        mean = tokens[:, 1:].mean(1)
        norm = module.pooler.layernorm
        own = nn.functional.layer_norm(mean, mean.shape[1:], norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(expected, own, atol=1e-5, rtol=1e-5)
    assert expected.shape[1] == tower.output_dim
    equal_whole_and_cut(tower, expected, pictures())


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("pooling", ["default", "mean"])
def test_transformers_images_that_were_trained_with_texts(name: str, pooling: Any) -> None:
    module = hf_model(CONTRASTIVE[name])
    tower = build_tower(module, "image", pooling)
    with torch.no_grad():
        output = module(pictures())
    n_prefix = output.last_hidden_state.shape[1] - 16
    expected = output.last_hidden_state[:, n_prefix:].mean(1)
    if pooling == "default" and "head" not in name:
        expected = output.get("image_embeds", output.get("pooler_output"))
    assert expected.shape[1] == tower.output_dim
    equal_whole_and_cut(tower, expected, pictures())


def test_dinov3_takes_pixels_of_any_shape_that_it_is_told() -> None:
    """Rotary positions need the shape of the grid, which tokens do not say."""
    module = hf_model(HF_IMAGE["dinov3"])
    tower = build_tower(module, "image")
    wide = torch.randn(2, 3, 8, 24, generator=torch.Generator().manual_seed(1))
    tower.pixels = (8, 24)
    with torch.no_grad():
        expected = module(wide).last_hidden_state[:, 0]
    equal_whole_and_cut(tower, expected, wide)
    tower.pixels = None
    with pytest.raises(EncoderError, match="12 patches are those of no square image"):
        tower(wide)


def test_dinov3_in_training_does_not_draw_its_positions() -> None:
    """Slices of a batch would draw others."""
    module = hf_model(HF_IMAGE["dinov3"])
    module.config.pos_embed_rescale = 2.0
    tower = build_tower(module, "image").train()
    with torch.no_grad():
        same(tower(pictures()), tower(pictures()))


@pytest.mark.parametrize("name", list(TIMM))
@pytest.mark.parametrize("pooling", ["default", "cls", "mean"])
def test_timm_images(name: str, pooling: Any) -> None:
    module = timm_model(name, **TIMM[name])
    if pooling == "cls" and module.cls_token is None:
        with pytest.raises(EncoderError, match="has no CLS token; use --image-cut default or mean"):
            build_tower(module, "image", pooling)
        return
    with torch.no_grad():
        tokens = module.forward_features(pictures())
        expected = {
            "default": module(pictures()),
            "cls": tokens[:, 0],
            "mean": tokens[:, module.num_prefix_tokens :].mean(1),
        }
    equal_whole_and_cut(build_tower(module, "image", pooling), expected[pooling], pictures())


@pytest.mark.parametrize("name", HF_TEXT)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_texts_with_padding(name: str, attention: str) -> None:
    module = hf_model(HF_TEXT[name])
    if name not in ("mpnet", "deberta-v3"):  # they have no other attention than their own
        module.set_attn_implementation(attention)
    ids, mask = sentences(module.config.pad_token_id)
    with torch.no_grad():
        tokens = module(input_ids=ids, attention_mask=mask).last_hidden_state
    equal_whole_and_cut(
        build_tower(module, modality="text", pooling="mean", cls_id=2),
        expected=pool_tokens(tokens, mask, "mean"),
        inputs=ids,
        mask=mask,
    )
    if name == "qwen3":
        equal_whole_and_cut(
            build_tower(module, modality="text"),
            expected=pool_tokens(tokens, mask, "last"),
            inputs=ids,
            mask=mask,
        )
    elif "t5" not in name:
        equal_whole_and_cut(
            build_tower(module, modality="text", pooling="cls", cls_id=2),
            expected=tokens[:, 0],
            inputs=ids,
            mask=mask,
        )


def test_padding_changes_nothing() -> None:
    tower = bert_tower(pooling="mean")
    ids, mask = sentences(0)
    with torch.no_grad():
        same(tower(ids, mask)[1], tower(ids[1:2, :4], mask[1:2, :4])[0])


def all_towers() -> list[Tower]:
    entries = [*HF_IMAGE.values(), *CONTRASTIVE.values()]
    images = [build_tower(hf_model(entry), "image") for entry in entries]
    images += [build_tower(hf_model(entry), "image", "mean") for entry in CONTRASTIVE.values()]
    images += [build_tower(timm_model(name, **s), "image") for name, s in TIMM.items()]
    return [
        *images,
        *(build_tower(hf_model(entry), "text", cls_id=2) for entry in HF_TEXT.values()),
    ]


def test_every_family_has_the_same_parts() -> None:
    for tower in all_towers():
        parts = tower.parts()
        places = {part.section for part in parts}
        first = "patch_embedding" if tower.modality == "image" else "token_embedding"
        assert {"block", first} <= places
        assert {part.depth for part in parts if part.section == "block"} == {0, 1, 2}
        assert all(part.depth == -1 for part in parts if part.section in EMBEDDING_PLACES)
        above = [part.depth for part in parts if part.section in ("final_norm", "pooler")]
        assert set(above) <= {3}
        # Weights, and biases but for RMSNorm; ModernBERT's first norm is an identity, and Qwen3
        # normalizes queries and keys too.
        norms = {"t5": 6, "modernbert": 5, "decoder": 12}
        n_norms = sum(part.norm for part in parts if part.section == "block")
        assert n_norms == norms.get(tower.module_map.family, 12)
        has_biases = tower.module_map.family not in norms  # mT5 is a T5 too
        assert any(part.bias for part in parts) is has_biases
        is_map = getattr(tower.module, "global_pool", "") == "map" and tower.n_prefix == 0
        has_cls = tower.module_map.family not in ("t5", "decoder", "hf-siglip") and not is_map
        assert ("cls" in places) is tower.has_cls is has_cls


def test_every_part_is_on_the_way_and_nothing_else() -> None:
    for tower in all_towers():
        ids, mask = (
            sentences(tower.module.config.pad_token_id)
            if tower.modality == "text"
            else (pictures(), None)
        )
        tower.zero_grad()
        tower(ids, mask).square().sum().backward()
        reached = {name for name, p in tower.module.named_parameters() if p.grad is not None}
        assert {part.name.removesuffix("[cls]") for part in tower.parts()} == reached


def test_the_cls_row_of_a_table_counts_apart() -> None:
    parts = {part.name: part for part in bert_tower().parts()}
    table = parts["embeddings.word_embeddings.weight"]
    row = parts["embeddings.word_embeddings.weight[cls]"]
    assert (table.count, row.count, row.section) == (59 * 16, 16, "cls")
    assert "embeddings.word_embeddings.weight[cls]" not in {
        part.name for part in bert_tower(cls_id=None).parts()
    }


def test_the_cls_row_alone_gets_a_gradient_and_is_put_back() -> None:
    tower = bert_tower(cls_id=2)
    ids, mask = sentences(0)
    ids[:, 0] = 2
    plain = tower(ids, mask).detach()
    before = tower.module.embeddings.word_embeddings.weight.detach().clone()
    tower.split_cls()
    tower.requires_grad_(False)
    row = tower.module.embeddings.word_embeddings.row.requires_grad_(True)
    same(tower(ids, mask), plain)
    tower(ids, mask).square().sum().backward()
    assert row.grad is not None
    assert row.grad.shape == (16,)
    assert row.grad.abs().sum() > 0
    assert [name for name, p in tower.named_parameters() if p.grad is not None] == [
        "module.embeddings.word_embeddings.row"
    ]
    with torch.no_grad():
        row += 1
    changed = tower(ids, mask).detach()
    tower.join_cls()
    same(tower(ids, mask), changed)
    table = tower.module.embeddings.word_embeddings
    assert isinstance(table, nn.Embedding)
    same(table.weight[2], before[2] + 1)
    same(table.weight[3:], before[3:])


@pytest.mark.parametrize("name", ["mpnet", "distilbert", "modernbert"])
def test_the_cls_row_of_every_family_can_be_split_off_and_put_back(name: str) -> None:
    tower = build_tower(hf_model(HF_TEXT[name]), modality="text", pooling="mean", cls_id=2)
    ids, mask = sentences(tower.module.config.pad_token_id)
    ids[:, 0] = 2
    plain = tower(ids, mask).detach()
    names = {part.name for part in tower.parts()}
    tower.split_cls()
    same(tower(ids, mask), plain)
    assert tower.row_name in {part.name for part in tower.parts()}
    with torch.no_grad():
        tower.module.get_parameter(tower.row_name).neg_()
    changed = tower(ids, mask).detach()
    assert not torch.allclose(changed, plain)
    tower.join_cls()
    same(tower(ids, mask), changed)
    assert {part.name for part in tower.parts()} == names


@pytest.mark.parametrize("name", ["bert (mBERT, MiniLM, E5)", "t5 encoder", "modernbert", "qwen3"])
def test_checkpointing_changes_no_gradient(name: str) -> None:
    tower = build_tower(hf_model(HF_TEXT[name]), modality="text", pooling="mean", cls_id=2)
    ids, mask = sentences(0)
    gradients = []
    for tower.checkpointing in (False, True):
        tower.zero_grad()
        tower(ids, mask).square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.module.parameters() if p.grad is not None])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


def test_loaded_encoders_keep_their_pooling(
    tiny_image_encoder: Any,
    tiny_text_encoder: Any,
) -> None:
    from apecache.encoders.load import load_image_encoder, load_text_encoder

    image = load_image_encoder(parse_encoder(f"timm:{tiny_image_encoder}", "image"), "cpu")
    pixels = torch.randn(2, *image.input_shape)
    with torch.no_grad():
        same(tower_of(image)(pixels), image.encode(pixels))
    text = load_text_encoder(parse_encoder(f"hf:{tiny_text_encoder}", "text"), "cpu")
    ids = torch.tensor(text.tokenize(["a red circle"]).ids)
    tower = tower_of(text)
    assert (tower.cls_id, tower.pooling) == (2, "mean")
    with torch.no_grad():
        same(tower(ids, torch.ones_like(ids)), text.encode_ids(ids.tolist()))


@pytest.mark.parametrize(
    ("make", "modality", "name"),
    [
        (lambda: timm.create_model("test_resnet", pretrained=False), "image", "ResNet"),
        (
            lambda: timm.create_model("eva02_tiny_patch14_224", use_post_norm=True, depth=1),
            "image",
            "EvaBlockPostNorm",
        ),
        (
            lambda: hf.ElectraModel(hf.ElectraConfig(**SMALL, vocab_size=60)),
            "text",
            "ElectraModel",
        ),
        (
            lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[4, 8, 8, 8])),
            "image",
            "ConvNextModel.*hierarchical encoders can be used frozen only",
        ),
        (
            lambda: hf.Qwen3Model(
                hf.Qwen3Config(**SMALL, head_dim=8, vocab_size=60, is_causal=False)
            ),
            "text",
            "Qwen3Model with sliding or two-way attention",
        ),
        (lambda: hf_model(HF_IMAGE["deit"]), "text", "DeiTModel"),
        (lambda: hf_model(HF_TEXT["roberta"]), "image", "RobertaModel"),
    ],
)
def test_other_architectures_are_refused_by_name(make: Any, modality: Any, name: str) -> None:
    with pytest.raises(
        EncoderError,
        match=f"{name}.*supported are timm VisionTransformer",
    ) as error:
        build_tower(make(), modality)
    assert "\n" not in str(error.value)


def test_the_mean_patch_of_a_fine_tuned_beit_needs_its_norm() -> None:
    config = hf.BeitConfig(**SMALL, **PIXELS, use_mean_pooling=True)
    module = randomize(hf.BeitModel(config, add_pooling_layer=False))
    with pytest.raises(EncoderError, match="without the norm after its mean patch"):
        build_tower(module, "image")
    assert build_tower(module, "image", "mean").output_dim == 16


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(EncoderError, match="the last token is for texts only"):
        build_tower(hf_model(HF_IMAGE["deit"]), "image", "last")
    with pytest.raises(EncoderError, match="cut 4: the tower has 3 blocks; give 0 to 3"):
        bert_tower().run_to(4, *sentences(0))
    with pytest.raises(EncoderError, match="T5 has no CLS token; use --text-cut default or mean"):
        build_tower(hf_model(HF_TEXT["t5 encoder"]), "text", "cls")
    with pytest.raises(
        EncoderError, match="Qwen3Model has no CLS token; use --text-cut default or mean"
    ):
        build_tower(hf_model(HF_TEXT["qwen3"]), "text", "cls")
    with pytest.raises(EncoderError, match="SiglipVisionModel has no CLS token; use --image-cut"):
        build_tower(hf_model(CONTRASTIVE["siglip (SigLIP 2)"]), "image", "cls+mean")
    with pytest.raises(EncoderError, match="not its tokens"):
        bert_tower(pooling="tokens")
    with pytest.raises(EncoderError, match="no CLS row"):
        bert_tower(cls_id=None).split_cls()


def test_shapes_of_half_precision_files_are_float32(
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_text_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    tower = shape_tower(parse_encoder(f"hf:{folder}", "text"))
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
