"""View vision transformers and BERT-like text encoders alike: embeddings, blocks, norm, pooling.

Cuts, adapters and freezing rules address the same named parts in all of them. No code of the
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

from apecache.encoders.encoder import ImageEncoder, TextEncoder, pool_tokens
from apecache.encoders.module_map import SUPPORTED, ModuleMap, Place, read_anatomy
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


class Tower(nn.Module):
    """View the library's model as a tower, with any adapters that were put in.

    Outputs have the module's dtype and are not normalized.
    """

    module: Any
    """The library's model."""

    def __init__(
        self,
        module: Any,
        modality: Modality,
        anatomy: ModuleMap,
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
        """By kind; `deep` is a block that runs after the library's own."""
        self.checkpointing = False
        """Blocks are run again in the backward pass, and their activations are not kept."""
        self.pixels: tuple[int, int] | None = None
        """(height, width) of the images that preprocessing gives, if known."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Return the library's own blocks, shallowest first."""
        blocks: Sequence[nn.Module] = self.module.get_submodule(self.anatomy.blocks)
        return blocks

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def dim(self) -> int:
        """Return the width of the tokens."""
        match self.anatomy.family:
            case "timm" | "timm-beit":
                return int(self.module.embed_dim)
            case _:
                return int(self.module.config.hidden_size)

    @property
    def output_dim(self) -> int:
        """Return the width of the pooled output; timm's own head may be wider than the tokens."""
        if self.pooling == "default":
            return int(getattr(self.module, "head_hidden_size", self.dim))
        return 2 * self.dim if self.pooling == "cls+mean" else self.dim

    @property
    def image_size(self) -> tuple[int, int]:
        """Return (height, width): `pixels` if set, else the size that the tower was made for."""
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
        """Run the whole tower.

        Args:
            inputs: pixels [n, 3, height, width], or token ids int64 [n, length].
            mask: int64 [n, length] for token ids, 0 for padding.

        Returns:
            [n, output_dim].
        """
        return self.forward_from(0, self.embed(inputs), mask)

    def run_to(self, cut: Cut, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run what lies below the cut: tokens [n, length, dim], or the pooled output [n, dim]."""
        if cut == "pooled":
            return self(inputs, mask)  # type: ignore[no-any-return]
        return self._run(self.embed(inputs), range(self._checked(cut)), mask)

    def forward_from(self, cut: Cut, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run what lies above the cut.

        Args:
            hidden: what `run_to` gives; the pooled output is returned unchanged.

        Returns:
            [n, output_dim].
        """
        if cut == "pooled":
            return hidden
        depths = range(self._checked(cut), self.n_blocks)
        hidden = self._run(hidden, depths, mask)
        if "deep" in self.adapters:
            context = self._context(hidden, mask)
            hidden = self._call(self.adapters["deep"], hidden, context)
        return self.pool(self.normalize(hidden), mask)

    def embed(self, inputs: Tensor) -> Tensor:
        """Pixels or token ids -> tokens [n, length, dim] as the first block takes them."""
        module = self.module
        match self.anatomy.family:
            case "timm":
                tokens = module._pos_embed(module.patch_embed(inputs))
                return module.norm_pre(module.patch_drop(tokens))  # type: ignore[no-any-return]
            case "timm-beit":
                patches = module.patch_embed(inputs)
                cls_tokens = module.cls_token.expand(len(patches), -1, -1)
                tokens = torch.cat((cls_tokens, patches), dim=1)
                if module.pos_embed is not None:
                    tokens = tokens + module.pos_embed
                return module.pos_drop(tokens)  # type: ignore[no-any-return]
            case "hf-vit":
                # The others interpolate their positions without being asked.
                is_fixed_size = module.config.model_type in ("vit", "deit")
                options = {"interpolate_pos_encoding": True} if is_fixed_size else {}
                return module.embeddings(inputs, **options)  # type: ignore[no-any-return]
            case "hf-beit":
                embedded = module.embeddings(inputs)
                # Data2VecVision also returns the shape of its grid.
                patches = embedded[0] if isinstance(embedded, tuple) else embedded
                return patches  # type: ignore[no-any-return]
            case "bert":
                return module.embeddings(input_ids=inputs)  # type: ignore[no-any-return]
            case "t5":
                return module.encoder.dropout(module.shared(inputs))  # type: ignore[no-any-return]

    def normalize(self, hidden: Tensor) -> Tensor:
        """Apply the final norm, where there is one."""
        if self.anatomy.final_norm is None:
            return hidden
        final_norm = self.module.get_submodule(self.anatomy.final_norm)
        normed: Tensor = final_norm(hidden)
        return self.module.encoder.dropout(normed) if self.anatomy.family == "t5" else normed

    def pool(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool tokens after the final norm -> [n, output_dim].

        `default` is the model's own: timm's head, or the normalized mean patch of a fine-tuned
        BEiT. All others are pooled as in extraction.
        """
        if self.pooling == "default" and self.anatomy.family == "hf-beit":
            return self.module.pooler(tokens)  # type: ignore[no-any-return]
        if self.pooling == "default":
            return self.module.forward_head(tokens, pre_logits=True)  # type: ignore[no-any-return]
        # A text's CLS token is a word to the mean; an image's CLS and registers are no patches.
        n_prefix = self.n_prefix if self.modality == "image" else 0
        return pool_tokens(tokens, mask=mask, pooling=self.pooling, n_prefix=n_prefix)

    @property
    def n_prefix(self) -> int:
        """Count the tokens before the first patch: CLS, distillation and register tokens."""
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
        """Return the keywords that every block takes beside the tokens."""
        module = self.module
        length = hidden.shape[1]
        match self.anatomy.family:
            case "timm" | "hf-vit":
                return {}
            case "timm-beit":
                bias = None if module.rel_pos_bias is None else module.rel_pos_bias()
                return {"shared_rel_pos_bias": bias}
            case "hf-beit":
                return self._beit_context(length)
            case "bert":
                return {"attention_mask": _additive(mask, hidden)}
            case "t5":
                # The table of positions lies in the first block and serves all blocks.
                first_attention = module.encoder.block[0].layer[0].SelfAttention
                position_bias = first_attention.compute_bias(length, length, hidden.device)
                return {
                    "attention_mask": _additive(mask, hidden),
                    "position_bias": position_bias.to(hidden.dtype),
                }

    def _beit_context(self, length: int) -> dict[str, Any]:
        # Tokens after a cut do not say their shape any more: the image is taken to be square.
        grid_size = round((length - 1) ** 0.5)
        patch_size = self.module.config.patch_size
        image_size = grid_size * patch_size
        # Data2VecVision keeps the table that all blocks share in its encoder.
        is_beit = self.module.config.model_type == "beit"
        if is_beit:
            shared = self.module.shared_position_bias
        else:
            shared = getattr(self.module.encoder, "relative_position_bias", None)
        bias = None if shared is None else shared((grid_size, grid_size), dim_size=length)
        bias_name = "attention_mask" if is_beit else "relative_position_bias"
        return {bias_name: bias, "resolution": (image_size, image_size)}

    def _checked(self, cut: int) -> int:
        """Return the cut, or raise EncoderError if the tower has fewer blocks."""
        if not 0 <= cut <= self.n_blocks:
            raise EncoderError(
                f"cut {cut}: the tower has {self.n_blocks} blocks; give 0 to {self.n_blocks} "
                "or pooled"
            )
        return cut

    # --- parts ------------------------------------------------------------------------------------

    def parts(self) -> list[TowerParameter]:
        """List every parameter between input and output.

        Returns:
            The library's parameters in its order, then those of the adapters.
        """
        tower_parts: list[TowerParameter] = []
        for name, parameter in self.module.named_parameters():
            tower_parts += self._parts_of(name, parameter)
        for name, parameter in self.adapters.named_parameters():
            tower_parts.append(self._adapter_part(name, parameter.numel()))
        return tower_parts

    def parameter(self, part: TowerParameter) -> nn.Parameter:
        """Return the parameter that holds a part; for the CLS row of a whole token table, the
        table."""
        if part.section == "adapter":
            adapter_name = part.name.removeprefix("adapters.")
            return self.adapters.get_parameter(adapter_name)
        parameter: nn.Parameter = self.module.get_parameter(part.name.removesuffix("[cls]"))
        return parameter

    def _adapter_part(self, name: str, count: int) -> TowerParameter:
        """Describe an adapter's parameter, named `KIND.k.…` within block k.

        The deep adapter lies above all blocks.
        """
        adapter_kind, depth, *_ = name.split(".")
        bias = name.endswith(".bias")
        return TowerParameter(
            name=f"adapters.{name}",
            section="adapter",
            depth=self.n_blocks if adapter_kind == "deep" else int(depth),
            count=count,
            norm=False,
            bias=bias,
        )

    def _parts_of(self, name: str, parameter: nn.Parameter) -> list[TowerParameter]:
        """Describe one parameter of the library: as no part, one part, or a table and its CLS
        row."""
        tower_place, depth = self._place(name)
        if tower_place is None:
            return []
        n_numbers = parameter.numel()
        if name.endswith(TABLE_ROW):
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
        is_bias = name.rpartition(".")[2] in ("bias", "q_bias", "k_bias", "v_bias")
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
        if self.has_split_cls:
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
        """Return what a parameter belongs to, and its depth as in `TowerParameter`; (None, -1) if
        neither."""
        if name.startswith(("fc_norm.", "pooler.")) and self.pooling != "default":
            return None, -1  # belongs to the model's own head
        for beginning, tower_place in self.anatomy.places.items():
            if name.startswith(beginning):
                depth = self.n_blocks if tower_place == "final_norm" else -1
                return tower_place, depth
        blocks_prefix = f"{self.anatomy.blocks}."
        if name.startswith(blocks_prefix):
            block_index, *_ = name.removeprefix(blocks_prefix).split(".")
            return "block", int(block_index)
        return None, -1

    def _is_norm(self, name: str) -> bool:
        owner = self.module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, nn.LayerNorm | nn.RMSNorm):
            return True
        # The libraries have norms of their own, such as T5LayerNorm.
        return type(owner).__name__.endswith(("LayerNorm", "RmsNorm"))

    # --- the CLS row of a token table -------------------------------------------------------------

    @property
    def has_split_cls(self) -> bool:
        """Whether the CLS row is a parameter of its own."""
        return isinstance(self._token_table(), RowEmbedding)

    def split_cls(self) -> None:
        """Split the CLS row off the token table, so that it can be trained alone.

        Raises:
            EncoderError: the tower has no token table, or its CLS id is not known.
        """
        table = self._token_table()
        if not isinstance(table, nn.Embedding) or self.cls_id is None:
            raise EncoderError(
                f"a {self.anatomy.family} tower has no CLS row in a token table that could be "
                "trained alone"
            )
        self.module.embeddings.word_embeddings = RowEmbedding(table, self.cls_id)

    def join_cls(self) -> None:
        """Put the row back: the library's model has its original form again, with the trained
        row."""
        table = self._token_table()
        if isinstance(table, RowEmbedding):
            self.module.embeddings.word_embeddings = table.join()

    def _token_table(self) -> nn.Module | None:
        return self.module.embeddings.word_embeddings if self.anatomy.family == "bert" else None


TABLE_ROW = "word_embeddings.row"


def _additive(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Return what is added to attention scores: 0 for tokens, MASKED for padding.

    Args:
        mask: int64 [n, length], 0 for padding.
        hidden: gives the dtype.

    Returns:
        [n, 1, 1, length]; None without a mask.
    """
    if mask is None:
        return None
    is_padding = mask[:, None, None, :] == 0
    return is_padding.to(hidden.dtype) * MASKED


ROBERTA_LIKE = (
    "camembert",
    "data2vec-text",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def count_positions(config: Any) -> int | None:
    """Return how many tokens a text model has positions for; None where there is no limit."""
    n_positions = getattr(config, "max_position_embeddings", None)
    if not n_positions:
        return None
    # RoBERTa-like models count positions from 2: the first two rows of the table are not used.
    offset = 2 if config.model_type in ROBERTA_LIKE else 0
    return int(n_positions) - offset


def build_tower(
    module: Any,
    modality: Modality,
    pooling: Pooling = "default",
    cls_id: int | None = None,
) -> Tower:
    """View a loaded model as a tower.

    Args:
        pooling: `default` is timm's own, the normalized mean patch of a fine-tuned BEiT, CLS for
            other images of transformers, the mean for text.
        cls_id: id of the text tower's first special token ([CLS]; RoBERTa's <s>); T5 has none.

    Raises:
        EncoderError: an architecture that is not supported; the message names the supported ones.
    """
    anatomy = read_anatomy(module)
    is_text = anatomy.family in ("bert", "t5")
    if is_text != (modality == "text"):
        raise EncoderError(
            f"{type(module).__name__} is no {modality} tower; supported are {SUPPORTED}"
        )
    if pooling == "default" and not anatomy.family.startswith("timm"):
        pooling = "mean" if is_text else _image_default(module)
    if pooling == "last" and not is_text:
        raise EncoderError("the last token is for texts only; use cls or mean for images")
    if pooling == "tokens":
        raise EncoderError(
            "a tower gives one vector for each image or text, not its tokens; pool them"
        )
    if anatomy.family == "t5" and "cls" in pooling:
        raise EncoderError("T5 has no CLS token; use --text-cut mean")
    if "cls" in pooling and getattr(module, "cls_token", 0) is None:
        raise EncoderError(f"{type(module).__name__} has no CLS token; use --image-cut mean")
    tower = Tower(
        module,
        modality=modality,
        anatomy=anatomy,
        pooling=pooling,
        cls_id=cls_id if anatomy.family == "bert" else None,
    )
    # A new module is in training mode. Adapters take the tower's mode, and drop out in training.
    tower.training = module.training
    return tower


def _image_default(module: Any) -> Pooling:
    """Return the default pooling of an image tower of transformers."""
    if not getattr(module.config, "use_mean_pooling", False):
        return "cls"
    if module.pooler is None:
        raise EncoderError(
            f"{type(module).__name__} was loaded without the norm after its mean patch; use "
            "--image-cut mean or cls"
        )
    return "default"


def tower_of(encoder: ImageEncoder | TextEncoder) -> Tower:
    """View a loaded encoder as a tower, with the encoder's own pooling.

    Raises:
        EncoderError: as `build_tower` does; or the features are of an inner layer, where no tower
            ends.
    """
    if encoder.spec.layer is not None:
        raise EncoderError(
            f"encoder {encoder.spec}: a tower ends after its last norm; leave the layer out"
        )
    if isinstance(encoder, ImageEncoder):
        return build_tower(encoder.module, "image", encoder.spec.pooling)
    inputs: Any = encoder.fingerprint.fields["inputs"]
    # An empty text has special tokens only, and the first of them is the CLS token.
    cls_id = encoder.tokenize([""]).ids[0][0]
    return build_tower(
        encoder.module,
        modality="text",
        pooling=inputs["pooling"],
        cls_id=cls_id,
    )
