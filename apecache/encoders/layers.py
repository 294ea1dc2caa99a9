"""Capture the tokens after any block of a model, during the library's own forward pass.

No architecture is known here: the blocks are the list of modules of one class that has the most
parameters.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apecache.encoders.encoder import State
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError

RIVAL_SHARE = 0.05
"""A second list with more than this share of the parameters in all lists makes the choice
ambiguous."""


CLASS_ATTENTION = ("blocks_token_only", "cls_attn_blocks")
"""Lists that only change the class token, after all blocks (CaiT, XCiT)."""


def resolve_layer(module: nn.Module, spec: EncoderSpec) -> State:
    """Return the number of blocks below the spec's cut; `end` if it names no layer.

    Raises:
        EncoderError: a model without a single list of blocks, or one with fewer blocks.
    """
    if spec.layer is None:
        return "end"
    n_blocks = len(require_blocks(module, spec))
    # There are n_blocks + 1 cuts, so -1 is the cut after the last block.
    layer = spec.layer if spec.layer >= 0 else n_blocks + 1 + spec.layer
    if not 0 <= layer <= n_blocks:
        raise EncoderError(
            f"encoder {spec} has {n_blocks} blocks: the layer is 0 to {n_blocks}, or negative to "
            "count from the end (-1: after the last block)"
        )
    return layer


def require_blocks(module: nn.Module, spec: EncoderSpec) -> Sequence[nn.Module]:
    """Return the blocks of a model, shallowest first; of a hierarchical one, its stages.

    Raises:
        EncoderError: the model has no single list of blocks.
    """
    names = find_blocks(module)
    if len(names) != 1:
        lists = f"several lists of blocks ({', '.join(names)})" if names else "no list of blocks"
        raise EncoderError(
            f"encoder {spec}: {type(module).__name__} has {lists}, so its layers have no numbers; "
            "remove @LAYER"
        )
    blocks: Any = module.get_submodule(names[0])
    n_layers = getattr(getattr(module, "config", None), "num_hidden_layers", len(blocks))
    if n_layers != len(blocks):
        # ALBERT shares one block across all layers.
        raise EncoderError(
            f"encoder {spec}: {type(module).__name__} has {len(blocks)} blocks for {n_layers} "
            "layers, so its layers have no numbers; remove @LAYER"
        )
    return list(blocks)


def find_blocks(module: nn.Module) -> list[str]:
    """Return the names of the lists of blocks that a model runs, the largest one first.

    They are lists of modules of one class that lie in no other such list.
    """
    parameters_of_list: dict[str, int] = {}
    for name, submodule in module.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in parameters_of_list)
        if not is_inside and _is_list_of_blocks(submodule):
            parameters_of_list[name] = _count(submodule)
    # Not of all parameters: a table of tokens may be larger than all blocks.
    total = sum(parameters_of_list.values())
    large = [
        name
        for name, size in parameters_of_list.items()
        if size > RIVAL_SHARE * total and name not in CLASS_ATTENTION
    ]
    return sorted(large, key=lambda name: -parameters_of_list[name])


def _is_list_of_blocks(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not len(module):
        return False
    classes = {type(child) for child in module}
    # A bare list has no forward pass, and a leaf (a convolution) is no block.
    is_callable = not classes & {nn.ModuleList, nn.ModuleDict}
    return len(classes) == 1 and is_callable and all(any(child.children()) for child in module)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def caught(
    module: nn.Module,
    spec: EncoderSpec,
    states: Collection[State],
    run: Callable[[], Any],
    n_inputs: int | None = None,
) -> tuple[Any, dict[State, Tensor]]:
    """Run a forward pass and capture the tokens after the requested blocks.

    Args:
        states: the requested ones; `end` and `own` are left to the caller.
        run: one forward pass of `module`.
        n_inputs: size of the batch, if known: tokens have one row for each input.

    Returns:
        What `run` returns, and for each numbered state the tokens [n, length, dim], or a feature
        map of four dimensions.

    Raises:
        EncoderError: the first block runs more than once or never, or a block gives no tokens.
    """
    tokens_by_state: dict[State, Tensor] = {}
    layers = [state for state in states if isinstance(state, int)]
    if not layers:
        return run(), tokens_by_state
    blocks = require_blocks(module, spec)
    run_counts = [0]
    hooks = [_catch(blocks, layer, tokens_by_state) for layer in layers]
    hooks.append(blocks[0].register_forward_hook(lambda *_: _add_one(run_counts)))
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    if run_counts != [1]:
        raise EncoderError(
            f"encoder {spec}: {type(module).__name__} runs its first block {run_counts[0]} times, "
            "so its layers have no numbers; remove @LAYER"
        )
    for layer in layers:
        state = tokens_by_state.get(layer)
        if not _is_state(state, n_inputs):
            raise EncoderError(
                f"encoder {spec}: block {layer} of {type(module).__name__} gives no tokens; leave "
                "the layer out"
            )
    return output, tokens_by_state


def _is_state(state: Any, n_inputs: int | None) -> bool:
    """Tell whether a block's output is tokens [n, length, dim] or a map of four dimensions."""
    if not isinstance(state, Tensor) or state.ndim not in (3, 4):
        return False
    # Some blocks (TNT) begin with tokens within each patch, which have more rows.
    return n_inputs is None or len(state) == n_inputs


def _add_one(run_counts: list[int]) -> None:
    run_counts[0] += 1


def _catch(blocks: Sequence[nn.Module], layer: int, tokens_by_state: dict[State, Tensor]) -> Any:
    """Register the hook that puts the tokens after `layer` blocks into `tokens_by_state`."""

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tokens_by_state[0] = arguments[0] if arguments else keywords["hidden_states"]

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        tokens_by_state[layer] = output[0] if isinstance(output, tuple) else output

    # Layer 0 has no block below it: its tokens are what the first block takes.
    if layer == 0:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[layer - 1].register_forward_hook(after)


def flatten_map(state: Tensor, channels_last: bool = False) -> Tensor:
    """Return the positions of a feature map as tokens.

    Args:
        state: [n, dim, height, width], or [n, height, width, dim] if `channels_last`.

    Returns:
        [n, height * width, dim].
    """
    feature_map = state if channels_last else state.permute(0, 2, 3, 1)
    return torch.flatten(feature_map, 1, 2)
