"""One view of vision transformers and BERT-like text encoders: embeddings -> blocks[0..n) -> norm
-> pool.

Cuts, adapters and freezing rules address the same named parts in all of them. Nothing of the
libraries is copied: a tower calls their own modules one after the other, so its output equals their
`forward`. Neither library is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from apecache.encoders.encoder import ImageEncoder, TextEncoder, pool_tokens
from apecache.encoders.module_map import SUPPORTED, Anatomy, Place, read_anatomy
from apecache.encoders.sample_draws import checkpoint_contexts
from apecache.encoders.spec import Pooling
from apecache.errors import EncoderError
from apecache.fingerprint import Modality

Cut = int | Literal["pooled"]
"""`k`: the tokens after k blocks (k = 0: the embeddings; k = n_blocks: before the final norm);
`pooled`: the output."""
MASKED = -65504.0
"""Added to the scores of masked tokens: the lowest float16, so that it survives every autocast."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One parameter (of a BERT-like token table: all rows but the CLS row, or that row alone).

    `depth`: index of its block, -1 for the embeddings, n_blocks for what comes after. `count`:
    numbers it holds.
    """

    name: str
    place: Place
    depth: int
    count: int
    norm: bool
    bias: bool


class RowEmbedding(nn.Module):
    """A token table of which one row lies apart: `row` and `weight` can be trained without one
    another, and the row alone costs no gradient of the table."""

    def __init__(self, table: nn.Embedding, index: int) -> None:
        super().__init__()
        self.index = index
        self.padding_idx = table.padding_idx
        self.weight = table.weight
        self.row = nn.Parameter(table.weight[index].detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.weight, self.padding_idx)
        return torch.where((ids == self.index).unsqueeze(-1), self.row.to(rows.dtype), rows)

    @torch.no_grad()
    def join(self) -> nn.Embedding:
        """An ordinary table with the row back in its place; it shares this one's memory."""
        self.weight[self.index] = self.row
        n_tokens, dim = self.weight.shape
        table = nn.Embedding(
            n_tokens,
            dim,
            padding_idx=self.padding_idx,
            _weight=self.weight.detach(),
        )
        table.weight = self.weight
        return table


