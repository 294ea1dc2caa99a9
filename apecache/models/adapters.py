"""Put adapters, small trainable modules, into a loaded tower.

They are called by hooks, so that the library's model is not changed. They live in `Tower.adapters`.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apecache.device import CPU
from apecache.encoders.tower import Tower
from apecache.errors import RecipeError
from apecache.recipes.sections import AdapterSpec

STD = 0.02


class Adapter(nn.Module):
    """Compute x + up(gelu(down(x))), [..., dim] -> [..., dim].

    Weights are N(0, 0.02) and biases 0. It is not the identity at the start (LilT, section 2.2, and
    its published code, whose truncation for vision transformers is at 2, a hundred deviations).
    """

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        inner_dim = max(1, dim // reduction)
        self.down = nn.Linear(dim, inner_dim)
        self.up = nn.Linear(inner_dim, dim)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.gelu(self.down(x))
        adapted: Tensor = x + self.up(inner)
        return adapted


class LowRank(nn.Module):
    """Compute what is added to a linear layer's output: alpha / rank * B A x (LoRA, section 4.1).

    B is zero at the start, so that training begins with the layer's own output.
    """

    def __init__(self, layer: nn.Linear, spec: AdapterSpec) -> None:
        super().__init__()
        if spec.rank > min(layer.in_features, layer.out_features):
            raise RecipeError(
                f"LoRA of rank {spec.rank}: a layer is only {layer.in_features} x "
                f"{layer.out_features}; lower rank"
            )
        device = _drawing_device(layer.weight)
        self.scale = spec.alpha / spec.rank
        self.dropout = nn.Dropout(spec.dropout)
        self.a = nn.Parameter(torch.empty(spec.rank, layer.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(layer.out_features, spec.rank, device=device))
        # The same initialization as nn.Linear's weight, as in LoRA's published code.
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        low_rank = nn.functional.linear(self.dropout(x), self.a)
        return nn.functional.linear(low_rank, self.b) * self.scale


def insert_adapters(tower: Tower, spec: AdapterSpec) -> None:
    """Put new adapters into a tower that has none, on its device.

    Weights are drawn from torch's generator. `layerwise` follows LilT, section 2.2. In blocks that
    begin with a norm (ViT, T5) an adapter stands in each branch before the norm:
    x + attn(norm(adapter(x))). In BERT's it stands after the dense layer and dropout that end a
    branch: norm(adapter(dropout(dense(h))) + residual). T5 is our own reading: the paper has none.

    Raises:
        RecipeError: the tower has adapters already, or LoRA does not fit it.
    """
    if len(tower.adapters):
        raise RecipeError("the tower has adapters already; load the tower again")
    device = next(tower.module.parameters()).device
    match spec.kind:
        case "layerwise":
            adapters: nn.Module = _layerwise(tower, spec)
        case "deep":
            adapters = _deep(tower)
        case "lora":
            adapters = nn.ModuleList(_low_rank(tower, block, spec) for block in tower.blocks)
    tower.adapters[spec.kind] = adapters.to(device).train(tower.training)
    _add_hooks(tower, spec)


def _drawing_device(parameter: Tensor) -> torch.device:
    """Return where new weights are drawn: on the CPU, so that a seed gives the same everywhere.

    On the meta device nothing is drawn.
    """
    return parameter.device if parameter.is_meta else CPU


# --- the kinds ------------------------------------------------------------------------------------


def _layerwise(tower: Tower, spec: AdapterSpec) -> nn.ModuleList:
    """Build a pair of adapters for each block, one for each of its branches."""
    pairs = nn.ModuleList()
    with torch.device(_drawing_device(next(tower.module.parameters()))):
        for _ in range(tower.n_blocks):
            first = Adapter(tower.dim, spec.reduction)
            second = Adapter(tower.dim, spec.reduction)
            pairs.append(nn.ModuleList((first, second)))
    return pairs


def _deep(tower: Tower) -> nn.Module:
    """Build a copy of the last block with new weights, to follow that block before the final norm.

    Matrices are N(0, 0.02) as LilT draws them, norms and layer scales 1, biases 0.
    """
    # float32: what trains is not kept in the tower's smaller dtype.
    block = copy.deepcopy(tower.blocks[-1]).float()
    block = block.to(_drawing_device(next(block.parameters())))
    for name, parameter in block.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=STD)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return block.requires_grad_(True)


def _low_rank(tower: Tower, block: nn.Module, spec: AdapterSpec) -> nn.ModuleDict:
    """Build a low-rank update for each targeted linear layer of a block, by its name."""
    targeted: dict[str, nn.Linear] = {}
    for name, layer in block.named_modules():
        if isinstance(layer, nn.Linear) and _target(name) in spec.targets:
            targeted[name] = layer
    missing = set(spec.targets) - {_target(name) for name in targeted}
    if missing:
        raise RecipeError(
            f"LoRA: {type(block).__name__} has no linear layers of {', '.join(sorted(missing))}; "
            "use other targets"
        )
    for name in targeted:
        owner = block.get_submodule(name.rpartition(".")[0])
        is_packed = isinstance(owner, nn.MultiheadAttention)
        if is_packed or getattr(owner, "q_bias", None) is not None:
            raise RecipeError(
                f"{type(owner).__name__} calls its query, key and value weights past their layer "
                "(timm's BEiT and EVA, open_clip); use targets = ['mlp']"
            )
    updates = {name.replace(".", "/"): LowRank(layer, spec) for name, layer in targeted.items()}
    return nn.ModuleDict(updates)


def _target(name: str) -> str:
    """Return `attention` or `mlp`: where a linear layer belongs, by the libraries' names."""
    beginnings = ("attn.", "attention.", "self_attn.")
    is_attention = name.startswith(beginnings) or ".SelfAttention." in f".{name}."
    return "attention" if is_attention else "mlp"


# --- hooks ----------------------------------------------------------------------------------------


def _add_hooks(tower: Tower, spec: AdapterSpec) -> None:
    """Register the hooks that call the tower's adapters."""
    if spec.kind == "deep":
        return  # the tower itself calls it
    block_adapters: Any = tower.adapters[spec.kind]
    for block, adapters in zip(tower.blocks, block_adapters, strict=True):
        if spec.kind == "layerwise":
            _adapt(tower, block, adapters)
        else:
            _add_updates(block, adapters)


def _adapt(tower: Tower, block: nn.Module, adapters: Any) -> None:
    """Call one adapter in each branch of a block: after the branch's end, or before its norm."""
    if tower.module_map.ends is not None:
        for name, adapter in zip(tower.module_map.ends, adapters, strict=True):
            block.get_submodule(name).register_forward_hook(_after(adapter))
        return
    for name, adapter in zip(tower.module_map.norms, adapters, strict=True):
        block.get_submodule(name).register_forward_pre_hook(_before(adapter))


def _add_updates(block: nn.Module, updates: Any) -> None:
    """Add each low-rank update to the output of its linear layer."""
    for key, update in updates.items():
        # Keys of an nn.ModuleDict cannot hold dots.
        layer = block.get_submodule(key.replace("/", "."))
        layer.register_forward_hook(_added(update))


def _before(adapter: nn.Module) -> Callable[..., Any]:
    return lambda _module, inputs: (adapter(inputs[0]), *inputs[1:])


def _after(adapter: nn.Module) -> Callable[..., Any]:
    return lambda _module, _inputs, output: adapter(output)


def _added(update: nn.Module) -> Callable[..., Any]:
    return lambda _module, inputs, output: output + update(inputs[0]).to(output.dtype)
