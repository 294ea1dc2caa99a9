"""Take the features of an open_clip tower at other places than its output."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from apecache.encoders.encoder import FeatureTap, State, States, pool_tokens
from apecache.encoders.layers import caught, flatten_map, require_blocks, resolve_layer
from apecache.encoders.library_types import LibraryModel
from apecache.encoders.spec import EncoderSpec, no_class_token
from apecache.encoders.tower import Tower, build_tower
from apecache.errors import EncoderError


def open_clip_tap(states: States, tower: LibraryModel, cut: EncoderSpec) -> FeatureTap:
    """Return the features of a cut.

    Raises:
        EncoderError: the tower has no such tokens.
    """
    if cut.pooling == "default":
        return FeatureTap(states=states, state="own", pool=lambda state, _: state)
    layer = resolve_layer(tower, cut)
    view = _view(tower, cut)
    if layer == "end" and view is None:
        raise EncoderError(
            f"encoder {cut}: what {type(tower).__name__} does after its last block is not known; "
            f"leave --{cut.modality}-cut off, or give mean@-1"
        )
    has_class = view is not None and view.has_cls
    if "cls" in cut.pooling and not has_class:
        raise no_class_token(f"encoder {cut}", cut.modality)
    n_prefix = view.n_prefix if view is not None and cut.modality == "image" else 0

    def pool(state: Tensor, mask: Tensor | None) -> Tensor:
        tokens = flatten_map(state) if state.ndim == 4 else state
        return pool_tokens(tokens, mask=mask, pooling=cut.pooling, n_prefix=n_prefix)

    return FeatureTap(states=states, state=layer, pool=pool)


def open_clip_states(
    tower: LibraryModel,
    spec: EncoderSpec,
    run: Callable[[Tensor], Any],
) -> States:
    """Return one forward pass of a tower; all cuts of the tower share it.

    Args:
        run: one forward pass on pixels or token ids.
    """
    view = _view(tower, spec)

    def states(inputs: tuple[Tensor, ...], requested: Collection[State]) -> dict[State, Tensor]:
        layers: list[State] = [state for state in requested if isinstance(state, int)]
        n_blocks = len(require_blocks(tower, spec)) if "end" in requested else 0
        output, tokens_by_state = caught(
            tower,
            spec=spec,
            states=[*layers, n_blocks] if n_blocks else layers,
            run=lambda: run(inputs[0]),
        )
        if "end" in requested:
            assert view is not None
            tokens_by_state["end"] = view.normalize(tokens_by_state[n_blocks])
        tokens_by_state["own"] = first_output(output)
        return tokens_by_state

    return states


def run_trimmed(tower: LibraryModel) -> Callable[[Tensor], Any]:
    """Return the forward pass of a causal tower for texts shorter than its context."""
    mask = tower.attn_mask

    def run(ids: Tensor) -> Any:
        length = ids.shape[1]
        # open_clip cuts the positions to the text's length, but not the causal mask.
        buffers = {"attn_mask": mask[:length, :length]}
        return torch.func.functional_call(tower, buffers, (ids,))

    return run


def require_unpadded(specs: Sequence[EncoderSpec], sees_padding: bool) -> None:
    """Refuse inner cuts of texts whose tokens include padding.

    Raises:
        EncoderError: such a cut.
    """
    for cut in specs:
        if sees_padding and cut.pooling != "default":
            raise EncoderError(
                f"encoder {cut}: its text tower sees its padding, so only its output can be "
                "taken; leave --text-cut off, or take the same model from hf:"
            )


def first_output(output: Any) -> Tensor:
    """Return the embedding; CoCa's towers return their tokens beside it."""
    embedding: Tensor = output[0] if isinstance(output, tuple) else output
    return embedding


def _view(tower: LibraryModel, spec: EncoderSpec) -> Tower | None:
    try:
        return build_tower(tower, spec.modality, cls_id=0)
    except EncoderError:
        return None