class Tower(nn.Module):
    """`module`: the library's model. `adapters`: what recipes/adapters.py puts in; `adapters.deep`,
    if there, is a block that runs after the library's own. `checkpointing`: blocks are run again in
    the backward pass instead of being kept. `pixels`: size of the images that preprocessing gives,
    if known. Outputs: the module's dtype, not normalised.
    """

    module: Any
    adapter_spec: Any  # an AdapterSpec of recipes/towers.py, which this stage does not know

    def __init__(
        self,
        module: Any,
        modality: Modality,
        anatomy: Anatomy,
        pooling: Pooling,
        cls_id: int | None,
    ) -> None:
        super().__init__()
        self.module = module
        self.modality = modality
        self.anatomy = anatomy
        self.pooling = pooling
        self.cls_id = cls_id
        self.adapters = nn.ModuleDict()
        self.adapter_spec = None
        self.adapter_hooks: list[RemovableHandle] = []
        self.checkpointing = False
        self.pixels: tuple[int, int] | None = None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The library's own blocks, shallowest first."""
        found: Sequence[nn.Module] = self.module.get_submodule(self.anatomy.blocks)
        return found

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        match self.anatomy.family:
            case "timm" | "timm-beit":
                return int(self.module.embed_dim)
            case _:
                return int(self.module.config.hidden_size)

    @property
    def output_dim(self) -> int:
        """Width of the pooled output: timm's own head may be wider than the tokens."""
        if self.pooling == "default":
            return int(getattr(self.module, "head_hidden_size", self.dim))
        return 2 * self.dim if self.pooling == "cls+mean" else self.dim

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels: `pixels` if it is set, else that which the image tower was
        made for."""
        if self.pixels is not None:
            return self.pixels
        match self.anatomy.family:
            case "timm" | "timm-beit":
                height, width = self.module.patch_embed.img_size
            case _:
                size = self.module.config.image_size
                height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    # --- running ----------------------------------------------------------------------------------

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pixels [n, 3, height, width], or token ids and their mask int64 [n, length] -> [n,
        dim]."""
        return self.forward_from(0, self.embed(inputs), mask)

    def run_to(self, cut: Cut, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """What lies below the cut: tokens [n, length, dim], or the pooled output [n, dim]."""
        if cut == "pooled":
            return self(inputs, mask)  # type: ignore[no-any-return]
        return self._run(self.embed(inputs), range(self._checked(cut)), mask)

    def forward_from(self, cut: Cut, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """What lies above the cut: tokens [n, length, dim] (or the pooled output, returned as it
        is) -> [n, dim]."""
        if cut == "pooled":
            return hidden
        hidden = self._run(hidden, range(self._checked(cut), self.n_blocks), mask)
        if "deep" in self.adapters:
            hidden = self._call(self.adapters["deep"], hidden, self._context(hidden, mask))
        return self.pool(self.normalise(hidden), mask)

    def embed(self, inputs: Tensor) -> Tensor:
        """Pixels or token ids -> tokens [n, length, dim] as the first block takes them."""
        module = self.module
        match self.anatomy.family:
            case "timm":
                tokens = module._pos_embed(module.patch_embed(inputs))
                return module.norm_pre(module.patch_drop(tokens))  # type: ignore[no-any-return]
            case "timm-beit":
                patches = module.patch_embed(inputs)
                tokens = torch.cat((module.cls_token.expand(len(patches), -1, -1), patches), dim=1)
                if module.pos_embed is not None:
                    tokens = tokens + module.pos_embed
                return module.pos_drop(tokens)  # type: ignore[no-any-return]
            case "hf-vit":
                fixed = module.config.model_type in ("vit", "deit")
                options = {"interpolate_pos_encoding": True} if fixed else {}
                return module.embeddings(inputs, **options)  # type: ignore[no-any-return]
            case "hf-beit":
                return module.embeddings(inputs)  # type: ignore[no-any-return]
            case "bert":
                return module.embeddings(input_ids=inputs)  # type: ignore[no-any-return]
            case "t5":
                return module.encoder.dropout(module.shared(inputs))  # type: ignore[no-any-return]

    def normalise(self, hidden: Tensor) -> Tensor:
        """The final norm, where there is one."""
        if self.anatomy.final_norm is None:
            return hidden
        normed: Tensor = self.module.get_submodule(self.anatomy.final_norm)(hidden)
        return self.module.encoder.dropout(normed) if self.anatomy.family == "t5" else normed

    def pool(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens after the final norm -> [n, output_dim]: timm's own head for `default`, else as in
        extraction."""
        if self.pooling == "default":
            return self.module.forward_head(tokens, pre_logits=True)  # type: ignore[no-any-return]
        return pool_tokens(
            tokens,
            mask=mask,
            pooling=self.pooling,
            n_prefix=self.n_prefix if self.modality == "image" else 0,
        )

    @property
    def n_prefix(self) -> int:
        """Tokens before the first patch: CLS, distillation and register tokens."""
        match self.anatomy.family:
            case "timm" | "timm-beit":
                return int(getattr(self.module, "num_prefix_tokens", 1))
            case "hf-vit" if self.module.config.model_type == "deit":
                return 2
            case _:
                return 1 + int(getattr(self.module.config, "num_register_tokens", 0))

    def _run(self, hidden: Tensor, depths: range, mask: Tensor | None) -> Tensor:
        context = self._context(hidden, mask) if depths else {}
        for depth in depths:
            hidden = self._call(self.blocks[depth], hidden, context)
        return hidden

    def _call(self, block: nn.Module, hidden: Tensor, context: dict[str, Any]) -> Tensor:
        run: Any = block
        if self.checkpointing:
            run = partial(checkpoint, block, use_reentrant=False, context_fn=checkpoint_contexts)
        out: Tensor | tuple[Tensor, ...] = run(hidden, **context)
        return out[0] if isinstance(out, tuple) else out

    def _context(self, hidden: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """What every block takes beside the tokens."""
        module = self.module
        length = hidden.shape[1]
        match self.anatomy.family:
            case "timm" | "hf-vit":
                return {}
            case "timm-beit":
                return {
                    "shared_rel_pos_bias": None
                    if module.rel_pos_bias is None
                    else module.rel_pos_bias()
                }
            case "hf-beit":
                return self._beit_context(length)
            case "bert":
                return {"attention_mask": _additive(mask, hidden)}
            case "t5":
                bias = (
                    module.encoder.block[0]
                    .layer[0]
                    .SelfAttention.compute_bias(length, length, hidden.device)
                )
                return {
                    "attention_mask": _additive(mask, hidden),
                    "position_bias": bias.to(hidden.dtype),
                }

    def _beit_context(self, length: int) -> dict[str, Any]:
        """Tokens after a cut do not say their shape any more: the image is taken for a square
        one."""
        size = round((length - 1) ** 0.5)
        patch = self.module.config.patch_size
        shared = self.module.shared_position_bias
        bias = None if shared is None else shared((size, size), dim_size=length)
        return {"attention_mask": bias, "resolution": (size * patch, size * patch)}

    def _checked(self, cut: int) -> int:
        if not 0 <= cut <= self.n_blocks:
            raise EncoderError(
                f"cut {cut}: the tower has {self.n_blocks} blocks; give 0 to {self.n_blocks} "
                "or pooled"
            )
        return cut

    # --- parts ------------------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """Every parameter between input and output, in the library's order, then the adapters'."""
        own = [
            part
            for name, parameter in self.module.named_parameters()
            for part in self._parts_of(name, parameter)
        ]
        return own + [
            self._adapter_part(name, parameter.numel())
            for name, parameter in self.adapters.named_parameters()
        ]

    def parameter(self, part: Part) -> nn.Parameter:
        """The parameter that holds a part; for the CLS row of a whole token table that is the
        table."""
        if part.place == "adapter":
            return self.adapters.get_parameter(part.name.removeprefix("adapters."))
        found: nn.Parameter = self.module.get_parameter(part.name.removesuffix("[cls]"))
        return found

    def _adapter_part(self, name: str, count: int) -> Part:
        """Adapters within block k are named `KIND.k.…`; the deep one lies above all blocks."""
        kind, depth, *_ = name.split(".")
        bias = name.endswith(".bias")
        return Part(
            name=f"adapters.{name}",
            place="adapter",
            depth=self.n_blocks if kind == "deep" else int(depth),
            count=count,
            norm=False,
            bias=bias,
        )

    def _parts_of(self, name: str, parameter: nn.Parameter) -> list[Part]:
        place, depth = self._place(name)
        if place is None or name.endswith(TABLE_ROW):
            return (
                []
                if place is None
                else [
                    Part(
                        name=name,
                        place="cls",
                        depth=-1,
                        count=parameter.numel(),
                        norm=False,
                        bias=False,
                    )
                ]
            )
        kind = (
            self._is_norm(name),
            name.rpartition(".")[2] in ("bias", "q_bias", "k_bias", "v_bias"),
        )
        count = parameter.numel()
        width = parameter.shape[-1] if parameter.ndim else 1
        if place != "token_embedding" or self.cls_id is None:
            norm_value, bias_value = kind
            return [
                Part(
                    name=name,
                    place=place,
                    depth=depth,
                    count=count,
                    norm=norm_value,
                    bias=bias_value,
                )
            ]
        norm, bias = kind
        table = Part(name=name, place=place, depth=depth, count=count - width, norm=norm, bias=bias)
        return (
            [table]
            if self.has_split_cls
            else [
                table,
                Part(
                    name=f"{name}[cls]",
                    place="cls",
                    depth=-1,
                    count=width,
                    norm=kind[0],
                    bias=kind[1],
                ),
            ]
        )

    def _place(self, name: str) -> tuple[Place | None, int]:
        if name.startswith("fc_norm.") and self.pooling != "default":
            return None, -1  # belongs to timm's own head
        for beginning, place in self.anatomy.places.items():
            if name.startswith(beginning):
                return place, self.n_blocks if place == "final_norm" else -1
        if name.startswith(f"{self.anatomy.blocks}."):
            return "block", int(name.removeprefix(f"{self.anatomy.blocks}.").partition(".")[0])
        return None, -1

    def _is_norm(self, name: str) -> bool:
        owner = self.module.get_submodule(name.rpartition(".")[0])
        return isinstance(owner, nn.LayerNorm | nn.RMSNorm) or type(owner).__name__.endswith(
            ("LayerNorm", "RmsNorm")
        )

    # --- the CLS row of a token table -------------------------------------------------------------

    @property
    def has_split_cls(self) -> bool:
        return isinstance(self._token_table(), RowEmbedding)

    def split_cls(self) -> None:
        """Lay the CLS row of the token table apart, so that it can be trained alone.

        Raises:
            EncoderError: no token table, or none whose CLS id is known.
        """
        table = self._token_table()
        if not isinstance(table, nn.Embedding) or self.cls_id is None:
            raise EncoderError(
                f"a {self.anatomy.family} tower has no CLS row in a token table that could be "
                "trained alone"
            )
        self.module.embeddings.word_embeddings = RowEmbedding(table, self.cls_id)

    def join_cls(self) -> None:
        """Put the row back: the library's model has its own form again, with the trained row."""
        table = self._token_table()
        if isinstance(table, RowEmbedding):
            self.module.embeddings.word_embeddings = table.join()

    def _token_table(self) -> nn.Module | None:
        return self.module.embeddings.word_embeddings if self.anatomy.family == "bert" else None


TABLE_ROW = "word_embeddings.row"


def _additive(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """int64 [n, length] -> [n, 1, 1, length]: 0 where kept."""
    return None if mask is None else (mask[:, None, None, :] == 0).to(hidden.dtype) * MASKED


def build_tower(
    module: Any,
    modality: Modality,
    pooling: Pooling = "default",
    cls_id: int | None = None,
) -> Tower:
    """The view of a loaded model. `pooling` default: timm's own, CLS for transformers images, the
    mean for text.

    `cls_id`: id of the text tower's first special token ([CLS]; RoBERTa's <s>); T5 has none.

    Raises:
        EncoderError: an architecture that is not one of the supported ones, named with these.
    """
    anatomy = read_anatomy(module)
    text = anatomy.family in ("bert", "t5")
    if text != (modality == "text"):
        raise EncoderError(
            f"{type(module).__name__} is no {modality} tower; supported are {SUPPORTED}"
        )
    if pooling == "default" and not anatomy.family.startswith("timm"):
        pooling = "mean" if text else "cls"
    if pooling == "tokens":
        raise EncoderError(
            "a tower gives one vector for each image or text, not its tokens; pool them"
        )
    if anatomy.family == "t5" and "cls" in pooling:
        raise EncoderError("T5 has no CLS token; use --text-cut mean")
    if "cls" in pooling and getattr(module, "cls_token", 0) is None:
        raise EncoderError(f"{type(module).__name__} has no CLS token; use --image-cut mean")
    return Tower(
        module,
        modality=modality,
        anatomy=anatomy,
        pooling=pooling,
        cls_id=cls_id if anatomy.family == "bert" else None,
    )


def tower_of(encoder: ImageEncoder | TextEncoder) -> Tower:
    """The view of a loaded encoder, with its own pooling.

    Raises:
        EncoderError: as `build_tower` does; or its features are of a layer within, which no tower
            ends in.
    """
    if encoder.spec.layer is not None:
        raise EncoderError(
            f"encoder {encoder.spec}: a tower ends after its last norm; leave the layer out"
        )
    if isinstance(encoder, ImageEncoder):
        return build_tower(encoder.module, "image", encoder.spec.pooling)
    inputs: Any = encoder.fingerprint.fields["inputs"]
    return build_tower(
        encoder.module,
        modality="text",
        pooling=inputs["pooling"],
        cls_id=encoder.tokenise([""]).ids[0][0],
    )
