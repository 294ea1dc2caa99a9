"""Catch the tokens after any block of a model, during the library's own forward pass."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from apecache.encoders.encoder import State
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tower import build_tower
from apecache.errors import EncoderError


def resolve_layer(module: nn.Module, spec: EncoderSpec) -> State:
    """Return the number of blocks below the spec's cut; `end` if it names no layer.

    Raises:
        EncoderError: an architecture whose blocks are not known, or one with fewer blocks.
    """
    if spec.layer is None:
        return "end"
    n_blocks = len(_blocks(module, spec))
    # There are n_blocks + 1 cuts, so -1 is the cut after the last block.
    layer = spec.layer if spec.layer >= 0 else n_blocks + 1 + spec.layer
    if not 0 <= layer <= n_blocks:
        raise EncoderError(
            f"encoder {spec} has {n_blocks} blocks: a layer is 0 to {n_blocks}, or -1 (the last) "
            "backwards"
        )
    return layer


def _blocks(module: nn.Module, spec: EncoderSpec) -> Sequence[nn.Module]:
    # Every architecture has a mean, so this pooling is never refused.
    return build_tower(module, spec.modality, "mean").blocks


def caught(
    module: nn.Module,
    spec: EncoderSpec,
    states: Collection[State],
    run: Callable[[], Any],
) -> tuple[Any, dict[State, Tensor]]:
    """Run a forward pass and catch the numbered states in it.

    Args:
        states: the requested ones; `end` and `own` are left to the caller.
        run: one forward pass of `module`.

    Returns:
        What `run` returns, and for each numbered state the tokens [n, length, dim].
    """
    tokens_by_state: dict[State, Tensor] = {}
    layers = [state for state in states if isinstance(state, int)]
    blocks = _blocks(module, spec) if layers else ()
    hooks = [_catch(blocks, layer, tokens_by_state) for layer in layers]
    try:
        return run(), tokens_by_state
    finally:
        for hook in hooks:
            hook.remove()


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
