"""List the parameters of a tower by the part they belong to; hold a token table's CLS row apart."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apecache.encoders.library_types import LibraryModel
from apecache.encoders.module_map import ModuleMap
from apecache.encoders.module_places import Place
from apecache.encoders.spec import Pooling

BIAS_NAMES = ("bias", "q_bias", "k_bias", "v_bias")


@dataclass(frozen=True, kw_only=True)
class TowerParameter:
    """Describe one parameter of a tower or a head.

    A BERT-like token table is two of them: all rows but the CLS row, and that row alone.
    """

    name: str
    section: Place
    depth: int
    """Index of its block; -1 for the embeddings, n_blocks for what comes after the blocks."""
    count: int
    """How many numbers it holds."""
    norm: bool
    bias: bool


class RowEmbedding(nn.Module):
    """Look up a token table of which one row is a parameter of its own.

    `row` and `weight` can be trained independently, and training the row alone costs no gradient of
    the table.
    """

    def __init__(self, table: nn.Embedding, index: int) -> None:
        super().__init__()
        self.index = index
        self.padding_idx = table.padding_idx
        self.weight = table.weight
        self.row = nn.Parameter(table.weight[index].detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [n, length] -> [n, length, dim]."""
        rows = nn.functional.embedding(ids, self.weight, self.padding_idx)
        is_row = (ids == self.index).unsqueeze(-1)
        # The table's dtype decides, should the two differ.
        return torch.where(is_row, self.row.to(rows.dtype), rows)

    @torch.no_grad()
    def join(self) -> nn.Embedding:
        """Return an ordinary table with the row back in its place; it shares this one's memory."""
        self.weight[self.index] = self.row
        n_tokens, dim = self.weight.shape
        table = nn.Embedding(
            n_tokens,
            dim,
            padding_idx=self.padding_idx,
            _weight=self.weight.detach(),
        )
        # The parameter object itself: requires_grad and optimizers belong to the object.
        table.weight = self.weight
        return table


@dataclass(frozen=True, kw_only=True)
class ParameterWalk:
    """Describe the parameters of the library's model one by one."""

    module: LibraryModel
    module_map: ModuleMap
    n_blocks: int
    pooling: Pooling
    cls_id: int | None

    @property
    def row_name(self) -> str:
        """Return the name of the CLS row where it is a parameter of its own."""
        return f"{self.module_map.token_table}.row"

    def list_parameters(self) -> list[TowerParameter]:
        """List every parameter between input and output, in the library's order."""
        tower_parts: list[TowerParameter] = []
        for name, parameter in self.module.named_parameters():
            tower_parts += self._describe(name, parameter)
        return tower_parts

    def _describe(self, name: str, parameter: nn.Parameter) -> list[TowerParameter]:
        """Describe one parameter: as no part, one part, or a table and its CLS row."""
        tower_place, depth = self._place(name)
        if tower_place is None:
            return []
        n_numbers = parameter.numel()
        if name == self.row_name:
            row = TowerParameter(
                name=name,
                section="cls",
                depth=-1,
                count=n_numbers,
                norm=False,
                bias=False,
            )
            return [row]
        is_norm = self._is_norm(name)
        is_bias = name.rpartition(".")[2] in BIAS_NAMES
        if tower_place != "token_embedding" or self.cls_id is None:
            whole_parameter = TowerParameter(
                name=name,
                section=tower_place,
                depth=depth,
                count=n_numbers,
                norm=is_norm,
                bias=is_bias,
            )
            return [whole_parameter]
        width = parameter.shape[-1] if parameter.ndim else 1
        # Where the row is split off, the table still holds its old values, which nothing reads.
        table = TowerParameter(
            name=name,
            section=tower_place,
            depth=depth,
            count=n_numbers - width,
            norm=is_norm,
            bias=is_bias,
        )
        if self._is_split:
            return [table]
        cls_row = TowerParameter(
            name=f"{name}[cls]",
            section="cls",
            depth=-1,
            count=width,
            norm=is_norm,
            bias=is_bias,
        )
        return [table, cls_row]

    def _place(self, name: str) -> tuple[Place | None, int]:
        """Return what a parameter belongs to, and its depth as in `TowerParameter`.

        A parameter that belongs to nothing gives (None, -1).
        """
        if self.pooling != "default" and name.startswith(self.module_map.own_pooling):
            return None, -1
        for beginning, tower_place in self.module_map.places.items():
            if name.startswith(beginning):
                is_above = tower_place in ("final_norm", "pooler")
                return tower_place, self.n_blocks if is_above else -1
        blocks_prefix = f"{self.module_map.blocks}."
        if name.startswith(blocks_prefix):
            block_index, *_ = name.removeprefix(blocks_prefix).split(".")
            return "block", int(block_index)
        return None, -1

    @property
    def _is_split(self) -> bool:
        table = self.module_map.token_table
        return table is not None and isinstance(self.module.get_submodule(table), RowEmbedding)

    def _is_norm(self, name: str) -> bool:
        owner = self.module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.LayerNorm | nn.RMSNorm):
            return True
        # The libraries have norms of their own, such as T5LayerNorm and Qwen3RMSNorm.
        return type(owner).__name__.lower().endswith(("layernorm", "rmsnorm"))
