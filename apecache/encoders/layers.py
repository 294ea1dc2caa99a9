"""Tokens after any block of a model, caught on their way through the library's own forward pass."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from apecache.encoders.encoder import State
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tower import build_tower
from apecache.errors import EncoderError


def resolve_layer(module: nn.Module, spec: EncoderSpec) -> State:
    """How many blocks lie below the spec's cut; `end` if it names no layer.

    Raises:
        EncoderError: an architecture whose blocks are not known, or not so many blocks.
    """
    if spec.layer is None:
        return "end"
    count = len(_blocks(module, spec))
    layer = spec.layer if spec.layer >= 0 else count + 1 + spec.layer
    if not 0 <= layer <= count:
        raise EncoderError(
            f"encoder {spec} has {count} blocks: a layer is 0 to {count}, or -1 (the last) "
            "backwards"
        )
    return layer


def _blocks(module: nn.Module, spec: EncoderSpec) -> Sequence[nn.Module]:
    return build_tower(module, spec.modality, "mean").blocks


def caught(
    module: nn.Module,
    spec: EncoderSpec,
    states: Collection[State],
    run: Callable[[], Any],
) -> tuple[Any, dict[State, Tensor]]:
    """What `run` returns, and the tokens [n, length, dim] after each of the numbered states."""
    found: dict[State, Tensor] = {}
    layers = [state for state in states if isinstance(state, int)]
    blocks = _blocks(module, spec) if layers else ()
    hooks = [_catch(blocks, layer, found) for layer in layers]
    try:
        return run(), found
    finally:
        for hook in hooks:
            hook.remove()


def _catch(blocks: Sequence[nn.Module], layer: int, found: dict[State, Tensor]) -> Any:
    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[0] = arguments[0] if arguments else named["hidden_states"]

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        found[layer] = output[0] if isinstance(output, tuple) else output

    if layer == 0:
        return blocks[0].register_forward_pre_hook(before, with_kwargs=True)
    return blocks[layer - 1].register_forward_hook(after)
