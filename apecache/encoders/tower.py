"""View vision transformers and BERT-like text encoders alike: embeddings, blocks, norm, pooling.

Cuts, adapters and freezing rules address the same named parts in all of them. No code of the
libraries is copied: a tower calls their own modules one after the other, so its output equals their
`forward`. Neither library is imported.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apecache.encoders.encoder import ImageEncoder, TextEncoder, pool_tokens
from apecache.encoders.library_types import LibraryModel, ModelConfig
from apecache.encoders.module_map import (
    OWN_FAMILIES,
    PADDED_FAMILIES,
    SUPPORTED,
    TEXT_FAMILIES,
    ModuleMap,
    read_module_map,
)
from apecache.encoders.sample_draws import checkpoint_contexts
from apecache.encoders.spec import Pooling, frozen_only, no_class_token
from apecache.encoders.tower_forward import block_contexts, embed_inputs
from apecache.encoders.tower_parameters import ParameterWalk, RowEmbedding, TowerParameter
from apecache.encoders.tower_pooling import own_dim, pool_own
from apecache.errors import EncoderError
from apecache.fingerprint import Modality

Cut = int | Literal["pooled"]
"""`k`: the tokens after k blocks (k = 0: the embeddings; k = n_blocks: before the final norm);
`pooled`: the output."""


class Tower(nn.Module):
    """View the library's model as a tower, with any adapters that were put in.

    Outputs have the module's dtype and are not normalized.
    """

    module: LibraryModel
    """The library's model."""

    def __init__(
        self,
        module: LibraryModel,
        modality: Modality,
        module_map: ModuleMap,
        pooling: Pooling,
        cls_id: int | None,
    ) -> None:
        super().__init__()
        self.module = module
        self.modality = modality
        self.module_map = module_map
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
        blocks: Sequence[nn.Module] = self.module.get_submodule(self.module_map.blocks)
        return blocks

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def root(self) -> LibraryModel:
        """Return the module that holds embeddings and blocks: the model, or what it wraps."""
        return self.module.get_submodule(self.module_map.root)

    @property
    def dim(self) -> int:
        """Return the width of the tokens."""
        match self.module_map.family:
            case "timm" | "timm-beit" | "timm-eva":
                return int(self.root.embed_dim)
            case "open_clip-vit":
                return int(self.root.transformer.width)
            case "open_clip-text":
                return int(self.root.width)
            case _:
                return int(self.root.config.hidden_size)

    @property
    def output_dim(self) -> int:
        """Return the width of the pooled output; the model's own may differ from the tokens'."""
        if self.pooling == "default":
            return own_dim(self.module, self.module_map, self.dim)
        return 2 * self.dim if self.pooling == "cls+mean" else self.dim

    @property
    def image_size(self) -> tuple[int, int]:
        """Return (height, width): `pixels` if set, else the size that the tower was made for."""
        if self.pixels is not None:
            return self.pixels
        match self.module_map.family:
            case "timm" | "timm-beit" | "timm-eva":
                height, width = self.root.patch_embed.img_size
            case "open_clip-vit":
                height, width = self.root.image_size
            case _:
                size = self.root.config.image_size
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
        return self.forward_from(0, self.embed(inputs), self._own_mask(inputs, mask))

    def run_to(self, cut: Cut, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run what lies below the cut: tokens [n, length, dim], or the pooled output [n, dim]."""
        if cut == "pooled":
            return self(inputs, mask)  # type: ignore[no-any-return]
        depths = range(self._checked(cut))
        return self._run(self.embed(inputs), depths, self._own_mask(inputs, mask))

    def _own_mask(self, inputs: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask of token ids as the model itself makes it."""
        if self.module_map.wrapper != "open_clip-hf" or self.modality == "image":
            return mask
        # open_clip hides the padding token also where a text holds it.
        return inputs.ne(self.root.config.pad_token_id).long()

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
            # It is a copy of the last block, and takes what that block takes.
            contexts = self._contexts(hidden, mask)
            hidden = self._call(self.adapters["deep"], hidden, contexts[-1])
        return self.pool(self.normalize(hidden), mask)

    def embed(self, inputs: Tensor) -> Tensor:
        """Pixels or token ids -> tokens [n, length, dim] as the first block takes them."""
        return embed_inputs(self.module, self.module_map, inputs)

    def normalize(self, hidden: Tensor) -> Tensor:
        """Apply the final norm, where there is one."""
        if self.module_map.final_norm is None:
            return hidden
        final_norm = self.module.get_submodule(self.module_map.final_norm)
        normed: Tensor = final_norm(hidden)
        return self.root.encoder.dropout(normed) if self.module_map.family == "t5" else normed

    def pool(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool tokens after the final norm -> [n, output_dim].

        `default` is the model's own: timm's head, the normalized mean patch of a fine-tuned BEiT,
        SigLIP's attention head, or CLIP's projection. All others are pooled as in extraction.
        """
        if self.pooling == "default":
            return pool_own(self.module, self.module_map, tokens, mask)
        # A text's CLS token is a word to the mean; an image's CLS and registers are no patches.
        n_prefix = self.n_prefix if self.modality == "image" else 0
        return pool_tokens(tokens, mask=mask, pooling=self.pooling, n_prefix=n_prefix)

    @property
    def n_prefix(self) -> int:
        """Count the tokens before the first patch: CLS, distillation and register tokens."""
        match self.module_map.family:
            case "hf-siglip":
                return 0
            case "timm" | "timm-beit" | "timm-eva":
                return int(getattr(self.root, "num_prefix_tokens", 1))
            case "open_clip-vit":
                return 1
            case "hf-vit" if self.root.config.model_type == "deit":
                return 2
            case _:
                return 1 + int(getattr(self.root.config, "num_register_tokens", 0))

    @property
    def sees_padding(self) -> bool:
        """Tell whether the tokens of a text depend on its padding, which caches leave out."""
        return self.module_map.family in PADDED_FAMILIES

    def _run(self, hidden: Tensor, depths: range, mask: Tensor | None) -> Tensor:
        contexts = self._contexts(hidden, mask) if depths else []
        for depth in depths:
            hidden = self._call(self.blocks[depth], hidden, contexts[depth])
        return hidden

    def _call(self, block: nn.Module, hidden: Tensor, context: dict[str, Any]) -> Tensor:
        run: Any = block
        if self.checkpointing:
            run = partial(checkpoint, block, use_reentrant=False, context_fn=checkpoint_contexts)
        out: Tensor | tuple[Tensor, ...] = run(hidden, **context)
        return out[0] if isinstance(out, tuple) else out

    def _contexts(self, hidden: Tensor, mask: Tensor | None) -> list[dict[str, Any]]:
        """Return the keywords that each block takes beside the tokens."""
        return block_contexts(
            self.module,
            module_map=self.module_map,
            hidden=hidden,
            mask=mask,
            image_size=self.image_size if self.modality == "image" else None,
        )

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
        tower_parts = self._walk.list_parameters()
        for name, parameter in self.adapters.named_parameters():
            tower_parts.append(self._adapter_part(name, parameter.numel()))
        return tower_parts

    def parameter(self, part: TowerParameter) -> nn.Parameter:
        """Return the parameter that holds a part.

        For the CLS row of a whole token table, that is the table.
        """
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

    @property
    def _walk(self) -> ParameterWalk:
        return ParameterWalk(
            module=self.module,
            module_map=self.module_map,
            n_blocks=self.n_blocks,
            pooling=self.pooling,
            cls_id=self.cls_id,
        )

    # --- the CLS row of a token table -------------------------------------------------------------

    @property
    def has_split_cls(self) -> bool:
        """Whether the CLS row is a parameter of its own."""
        return isinstance(self._token_table(), RowEmbedding)

    @property
    def row_name(self) -> str:
        """Return the name of the CLS row where it is a parameter of its own."""
        return self._walk.row_name

    @property
    def has_cls(self) -> bool:
        """Tell whether the first token is a CLS token, which stands for the whole input."""
        match self.module_map.family:
            case "timm" | "timm-beit" | "timm-eva":
                return self.root.cls_token is not None
            case "hf-siglip":
                return False
            case _:
                return self.modality == "image" or self.module_map.token_table is not None

    def split_cls(self) -> None:
        """Split the CLS row off the token table, so that it can be trained alone.

        Raises:
            EncoderError: the tower has no token table, or its CLS id is not known.
        """
        table = self._token_table()
        if not isinstance(table, nn.Embedding) or self.cls_id is None:
            raise EncoderError(
                f"{type(self.module).__name__} has no CLS row in a token table that could be "
                "trained alone"
            )
        self._set_token_table(RowEmbedding(table, self.cls_id))

    def join_cls(self) -> None:
        """Put the trained row back, so that the library's model has its original form again."""
        table = self._token_table()
        if isinstance(table, RowEmbedding):
            self._set_token_table(table.join())

    def _token_table(self) -> nn.Module | None:
        name = self.module_map.token_table
        return None if name is None else self.module.get_submodule(name)

    def _set_token_table(self, table: nn.Module) -> None:
        assert self.module_map.token_table is not None
        owner_name, _, name = self.module_map.token_table.rpartition(".")
        setattr(self.module.get_submodule(owner_name), name, table)


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


def count_positions(config: ModelConfig) -> int | None:
    """Return how many tokens a text model has positions for; None where there is no limit."""
    n_positions = getattr(config, "max_position_embeddings", None)
    if not n_positions:
        return None
    # RoBERTa-like models count positions from 2: the first two rows of the table are not used.
    offset = 2 if config.model_type in ROBERTA_LIKE else 0
    return int(n_positions) - offset


def build_tower(
    module: LibraryModel,
    modality: Modality,
    pooling: Pooling = "default",
    cls_id: int | None = None,
) -> Tower:
    """View a loaded model as a tower.

    Args:
        pooling: `default` is the model's own for timm, CLIP, SigLIP and a fine-tuned BEiT, CLS for
            other images of transformers, the last token of decoders, and the mean for other texts.
        cls_id: id of the text tower's first special token ([CLS]; RoBERTa's <s>). T5 and decoders
            have none.

    Raises:
        EncoderError: an architecture that is not supported; the message names the supported ones.
    """
    module_map = read_module_map(module)
    is_text = module_map.family in TEXT_FAMILIES
    if is_text != (modality == "text"):
        raise EncoderError(
            f"{type(module).__name__} cannot train as the {modality} side; "
            f"supported are {SUPPORTED}"
        )
    if pooling == "default":
        pooling = _default_pooling(module, module_map)
    if pooling == "last" and not is_text:
        raise EncoderError("the last token is for texts only; use cls or mean for images")
    if pooling == "tokens":
        raise EncoderError(
            "a tower gives one vector for each image or text, not its tokens; pool them"
        )
    tower = Tower(
        module,
        modality=modality,
        module_map=module_map,
        pooling=pooling,
        cls_id=None if module_map.token_table is None else cls_id,
    )
    if "cls" in pooling and not tower.has_cls:
        name = "T5" if module_map.family == "t5" else type(module).__name__
        raise no_class_token(name, modality)
    # A new module is in training mode. Adapters take the tower's mode, and drop out in training.
    tower.training = module.training
    return tower


def _default_pooling(module: LibraryModel, module_map: ModuleMap) -> Pooling:
    """Return the default pooling of a tower; `default` where the model has one of its own."""
    match module_map.family:
        case family if family in OWN_FAMILIES or module_map.wrapper:
            return "default"
        case "hf-siglip":
            return "default" if module.use_head else "mean"
        case "hf-beit":
            return _beit_default(module)
        case "hf-vit" | "hf-dinov3":
            return "cls"
        case "decoder":
            return "last"
        case _:
            return "mean"


def _beit_default(module: LibraryModel) -> Pooling:
    """Return the default pooling of BEiT and Data2VecVision."""
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
    if encoder.spec.library == "st":
        raise frozen_only(encoder.spec)
    if isinstance(encoder, ImageEncoder):
        tower = build_tower(encoder.module, "image", encoder.spec.pooling)
        _, height, width = encoder.input_shape
        tower.pixels = (height, width)
        return tower
    inputs: Any = encoder.fingerprint.fields["inputs"]
    # An empty text has special tokens only, and the first of them is the CLS token.
    special_ids = encoder.tokenize([""]).ids[0]
    cls_id = special_ids[0] if special_ids else None
    return build_tower(
        encoder.module,
        modality="text",
        pooling=inputs["pooling"],
        cls_id=cls_id,
    )
