"""View any encoder as a tower that runs as a whole: for plans whose recipe freezes it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apecache.encoders.layers import find_blocks
from apecache.encoders.module_map import ModuleMap
from apecache.encoders.spec import Pooling
from apecache.encoders.tower import Cut, Tower
from apecache.encoders.tower_parameters import TowerParameter
from apecache.errors import EncoderError
from apecache.fingerprint import Modality


class FrozenTower(Tower):
    """Run a model whose inner parts have no names, to count or time it.

    It has two cuts: the pooled output, and the tokens that the model returns. Its parameters all
    belong to one part, `whole`.

    Args:
        features: what extraction takes of the model: (pixels,) or (ids, mask) -> pooled features.
        tokens: the same for the tokens that the model returns; None: it returns none.
        image_size: (height, width) of the pixels; None for texts.
    """

    def __init__(
        self,
        module: nn.Module,
        modality: Modality,
        pooling: Pooling,
        features: Callable[..., Tensor],
        tokens: Callable[..., Tensor] | None,
        image_size: tuple[int, int] | None,
    ) -> None:
        super().__init__(
            module,
            modality=modality,
            module_map=WHOLE,
            pooling=pooling,
            cls_id=None,
        )
        self.pixels = image_size
        self._features = features
        self._tokens = tokens
        self._widths: dict[str, int] = {}

    @property
    def blocks(self) -> Any:
        """Return the library's own blocks, if the model has a single list of them."""
        names = find_blocks(self.module)
        return self.module.get_submodule(names[0]) if len(names) == 1 else nn.ModuleList()

    @property
    def output_dim(self) -> int:
        return self._width("features", self._features)

    @property
    def dim(self) -> int:
        return self.output_dim if self._tokens is None else self._width("tokens", self._tokens)

    @property
    def has_cls(self) -> bool:
        return False

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._features(*self._arguments(inputs, mask))

    def run_to(self, cut: Cut, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the model; any cut but `pooled` stands for the tokens that it returns.

        Raises:
            EncoderError: tokens are asked for, and the model returns none.
        """
        if cut == "pooled":
            return self(inputs, mask)  # type: ignore[no-any-return]
        if self._tokens is None:
            raise EncoderError(
                f"{type(self.module).__name__} gives no tokens; take its pooled output"
            )
        return self._tokens(*self._arguments(inputs, mask))

    def forward_from(self, cut: Cut, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden if cut == "pooled" else hidden.mean(1)

    def parts(self) -> list[TowerParameter]:
        """List every parameter of the model, as one part."""
        tower_parts: list[TowerParameter] = []
        for name, parameter in self.module.named_parameters():
            tower_part = TowerParameter(
                name=name,
                section="whole",
                depth=0,
                count=parameter.numel(),
                norm=False,
                bias=False,
            )
            tower_parts.append(tower_part)
        return tower_parts

    def _arguments(self, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.modality == "image":
            return (inputs,)
        # transformers asks whether a mask hides anything, which has no answer without values.
        return (inputs, None if inputs.is_meta else mask)

    def _width(self, name: str, run: Callable[..., Tensor]) -> int:
        if name not in self._widths:
            device = next(self.module.parameters()).device
            if self.modality == "image":
                inputs = torch.zeros(1, 3, *self.image_size, device=device)
            else:
                inputs = torch.zeros(1, 1, dtype=torch.long, device=device)
            with torch.no_grad():
                self._widths[name] = int(run(*self._arguments(inputs, None)).shape[-1])
        return self._widths[name]


WHOLE = ModuleMap(family="whole", blocks="", places={}, final_norm=None, norms=("", ""))
