"""Adapters: where they act, how they begin, and what cannot be put in."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from small_towers import (
    SMALL_IMAGES,
    SMALL_TEXTS,
    pictures,
    sentences,
    small_bert,
    small_t5,
    small_tower,
    small_vit,
)
from torch import Tensor, nn

from apecache.encoders.tower import Tower, build_tower
from apecache.errors import RecipeError
from apecache.models.adapters import Adapter, insert_adapters
from apecache.models.freezing import freeze_towers
from apecache.recipes.sections import AdapterSpec, Rule, TowersSpec

TOWERS: dict[str, Callable[[], Tower]] = {
    "vit": small_vit,
    "bert": small_bert,
    "t5": small_t5,
    **{name: partial(small_tower, name) for name in (*SMALL_IMAGES, *SMALL_TEXTS)},
}
KINDS = {
    "layerwise": AdapterSpec(kind="layerwise"),
    "deep": AdapterSpec(kind="deep"),
    "lora": AdapterSpec(kind="lora", rank=2, targets=("attention", "mlp")),
}
BOTH = pytest.mark.parametrize("kind", KINDS)
EACH = pytest.mark.parametrize("name", TOWERS)


def inputs_of(tower: Tower) -> tuple[Tensor, Tensor | None]:
    return (pictures(), None) if tower.modality == "image" else sentences()


def run(tower: Tower) -> Tensor:
    with torch.no_grad():
        return tower(*inputs_of(tower))


def disturb(tower: Tower) -> None:
    """Adapters away from where they begin (LoRA begins with no effect)."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in tower.adapters.parameters():
            parameter += 0.3 * torch.randn_like(parameter)


@EACH
@BOTH
def test_adapters_act_and_train_and_leave_the_module_alone(name: str, kind: str) -> None:
    tower = TOWERS[name]()
    plain = run(tower)
    weights = copy.deepcopy(tower.module.state_dict())
    insert_adapters(tower, KINDS[kind])
    disturb(tower)
    assert (run(tower) - plain).abs().max() > 1e-2
    freeze_towers([(tower, nn.Identity())], TowersSpec(rules=(Rule(part="adapters"),)))
    tower(*inputs_of(tower)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.adapters.parameters())
    assert all(p.grad is None for p in tower.module.parameters())
    after = tower.module.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)


@BOTH
def test_the_cut_below_adapters(kind: str) -> None:
    tower = small_vit()
    insert_adapters(tower, KINDS[kind])
    disturb(tower)
    for cut in range(4):
        with torch.no_grad():
            torch.testing.assert_close(
                tower.forward_from(cut, tower.run_to(cut, pictures())),
                run(tower),
            )


def test_vision_transformers_adapt_inside_the_branch_before_the_norm() -> None:
    tower = small_vit()
    insert_adapters(tower, KINDS["layerwise"])
    disturb(tower)
    block = small_vit().module.blocks[1]
    first, second = tower.adapters["layerwise"][1]
    x = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = tower.module.blocks[1](x)
        half = x + block.attn(block.norm1(first(x)))
        expected = half + block.mlp(block.norm2(second(half)))
    torch.testing.assert_close(found, expected)


def test_bert_adapts_after_dense_and_dropout_before_the_norm() -> None:
    tower = small_bert()
    insert_adapters(tower, KINDS["layerwise"])
    disturb(tower)
    layer = small_bert().module.encoder.layer[1]
    first, second = tower.adapters["layerwise"][1]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = tower.module.encoder.layer[1](x)
        attended = layer.attention.self(x)[0]
        half = layer.attention.output.LayerNorm(first(layer.attention.output.dense(attended)) + x)
        expected = layer.output.LayerNorm(
            second(layer.output.dense(layer.intermediate(half))) + half
        )
    torch.testing.assert_close(found, expected)


def test_deep_adapters_follow_the_last_block() -> None:
    image = small_vit()
    text = small_bert()
    for tower in (image, text):
        insert_adapters(tower, KINDS["deep"])
    with torch.no_grad():
        below = image.run_to(3, pictures())
        torch.testing.assert_close(
            run(image),
            image.module.norm(image.adapters["deep"](below))[:, 0],
        )
        below = text.run_to(3, *sentences())
        mask = (1 - sentences()[1][:, None, None]) * -1e4
        torch.testing.assert_close(run(text), text.adapters["deep"](below, mask)[:, 0])


def test_a_layerwise_adapter_is_a_residual_bottleneck() -> None:
    adapter = Adapter(8, 4)
    x = torch.randn(3, 8)
    expected = x + nn.functional.linear(
        nn.functional.gelu(nn.functional.linear(x, adapter.down.weight, adapter.down.bias)),
        adapter.up.weight,
        adapter.up.bias,
    )
    torch.testing.assert_close(adapter(x), expected)


def test_layerwise_adapters_begin_as_published() -> None:
    torch.manual_seed(0)
    adapter = Adapter(256, 4)
    for layer in (adapter.down, adapter.up):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        # Not truncated at two deviations: 4.6 % of a normal distribution lie beyond.
        assert float((layer.weight.abs() > 0.04).float().mean()) == pytest.approx(0.0455, abs=0.01)
        assert layer.bias.abs().sum() == 0
    assert adapter.down.out_features == 64
    x = torch.randn(3, 256)
    assert not torch.equal(adapter(x), x)


