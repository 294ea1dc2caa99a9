"""Cuts after a block are the library's own hidden states in every family that has blocks, and what
a recipe freezes is counted at the same widths without a module map."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from families import DECODER, FAMILIES, SIZES, VISION, Family, build_image, build_text, pictures
from model_tokenizers import N_TOKENS
from torch import Tensor

from apecache.encoders.encoder import pool_tokens
from apecache.encoders.layers import caught, find_blocks
from apecache.encoders.load import (
    load_image_encoder,
    load_image_encoders,
    load_text_encoder,
    load_text_encoders,
    shape_tower,
)
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.encoders.tower import tower_of
from apecache.errors import EncoderError

CAPTIONS = ("a red circle on a white ground", "a", "x" * 30)
HF_IMAGES = [
    name
    for name, row in FAMILIES.items()
    # The library counts the hidden states of these without the first, or layers within blocks.
    if (row.library, row.modality) == ("hf", "image") and not name.startswith(("mobile", "effic"))
]
HF_TEXTS = [name for name, row in FAMILIES.items() if (row.library, row.modality) == ("hf", "text")]
WRAPPED = ["open_clip: xlm-roberta, text", "open_clip: bert, text"]
SHAPED = [name for name in FAMILIES if name != "st: static word vectors"]
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2},
    "vit_small_patch16_dinov3": {"img_size": 32, "embed_dim": 48, "num_heads": 2, "depth": 2},
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 16, "num_heads": 2, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 8, "depths": (1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)},
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 8, "stages": (1, 1, 1, 1), "num_heads": 1},
    "test_efficientnet": {},
    "cait_xxs24_224": {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 2},
    "xcit_nano_12_p8_224": {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 2},
    "convit_tiny": {
        "img_size": 32,
        "embed_dim": 16,
        "num_heads": 4,
        "depth": 3,
        "local_up_to_layer": 2,
    },
}


def spec_of(family: Family, folder: Path, **settings: Any) -> EncoderSpec:
    name = f"{family.library}:{folder}"
    return replace(parse_encoder(name, family.modality), **settings)


def as_tokens(state: Tensor) -> Tensor:
    return state if state.ndim == 3 else state.flatten(2).transpose(1, 2)


def assert_close(features: Tensor, expected: Tensor) -> None:
    """Kernels differ between batch sizes in the last bits, so the tolerance is relative too."""
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HF_IMAGES)
def test_layers_of_images_are_the_librarys_hidden_states(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    family.build(tmp_path)
    whole = load_image_encoder(spec_of(family, tmp_path), "cpu")
    pixels = torch.stack([whole.preprocess(image) for image in pictures()])
    module: Any = whole.module
    with torch.inference_mode():
        hidden = module(pixel_values=pixels, output_hidden_states=True).hidden_states
    (blocks,) = find_blocks(module)
    n_blocks = len(module.get_submodule(blocks))
    assert len(hidden) == n_blocks + 1
    # Some models return their last hidden state after the final norm, so it is left out.
    for layer in range(n_blocks):
        state = as_tokens(hidden[layer])
        n_prefix = state.shape[1] - whole_patches(module, state)
        specs = [
            spec_of(family, tmp_path, pooling="tokens", layer=layer),
            spec_of(family, tmp_path, pooling="mean", layer=layer),
        ]
        tokens, mean = load_image_encoders(specs, "cpu")
        assert_close(tokens.encode(pixels), state)
        assert_close(mean.encode(pixels), state[:, n_prefix:].mean(1))
        both = spec_of(family, tmp_path, pooling="cls+mean", layer=layer)
        if n_prefix == 0:
            with pytest.raises(EncoderError, match="has no CLS token"):
                load_image_encoder(both, "cpu")
        else:
            expected = torch.cat((state[:, 0], state[:, n_prefix:].mean(1)), 1)
            assert_close(load_image_encoder(both, "cpu").encode(pixels), expected)
    assert load_image_encoder(replace(specs[0], layer=-1), "cpu").row_shape[0] > 0


def whole_patches(module: Any, state: Tensor) -> int:
    """Count the patches: a square, to which CLS and at most a few registers were added."""
    side = int(state.shape[1] ** 0.5)
    return side * side


@pytest.mark.parametrize("name", HF_TEXTS)
def test_layers_of_texts_are_the_librarys_hidden_states(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    family.build(tmp_path)
    settings = {"prefix": ""}
    whole = load_text_encoder(spec_of(family, tmp_path, pooling="mean", **settings), "cpu")
    ids = whole.tokenize(CAPTIONS).ids
    batch, mask = whole.pad(ids)
    module: Any = whole.module
    masked = {} if "siglip" in name else {"attention_mask": mask}
    with torch.inference_mode():
        hidden = module(input_ids=batch, output_hidden_states=True, **masked).hidden_states
    (blocks,) = find_blocks(module)
    n_blocks = len(module.get_submodule(blocks))
    assert len(hidden) == n_blocks + 1
    for layer in range(n_blocks):
        specs = [
            spec_of(family, tmp_path, pooling="tokens", layer=layer, **settings),
            spec_of(family, tmp_path, pooling="mean", layer=layer, **settings),
        ]
        tokens, mean = load_text_encoders(specs, "cpu")
        assert_close(tokens.encode_ids(ids), hidden[layer])
        assert_close(mean.encode_ids(ids), pool_tokens(hidden[layer], mask, "mean"))


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_layers_of_timm_are_its_intermediates(tmp_path: Path, name: str) -> None:
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=3, **TIMM_MODELS[name]).eval()
    size = TIMM_MODELS[name].get("img_size", 64)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "input_size": (3, size, size),
        "num_classes": 3,
    }
    save_for_hf(model, tmp_path, model_args=TIMM_MODELS[name], safe_serialization=True)
    spec = parse_encoder(f"timm:{tmp_path}", "image")
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    (blocks,) = find_blocks(model)
    n_blocks = len(model.get_submodule(blocks))
    with torch.inference_mode():
        maps = model.forward_intermediates(pixels, intermediates_only=True, output_fmt="NCHW")
    # Convolutional networks count their stem too.
    for layer, feature_map in zip(range(n_blocks, 0, -1), reversed(maps), strict=False):
        if feature_map.shape[1] != load(spec, "mean", layer).dim:
            # timm returns a stage before its downsampling, or leaves a stage out.
            continue
        expected = feature_map.flatten(2).mean(2)
        assert_close(load(spec, "mean", layer).encode(pixels), expected)
        break
    else:
        pytest.fail("no intermediate was compared")


def load(spec: EncoderSpec, pooling: Any, layer: int) -> Any:
    return load_image_encoder(replace(spec, pooling=pooling, layer=layer), "cpu")


def albert() -> Any:
    config = hf.AlbertConfig(**SIZES, vocab_size=N_TOKENS, embedding_size=16)
    return hf.AlbertModel(config)


def test_a_block_that_runs_several_times_has_no_layers(tmp_path: Path) -> None:
    """ALBERT has one block, which it runs as often as others have blocks."""
    build_text(albert, "bert", 128)(tmp_path)
    spec = parse_encoder(f"hf:{tmp_path}", "text")
    with pytest.raises(EncoderError, match=r"has 1 blocks for 2 layers.*remove @LAYER"):
        load_text_encoder(replace(spec, pooling="mean", layer=1), "cpu")
    assert load_text_encoder(spec, "cpu").row_shape == (32,)


def test_a_block_that_runs_again_is_never_taken_for_another() -> None:
    """Also where no configuration says so."""
    block = torch.nn.Sequential(torch.nn.Linear(4, 4))
    module = torch.nn.Sequential(block)
    spec = parse_encoder("timm:test_vit", "image")
    tokens = torch.zeros(1, 2, 4)
    with pytest.raises(EncoderError, match="runs its first block 2 times"):
        caught(module, spec, states=[1], run=lambda: module(module(tokens)))


# What a recipe freezes


@pytest.mark.parametrize("name", SHAPED)
def test_a_frozen_side_is_counted_at_the_widths_of_extraction(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    if family.needs is not None:
        pytest.importorskip(family.needs)
    family.build(tmp_path)
    spec = spec_of(family, tmp_path)
    load_encoder: Any = load_image_encoder if family.modality == "image" else load_text_encoder
    encoder = load_encoder(spec, "cpu")
    tower = shape_tower(spec, is_frozen=True)
    assert {parameter.device.type for parameter in tower.parameters()} == {"meta"}
    assert (tower.output_dim,) == encoder.row_shape
    assert tower.n_blocks == len(tower.blocks)
    if family.modality == "image":
        assert tower.image_size == encoder.input_shape[1:]


@pytest.mark.parametrize("name", [name for name in SHAPED if not name.startswith("st:")])
def test_a_tower_that_trains_is_counted_part_by_part(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    if family.needs is not None:
        pytest.importorskip(family.needs)
    family.build(tmp_path)
    spec = spec_of(family, tmp_path)
    load_encoder: Any = load_image_encoder if family.modality == "image" else load_text_encoder
    encoder = load_encoder(spec, "cpu")
    try:
        tower = tower_of(encoder)
    except EncoderError:
        with pytest.raises(EncoderError, match="cannot be"):
            shape_tower(spec)
        return
    # A plan knows no pooling of a text repository: only the model's own parameters can differ.
    counted = {part.name: part.count for part in shape_tower(spec).parts()}
    trained = {part.name: part.count for part in tower.parts()}
    assert counted == trained


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapped_text_tower_is_counted_and_trained_as_any_other(
    tmp_path: Path,
    name: str,
) -> None:
    pytest.importorskip("open_clip")
    FAMILIES[name].build(tmp_path)
    spec = spec_of(FAMILIES[name], tmp_path)
    encoder = load_text_encoder(spec, "cpu")
    tower = tower_of(encoder)
    assert {part.name for part in shape_tower(spec).parts()} >= {
        part.name for part in tower.parts() if "[cls]" not in part.name
    }
    # The model finds its padding by the token, wherever it stands.
    captions = (*CAPTIONS, "a <pad> b [PAD] c")
    with torch.no_grad():
        pooled = tower(*encoder.pad(encoder.tokenize(captions).ids))
    assert_close(pooled, encoder.encode(captions))


def test_cuts_of_sentence_transformers_are_those_of_its_transformer(tmp_path: Path) -> None:
    """Also within a prompt that the pooling leaves out."""
    pytest.importorskip("sentence_transformers")
    for name, n_left_out in (("st: mean", 0), ("st: a prompt that is not pooled", 11)):
        folder = tmp_path / name.replace(": ", "-")
        folder.mkdir()
        FAMILIES[name].build(folder)
        spec = spec_of(FAMILIES[name], folder)
        whole = load_text_encoder(spec, "cpu")
        ids, mask = whole.pad(whole.tokenize(CAPTIONS).ids)
        module: Any = whole.module[0].auto_model
        with torch.no_grad():
            output = module(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        pooled_mask = mask.clone()
        pooled_mask[:, :n_left_out] = 0
        for layer, state in ((1, output.hidden_states[1]), (None, output.last_hidden_state)):
            tokens = replace(spec, pooling="tokens", layer=layer)
            mean = replace(spec, pooling="mean", layer=layer)
            encoders = load_text_encoders([tokens, mean], "cpu")
            assert_close(encoders[0].encode_ids(whole.tokenize(CAPTIONS).ids), state)
            assert_close(encoders[1].encode(CAPTIONS), pool_tokens(state, pooled_mask, "mean"))
            assert encoders[1].fingerprint != whole.fingerprint


def test_tokens_of_each_patch_are_not_taken_for_those_of_the_image(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("tnt_s_patch16_224", pretrained=False, num_classes=3, depth=2)
    save_for_hf(model, tmp_path, model_args={"depth": 2}, safe_serialization=True)
    spec = parse_encoder(f"timm:{tmp_path}", "image")
    with pytest.raises(EncoderError, match="block 1 of TNT gives no tokens"):
        load(spec, "mean", 1)


def test_before_the_class_token_there_is_none(tmp_path: Path) -> None:
    """CaiT adds its class token after all blocks."""
    FAMILIES["timm: cait"].build(tmp_path)
    spec = spec_of(FAMILIES["timm: cait"], tmp_path)
    with pytest.raises(EncoderError, match="has no CLS token"):
        load(spec, "cls", 1)
    assert load(spec, "tokens", 1).row_shape == (16, 32)
    assert load_image_encoder(replace(spec, pooling="tokens"), "cpu").row_shape == (17, 32)


@pytest.mark.parametrize(
    ("model", "processor"),
    [
        (
            lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8])),
            lambda: hf.ViTImageProcessor(size={"height": 64, "width": 64}),
        ),
        (
            lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**VISION)),
            lambda: hf.ViTImageProcessor(size={"height": 32, "width": 32}),
        ),
    ],
    ids=["convnext", "aimv2"],
)
def test_what_trains_needs_a_module_map(tmp_path: Path, model: Any, processor: Any) -> None:
    build_image(model, processor)(tmp_path)
    spec = parse_encoder(f"hf:{tmp_path}", "image")
    tower = shape_tower(spec, is_frozen=True)
    parts = tower.parts()
    assert {part.section for part in parts} == {"whole"}
    assert sum(part.count for part in parts) == sum(p.numel() for p in tower.parameters())
    with pytest.raises(EncoderError, match=r"cannot be trained.*used frozen only.*supported are"):
        shape_tower(spec)


def test_a_frozen_decoder_gives_its_tokens(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**DECODER, max_position_embeddings=256)
    build_text(lambda: hf.LlamaModel(config), "llama")(tmp_path)
    tower = shape_tower(parse_encoder(f"hf:{tmp_path}", "text"), is_frozen=True)
    ids = torch.zeros(1, 5, dtype=torch.long, device="meta")
    assert tower.run_to("pooled", ids, torch.ones_like(ids)).shape == (1, 32)
    assert tower.run_to(tower.n_blocks, ids, torch.ones_like(ids)).shape == (1, 5, 32)
