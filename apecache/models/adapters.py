"""Adapters: small trainable modules within a loaded tower, put in by hooks, so that the library's
model stays as it is.

They live in `Tower.adapters`, are saved apart from the tower and can be taken out again.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from apecache.encoders.tower import Tower
from apecache.errors import RecipeError, RunError
from apecache.recipes.sections import AdapterSpec
from apecache.storage.atomic import replace_tensors

FORMAT_VERSION = 1
STD = 0.02


class Adapter(nn.Module):
    """x + up(gelu(down(x))), [..., dim] -> [..., dim]. Weights N(0, 0.02), truncated at two
    deviations in vision transformers, biases 0: not the identity at the start (LilT, section 2.2,
    and its published code)."""

    def __init__(self, dim: int, reduction: int, truncated: bool) -> None:
        super().__init__()
        self.down = nn.Linear(dim, max(1, dim // reduction))
        self.up = nn.Linear(max(1, dim // reduction), dim)
        for layer in (self.down, self.up):
            _draw(layer.weight, truncated)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        grown: Tensor = x + self.up(nn.functional.gelu(self.down(x)))
        return grown


class LowRank(nn.Module):
    """What is added to a linear layer's output: alpha / rank * B A x, B zero at the start (LoRA,
    section 4.1)."""

    def __init__(self, layer: nn.Linear, spec: AdapterSpec) -> None:
        super().__init__()
        if spec.rank > min(layer.in_features, layer.out_features):
            raise RecipeError(
                f"LoRA of rank {spec.rank}: a layer is only {layer.in_features} x "
                f"{layer.out_features}; lower rank"
            )
        device = layer.weight.device
        self.scale = spec.alpha / spec.rank
        self.dropout = nn.Dropout(spec.dropout)
        self.a = nn.Parameter(torch.empty(spec.rank, layer.in_features, device=device))
        self.b = nn.Parameter(torch.zeros(layer.out_features, spec.rank, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return (
            nn.functional.linear(nn.functional.linear(self.dropout(x), self.a), self.b) * self.scale
        )

    def update(self) -> Tensor:
        """[out, in]: what the layer's weight would be changed by."""
        return self.b @ self.a * self.scale


def insert_adapters(tower: Tower, spec: AdapterSpec) -> None:
    """Put new adapters into a tower that has none, on its device; draws from torch's generator.

    `layerwise`: within blocks that begin with a norm (ViT, T5) in each branch before the norm, x +
    attn(norm(adapter(x))); in BERT's after the dense layer and dropout that end a branch,
    norm(adapter(dropout(dense(h))) + residual) (LilT, section 2.2). T5 is our own reading: the
    paper has none.

    Raises:
        RecipeError: there are adapters already; LoRA does not fit the tower.
    """
    if len(tower.adapters):
        raise RecipeError("the tower has adapters already; remove_adapters first")
    where = next(tower.module.parameters()).device
    match spec.kind:
        case "layerwise":
            made: nn.Module = _layerwise(tower, spec)
        case "deep":
            made = _deep(tower)
        case "lora":
            made = nn.ModuleList(_low_rank(tower, block, spec) for block in tower.blocks)
    tower.adapters[spec.kind] = made.to(where).train(tower.training)
    tower.adapter_spec = spec
    tower.adapter_hooks = _hooks(tower, spec)


def remove_adapters(tower: Tower) -> None:
    """Take the adapters out: the tower computes what the library's model does."""
    for hook in tower.adapter_hooks:
        hook.remove()
    tower.adapters.clear()
    tower.adapter_hooks = []
    tower.adapter_spec = None


@torch.no_grad()
def merge_lora(tower: Tower) -> None:
    """Add the low-rank updates to the weights and take the adapters out: the same outputs without
    extra work.

    Raises:
        RecipeError: the tower has no LoRA; the other adapters are no linear maps and cannot be
            merged.
    """
    if "lora" not in tower.adapters:
        found = ", ".join(tower.adapters) or "no"
        raise RecipeError(f"only LoRA can be merged into weights; the tower has {found} adapters")
    for block, updates in zip(tower.blocks, _blocks_of(tower, "lora"), strict=True):
        for name, update in updates.items():
            block.get_parameter(f"{_layer_name(name)}.weight").add_(update.update())
    remove_adapters(tower)


def save_adapters(tower: Tower, path: Path) -> None:
    """Write the adapters alone: safetensors, their spec in the header. Raises RecipeError if there
    are none."""
    if tower.adapter_spec is None:
        raise RecipeError("the tower has no adapters to save; insert_adapters first")
    header = {"format": str(FORMAT_VERSION), "spec": tower.adapter_spec.model_dump_json()}
    replace_tensors(path, tower.adapters.state_dict(), header)