def test_deep_adapters_begin_at_random() -> None:
    tower = small_vit(embed_dim=64, init_values=1e-5)
    insert_adapters(tower, KINDS["deep"])
    made = tower.adapters["deep"]
    last = tower.module.blocks[-1]
    assert made.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(made.attn.qkv.weight, last.attn.qkv.weight)
    assert torch.equal(made.norm1.weight, torch.ones(64))
    assert torch.equal(made.ls1.gamma, torch.ones(64))
    assert made.mlp.fc1.bias.abs().sum() == 0


@EACH
def test_lora_begins_without_effect_and_equals_merged_weights(name: str) -> None:
    tower = TOWERS[name]()
    plain = run(tower)
    insert_adapters(tower, KINDS["lora"])
    assert torch.equal(run(tower), plain)
    disturb(tower)
    adapted = run(tower)
    merged = merge_lora(tower, into=TOWERS[name]())
    effect = (adapted - plain).abs().max()
    assert effect > 1e-2
    # One product with the merged weight rounds unlike three products, by how much depends on the
    # processor.
    assert (run(merged) - adapted).abs().max() < 1e-3 * effect


@torch.no_grad()
def merge_lora(tower: Tower, into: Tower) -> Tower:
    """Add alpha / rank * B A to the weights of a tower without adapters (LoRA, section 4.1)."""
    spec = KINDS["lora"]
    for block, updates in zip(into.blocks, tower.adapters["lora"], strict=True):
        for key, low_rank in updates.items():
            weight = block.get_parameter(f"{key.replace('/', '.')}.weight")
            weight.add_(spec.alpha / spec.rank * low_rank.b @ low_rank.a)
    return into


def test_lora_counts_and_targets() -> None:
    tower = small_bert()
    insert_adapters(tower, AdapterSpec(kind="lora", rank=4))
    assert sum(p.numel() for p in tower.adapters.parameters()) == 3 * 4 * (
        16 * 4 + 16 * 4
    )  # query, key, value, output
    assert not any("intermediate" in name for name, _ in tower.adapters.named_parameters())


def in_and_out(*layers: tuple[int, int]) -> int:
    """The numbers that LoRA of rank 1 adds to linear layers of these widths."""
    return sum(n_in + n_out for n_in, n_out in layers)


PLAIN = (in_and_out(*[(16, 16)] * 4), in_and_out((16, 32), (32, 16)))
LOW_RANK = {
    "vit": (in_and_out((16, 48), (16, 16)), in_and_out((16, 64), (64, 16))),
    "bert": PLAIN,
    "dinov3": PLAIN,
    "siglip": PLAIN,
    "clip": PLAIN,
    "mpnet": PLAIN,
    "distilbert": PLAIN,
    # Queries, keys and values are one layer, and so are the gate and what it gates.
    "modernbert": (in_and_out((16, 48), (16, 16)), in_and_out((16, 64), (32, 16))),
    # Two heads of queries share the keys and values of one.
    "qwen3": (
        in_and_out((16, 16), (16, 8), (16, 8), (16, 16)),
        in_and_out((16, 32), (16, 32), (32, 16)),
    ),
}
"""Of one block: attention, and feed-forward."""


@pytest.mark.parametrize("name", LOW_RANK)
def test_lora_has_the_numbers_of_its_formula_in_every_family(name: str) -> None:
    for target, per_block in zip(("attention", "mlp"), LOW_RANK[name], strict=True):
        tower = TOWERS[name]()
        insert_adapters(tower, AdapterSpec(kind="lora", rank=2, targets=(target,)))
        assert sum(p.numel() for p in tower.adapters.parameters()) == 3 * 2 * per_block


@EACH
def test_other_adapters_have_the_numbers_of_their_formulas_in_every_family(name: str) -> None:
    layerwise = TOWERS[name]()
    insert_adapters(layerwise, AdapterSpec(kind="layerwise", reduction=4))
    one_adapter = 16 * 4 + 4 + 4 * 16 + 16
    assert sum(p.numel() for p in layerwise.adapters.parameters()) == 3 * 2 * one_adapter
    deep = TOWERS[name]()
    insert_adapters(deep, KINDS["deep"])
    counts = {part.depth: 0 for part in deep.parts()}
    for part in deep.parts():
        if part.section in ("block", "adapter"):
            counts[part.depth] += part.count
    # The copy of the last block lies above all blocks.
    assert counts[3] == counts[2]


def test_adapters_take_the_mode_of_the_module() -> None:
    """A module that was loaded for evaluation must not drop out at random."""
    spec = AdapterSpec(kind="lora", rank=2, dropout=0.9)
    for training in (False, True):
        module = small_vit().module.train(training)
        tower = build_tower(module, "image")
        insert_adapters(tower, spec)
        disturb(tower)
        assert {part.training for part in tower.adapters["lora"].modules()} == {training}
        assert torch.equal(run(tower), run(tower)) is not training


def test_what_cannot_be_put_in() -> None:
    tower = small_vit()
    insert_adapters(tower, KINDS["deep"])
    with pytest.raises(RecipeError, match="has adapters already"):
        insert_adapters(tower, KINDS["layerwise"])
    with pytest.raises(RecipeError, match="LoRA of rank 17: a layer is only 16 x 48"):
        insert_adapters(small_vit(), AdapterSpec(kind="lora", rank=17))
    beit = timm.create_model(
        "beit_base_patch16_224",
        pretrained=False,
        embed_dim=16,
        num_heads=2,
        depth=1,
        img_size=16,
        patch_size=4,
    )
    with pytest.raises(RecipeError, match="past their layer"):
        insert_adapters(build_tower(beit, "image"), AdapterSpec(kind="lora", rank=2))
    insert_adapters(build_tower(beit, "image"), AdapterSpec(kind="lora", rank=2, targets=("mlp",)))
