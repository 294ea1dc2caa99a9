"""Towers of image-text models: equal to their libraries' own forward, whole and cut; every part is
on the way, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from apecache.encoders.load import load_image_encoder, load_text_encoder, shape_tower
from apecache.encoders.module_places import EMBEDDING_PLACES
from apecache.encoders.spec import parse_encoder
from apecache.encoders.tower import Tower, build_tower, tower_of
from apecache.errors import EncoderError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
}
EOS = 59
PAD = 58


def randomize(module: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * 0.2 + (0.5 if parameter.ndim == 1 else 0.0)
            )
    return module.eval()


def sentences() -> tuple[Tensor, Tensor]:
    """Ids and mask [3, 7]; every text ends by EOS, the second and third are padded."""
    ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate((7, 4, 6)):
        ids[row, length - 1] = EOS
        ids[row, length:] = PAD
        mask[row, length:] = 0
    return ids, mask


def pictures() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


HF_TEXTS: dict[str, Callable[[], Any]] = {
    "clip": lambda: hf.CLIPTextModelWithProjection(
        hf.CLIPTextConfig(**SIZES, projection_dim=8, eos_token_id=EOS, bos_token_id=1)
    ),
    "clip with the old end of text": lambda: hf.CLIPTextModelWithProjection(
        hf.CLIPTextConfig(**SIZES, projection_dim=8, eos_token_id=2, bos_token_id=1)
    ),
    "metaclip 2": lambda: hf.MetaClip2TextModelWithProjection(
        hf.MetaClip2TextConfig(**SIZES, projection_dim=8, eos_token_id=EOS, bos_token_id=1)
    ),
    "siglip": lambda: hf.SiglipTextModel(
        hf.SiglipTextConfig(**SIZES, projection_size=8, max_position_embeddings=7)
    ),
    "siglip 2": lambda: hf.Siglip2TextModel(
        hf.Siglip2TextConfig(**SIZES, projection_size=8, max_position_embeddings=7)
    ),
}
VISION = {"image_size": 16, "layers": 3, "width": 16, "patch_size": 4, "head_width": 8}
TEXT = {"context_length": 7, "vocab_size": 60, "width": 16, "heads": 2, "layers": 3}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "clip": {"vision_cfg": VISION, "text_cfg": TEXT},
    "clip, last norm after the mean": {
        "vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": EOS},
    },
    "layer scales": {"vision_cfg": {**VISION, "ls_init_value": 0.1}, "text_cfg": TEXT},
    "siglip": {
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
            "image_size": 224,
        },
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
    "eva": {
        "vision_cfg": {
            "timm_model_name": "eva02_tiny_patch14_224",
            "timm_pool": "token",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": TEXT,
    },
    "coca": {
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2},
        "text_cfg": TEXT,
    },
}


def open_clip_model(name: str) -> Any:
    open_clip = pytest.importorskip("open_clip")
    if name in ("siglip", "eva"):
        # Full-sized image towers: shapes only, so small ones are put in their place.
        import timm

        model = open_clip.CustomTextCLIP(embed_dim=8, **without_trunk(OPEN_CLIP[name]))
        trunk_name = OPEN_CLIP[name]["vision_cfg"]["timm_model_name"]
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 3}
        visual = open_clip.timm_model.TimmModel.__new__(open_clip.timm_model.TimmModel)
        nn.Module.__init__(visual)
        visual.trunk = timm.create_model(trunk_name, num_classes=0, **sizes)
        projection = {"proj": nn.Linear(16, 8, bias=False)} if name == "eva" else {}
        visual.head = nn.Sequential()
        for part_name, layer in projection.items():
            visual.head.add_module(part_name, layer)
        model.visual = visual
        return randomize(model)
    return randomize(open_clip.CustomTextCLIP(embed_dim=8, **OPEN_CLIP[name]))


def without_trunk(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "vision_cfg": VISION}


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def equal_whole_and_cut(
    tower: Tower,
    expected: Tensor,
    inputs: Tensor,
    mask: Tensor | None = None,
) -> None:
    assert expected.abs().max() > 0.1
    assert tower.output_dim == expected.shape[1]
    same(tower(inputs, mask), expected)
    for cut in (*range(tower.n_blocks + 1), "pooled"):
        same(tower.forward_from(cut, tower.run_to(cut, inputs, mask), mask), expected)


def every_part_is_on_the_way(tower: Tower, inputs: Tensor, mask: Tensor | None) -> None:
    tower.zero_grad()
    tower.requires_grad_(True)
    tower(inputs, mask).square().sum().backward()
    reached = {name for name, p in tower.module.named_parameters() if p.grad is not None}
    parts = tower.parts()
    assert {part.name for part in parts} == reached
    assert {part.depth for part in parts if part.section == "block"} == {0, 1, 2}
    assert all(part.depth == -1 for part in parts if part.section in EMBEDDING_PLACES)
    above = {part.depth for part in parts if part.section in ("final_norm", "pooler")}
    assert above == {3}
    first = "patch_embedding" if tower.modality == "image" else "token_embedding"
    assert first in {part.section for part in parts}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", HF_TEXTS)
def test_text_towers_of_transformers(name: str, attention: str) -> None:
    module = randomize(HF_TEXTS[name]())
    module.set_attn_implementation(attention)
    ids, mask = sentences()
    sees_padding = name.startswith("siglip")
    with torch.no_grad():
        output = module(input_ids=ids, **({} if sees_padding else {"attention_mask": mask}))
    expected = output.pooler_output if sees_padding else output.text_embeds
    tower = build_tower(module, modality="text", cls_id=1)
    assert tower.sees_padding is sees_padding
    equal_whole_and_cut(tower, expected, ids, mask)
    every_part_is_on_the_way(tower, ids, mask)
    mean = build_tower(module, modality="text", pooling="mean")
    weights = mask.unsqueeze(-1).float()
    tokens = output.last_hidden_state
    expected_mean = (tokens * weights).sum(1) / weights.sum(1)
    equal_whole_and_cut(mean, expected_mean, ids, mask)
    assert not any(part.section == "pooler" for part in mean.parts())
    with pytest.raises(EncoderError, match="has no CLS token; use --text-cut default or mean"):
        build_tower(module, modality="text", pooling="cls")


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_image_towers_of_open_clip(name: str) -> None:
    module = open_clip_model(name).visual
    with torch.no_grad():
        expected = module(pictures())
    tower = build_tower(module, "image")
    tower.pixels = (16, 16)
    equal_whole_and_cut(tower, expected, pictures())
    every_part_is_on_the_way(tower, pictures(), None)


@pytest.mark.parametrize("name", ["clip", "clip, last norm after the mean", "siglip"])
def test_text_towers_of_open_clip(name: str) -> None:
    module = open_clip_model(name).text
    ids, mask = sentences()
    with torch.no_grad():
        expected = module(ids)
    tower = build_tower(module, "text")
    equal_whole_and_cut(tower, expected, ids, mask)
    every_part_is_on_the_way(tower, ids, mask)


def test_a_text_tower_that_needs_the_ids_is_refused_by_name() -> None:
    open_clip = pytest.importorskip("open_clip")
    text = {**TEXT, "embed_cls": True}
    module = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=VISION, text_cfg=text).text
    with pytest.raises(EncoderError, match=r"appends a class token \(CoCa\).*use it frozen"):
        build_tower(module, "text")


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler", "cls_last_hidden_state_pooler"])
@pytest.mark.parametrize("style", ["bert", "roberta"])
def test_text_towers_of_transformers_within_open_clip(style: str, pooler: str) -> None:
    hf_model = pytest.importorskip("open_clip.hf_model")
    config_class, model_class = {
        "bert": (hf.BertConfig, hf.BertModel),
        "roberta": (hf.XLMRobertaConfig, hf.XLMRobertaModel),
    }[style]
    config = config_class(**SIZES, pad_token_id=PAD, max_position_embeddings=80)
    module = hf_model.HFTextEncoder(
        "unused",
        output_dim=8,
        config=config,
        pooler_type=pooler,
        proj_type="mlp",
        pretrained=False,
    )
    assert isinstance(module.transformer, model_class)
    randomize(module)
    ids, mask = sentences()
    with torch.no_grad():
        expected = module(ids)
    tower = build_tower(module, modality="text", cls_id=2)
    equal_whole_and_cut(tower, expected, ids, mask)
    tower.requires_grad_(True)
    tower(ids, mask).square().sum().backward()
    reached = {name for name, p in tower.module.named_parameters() if p.grad is not None}
    assert {part.name.removesuffix("[cls]") for part in tower.parts()} == reached
    tower.split_cls()
    same(tower(ids, mask).detach(), expected)


def open_clip_folder(folder: Path, name: str) -> Path:
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    model = randomize(
        open_clip.CustomTextCLIP(
            embed_dim=8,
            vision_cfg=VISION,
            text_cfg={**OPEN_CLIP[name]["text_cfg"], "vocab_size": 49408, "context_length": 77},
        )
    )
    folder.mkdir()
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    text = {**OPEN_CLIP[name]["text_cfg"], "vocab_size": 49408, "context_length": 77}
    model_config = {
        "embed_dim": 8,
        "vision_cfg": VISION,
        "text_cfg": text,
        "custom_text": True,
    }
    preprocess = {"size": [16, 16], "mean": [0.5] * 3, "std": [0.25] * 3}
    described = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def test_loaded_open_clip_encoders_are_towers_and_have_cuts(tmp_path: Path) -> None:
    folder = open_clip_folder(tmp_path / "model", "clip")
    image_spec = parse_encoder(f"open_clip:{folder}", "image")
    image = load_image_encoder(image_spec, "cpu")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    texts = ("a", "a red circle on a white ground")
    with torch.no_grad():
        same(tower_of(image)(pixels), image.encode(pixels))
        maps = image.module.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"]
        ended = image.module.ln_post(image.module.transformer(image.module._embeds(pixels)))
    for layer, patches in enumerate(maps, 1):
        cut = load_image_encoder(replace(image_spec, pooling="mean", layer=layer), "cpu")
        same(cut.encode(pixels), patches.mean(1))
        assert cut.fingerprint != image.fingerprint
    tokens = load_image_encoder(replace(image_spec, pooling="tokens"), "cpu")
    assert tokens.row_shape == (17, 16)
    same(tokens.encode(pixels), ended)
    text_spec = parse_encoder(f"open_clip:{folder}", "text")
    text = load_text_encoder(text_spec, "cpu")
    ids, mask = text.pad(text.tokenize(texts).ids)
    with torch.no_grad():
        same(tower_of(text)(ids, mask), text.encode(texts))
    last = load_text_encoder(replace(text_spec, pooling="last", layer=3), "cpu")
    with torch.no_grad():
        normed = text.module.ln_final(last.encode(texts))
        same(normed @ text.module.text_projection, text.encode(texts))
    counted = shape_tower(image_spec)
    assert counted.image_size == (16, 16)
    assert {part.name for part in counted.parts()} == {p.name for p in tower_of(image).parts()}
    assert shape_tower(text_spec).output_dim == 8


def test_a_text_tower_that_sees_its_padding_has_no_other_cuts(tmp_path: Path) -> None:
    folder = open_clip_folder(tmp_path / "model", "siglip")
    spec = parse_encoder(f"open_clip:{folder}", "text")
    with pytest.raises(EncoderError, match=r"sees its padding.*take the same model from hf:"):
        load_text_encoder(replace(spec, pooling="mean"), "cpu")