def load_adapters(tower: Tower, path: Path) -> None:
    """Put saved adapters into a tower that has none.

    Raises:
        RunError: not readable, of a newer format, or not for a tower of this shape; the tower has
            none then.
    """
    spec, tensors = _read(path)
    with torch.random.fork_rng(devices=[]):
        insert_adapters(tower, spec)
    wanted = tower.adapters.state_dict()
    wrong = sorted(
        n for n in wanted.keys() | tensors.keys() if _shape(wanted.get(n)) != _shape(tensors.get(n))
    )
    if wrong:
        remove_adapters(tower)
        raise RunError(
            f"{path} does not fit this tower: {', '.join(wrong[:3])}; it was saved from "
            "another architecture"
        )
    tower.adapters.load_state_dict(tensors)


def _read(path: Path) -> tuple[AdapterSpec, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != str(FORMAT_VERSION):
            raise RunError(
                f"{path} has format {header['format']}; this apecache reads {FORMAT_VERSION}: "
                "upgrade"
            )
        return AdapterSpec.model_validate(json.loads(header["spec"])), tensors
    except (OSError, SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"{path} holds no adapters of apecache ({reason}); give a file of save_adapters"
        ) from None


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


# --- the kinds ------------------------------------------------------------------------------------


def _layerwise(tower: Tower, spec: AdapterSpec) -> nn.ModuleList:
    truncated = tower.modality == "image"
    with torch.device(next(tower.module.parameters()).device):
        pairs = (
            nn.ModuleList(Adapter(tower.dim, spec.reduction, truncated) for _ in range(2))
            for _ in range(tower.n_blocks)
        )
        return nn.ModuleList(pairs)


def _deep(tower: Tower) -> nn.Module:
    """A copy of the last block with new weights: matrices N(0, 0.02) as LilT draws them, norms and
    layer scales 1, biases 0. It follows the last block, before the final norm where there is
    one."""
    block = copy.deepcopy(tower.blocks[-1]).float()
    for name, parameter in block.named_parameters():
        with torch.no_grad():
            if parameter.ndim >= 2:
                _draw(parameter, truncated=tower.modality == "image")
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return block.requires_grad_(True)


def _low_rank(tower: Tower, block: nn.Module, spec: AdapterSpec) -> nn.ModuleDict:
    layers = [
        (name, layer) for name, layer in block.named_modules() if isinstance(layer, nn.Linear)
    ]
    chosen = [(name, layer) for name, layer in layers if _target(name) in spec.targets]
    if any(
        getattr(block.get_submodule(name.rpartition(".")[0]), "q_bias", None) is not None
        for name, _ in chosen
    ):
        raise RecipeError(
            "timm's BEiT calls its query, key and value weights past their layer; use targets "
            "= ['mlp']"
        )
    return nn.ModuleDict({name.replace(".", "/"): LowRank(layer, spec) for name, layer in chosen})


def _target(name: str) -> str:
    """`attention` or `mlp`: where a linear layer of a block belongs, by the libraries' names."""
    attention = name.startswith(("attn.", "attention.")) or ".SelfAttention." in f".{name}."
    return "attention" if attention else "mlp"


def _layer_name(key: str) -> str:
    """Keys of module dictionaries cannot hold dots."""
    return key.replace("/", ".")


def _draw(weight: Tensor, truncated: bool) -> None:
    if truncated:
        nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD)
    else:
        nn.init.normal_(weight, std=STD)


# --- hooks ----------------------------------------------------------------------------------------


def _hooks(tower: Tower, spec: AdapterSpec) -> list[RemovableHandle]:
    match spec.kind:
        case "deep":
            return []
        case "layerwise":
            pairs = zip(tower.blocks, _blocks_of(tower, "layerwise"), strict=True)
            return [hook for block, adapters in pairs for hook in _adapt(tower, block, adapters)]
        case "lora":
            pairs = zip(tower.blocks, _blocks_of(tower, "lora"), strict=True)
            return [
                block.get_submodule(_layer_name(name)).register_forward_hook(_added(update))
                for block, updates in pairs
                for name, update in updates.items()
            ]


def _adapt(tower: Tower, block: nn.Module, adapters: Any) -> list[RemovableHandle]:
    if tower.anatomy.ends is not None:
        ends = (block.get_submodule(name) for name in tower.anatomy.ends)
        return [
            end.register_forward_hook(_after(adapter))
            for end, adapter in zip(ends, adapters, strict=True)
        ]
    norms = (block.get_submodule(name) for name in tower.anatomy.norms)
    return [
        norm.register_forward_pre_hook(_before(adapter))
        for norm, adapter in zip(norms, adapters, strict=True)
    ]


def _before(adapter: nn.Module) -> Any:
    return lambda _module, inputs: (adapter(inputs[0]), *inputs[1:])


def _after(adapter: nn.Module) -> Any:
    return lambda _module, _inputs, output: adapter(output)


def _added(update: nn.Module) -> Any:
    return lambda _module, inputs, output: output + update(inputs[0]).to(output.dtype)


def _blocks_of(tower: Tower, kind: str) -> Any:
    return tower.adapters[kind]
