"""Build the model of the encoder trainer.

It has two sides, each a tower (unless its output is cached) and a head, and a temperature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.tower import Cut, Tower, tower_of
from apecache.errors import RecipeError, RunError
from apecache.fingerprint import Modality
from apecache.heads.build import build_heads
from apecache.heads.head import EnsembleHead, Head
from apecache.losses.contrastive import Groups, Temperature
from apecache.losses.registry import (
    LossTerms,
    build_temperature,
    contrast,
    structure_term,
    structure_weight,
)
from apecache.losses.spec import LossSpec
from apecache.models.adapters import insert_adapters
from apecache.models.freezing import (
    FreezeDecision,
    find_cut,
    freeze_head,
    freeze_towers,
    spared_parameters,
    trained_parameters,
)
from apecache.models.shared_encoder import Distillation, SharedLoss, SharedSide, build_sides
from apecache.recipes.recipe import Recipe


class Side(nn.Module):
    """Embed images or texts by a tower and a head -> [n, dim], L2-normalized, float32.

    Args:
        tower: None where its output comes from the cache.
        cut: the inputs are the tokens after this many blocks; None: pixels or token ids.
        structured: the loss compares the head's outputs with its inputs.
    """

    def __init__(
        self,
        tower: Tower | None,
        head: Head,
        cut: int | None = None,
        structured: bool = False,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.head = head
        self.cut = cut
        self.structured = structured
        self.n_frozen_blocks: Cut | None = None
        """Below this cut nothing trains, and everything runs without dropout, cached or not."""

    def train(self, mode: bool = True) -> "Side":
        super().train(mode)
        if mode and self.tower is not None and self.n_frozen_blocks is not None:
            # The blocks that could be cached give the same output whether or not they are.
            self.tower.module.eval()
            first_live = (
                self.tower.n_blocks if self.n_frozen_blocks == "pooled" else self.n_frozen_blocks
            )
            for block in self.tower.blocks[first_live:]:
                block.train()
        return self

    @property
    def dim(self) -> int:
        return self.head.out_dim

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded: Tensor = self.head(self._pooled(inputs, mask))
        return embedded

    def outputs(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what the loss takes.

        Returns:
            [n, dim]; if `structured` [n, dim + in_dim], with the pooled features last.
        """
        pooled = self._pooled(inputs, mask)
        embedded: Tensor = self.head(pooled)
        if not self.structured:
            return embedded
        # Detached: the structure to keep is a target, not something to train.
        targets = pooled.detach().to(embedded.dtype)
        return torch.cat([embedded, targets], dim=-1)

    def _pooled(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        if self.tower is None:
            return inputs
        if self.cut is None:
            return self.tower(inputs, mask)  # type: ignore[no-any-return]
        return self.tower.forward_from(self.cut, inputs, mask)


class EncoderModel(nn.Module):
    """Hold two sides, a temperature, and for a shared encoder its own loss."""

    def __init__(
        self,
        image: Side | SharedSide,
        text: Side | SharedSide,
        temperature: Temperature,
        rates: Sequence[tuple[nn.Parameter, float]],
        objective: LossSpec | None = None,
        shared: SharedLoss | None = None,
        undecayed: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.temperature = temperature
        self.shared = shared
        self.objective = objective or LossSpec()
        self._rates = list(rates)
        self._undecayed = list(undecayed)

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """Return (parameter, factor of the learning rate) for all that trains."""
        return self._rates

    def undecayed(self) -> list[nn.Parameter]:
        """Return what trains without weight decay, whatever its dimensions."""
        return self._undecayed

    def terms(
        self,
        image: Tensor,
        text: Tensor,
        rows: Sequence[int],
        groups: Groups | None = None,
        step: int = 0,
    ) -> LossTerms:
        """Compute the loss of one batch and its contrastive term.

        Args:
            image: the image side's `outputs`, float32.
            text: the text side's `outputs`, float32.
            rows: of the images in the store, which a teacher needs.
            groups: as for the losses.
            step: counted from 0.
        """
        if self.shared is not None:
            shared_terms: LossTerms = self.shared(
                image,
                text=text,
                rows=rows,
                outer=self.temperature,
                groups=groups,
            )
            return shared_terms
        spec = self.objective
        dim = self.image.dim
        # Behind the embeddings stand the pooled features, where the loss takes them.
        image_embedded = image[:, :dim]
        text_embedded = text[:, :dim]
        contrastive = contrast(
            image_embedded,
            text=text_embedded,
            temperature=self.temperature,
            groups=groups,
            spec=spec,
            widths=self._widths(),
        )
        if not spec.structure:
            return LossTerms(total=contrastive)
        image_term = structure_term(image[:, dim:], image_embedded, spec)
        text_term = structure_term(text[:, dim:], text_embedded, spec)
        structure = torch.stack([image_term, text_term]).mean()
        total = contrastive + structure_weight(step, spec) * structure
        return LossTerms(total=total, contrastive=contrastive.detach())

    def _widths(self) -> Sequence[int]:
        head = getattr(self.image, "head", None)
        return head.widths if isinstance(head, EnsembleHead) else ()

    def clamp(self) -> None:
        """Bring the temperatures back into their bounds."""
        self.temperature.clamp()
        if self.shared:
            self.shared.inner.clamp()

    @property
    def n_trained(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def kept_state(self) -> dict[str, Tensor]:
        """Return what training can change: trained parameters, and all of heads and temperature."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        prefixes = ("image.head.", "text.head.", "temperature.", "shared.")
        saved: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            # Both sides of a shared encoder have the same layers: the image's are enough.
            is_duplicate = name.startswith("text.layers.")
            if not is_duplicate and (name in trained or name.startswith(prefixes)):
                saved[name] = tensor
        return saved

    def final_state(self) -> dict[str, Tensor]:
        """Return `kept_state` without the teacher's bank, which only training uses."""
        return {name: tensor for name, tensor in self.kept_state().items() if ".bank." not in name}

    def load_kept(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `kept_state` gave.

        Raises:
            RunError: the names or shapes are not those of `kept_state`.
        """
        expected = self.kept_state()
        mismatched: list[str] = []
        for name in sorted(expected.keys() | tensors.keys()):
            if _shape(expected, name) != _shape(tensors, name):
                mismatched.append(name)
        if mismatched:
            raise RunError(
                f"saved weights do not fit the model of their recipe: {', '.join(mismatched[:3])}; "
                "train again"
            )
        self.load_state_dict(dict(tensors), strict=False)


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Hold the features that a shared encoder learns from."""

    dim: int
    """Width of the features, or number of classes."""
    features: Tensor | None = None
    """Of every image of a store, [n_images, dim]; None where nothing trains any more."""


def build_model(
    recipe: Recipe,
    encoders: Sequence[ImageEncoder | TextEncoder | None],
    dims: Sequence[int],
    device: torch.device,
    cuts: Sequence[int | None] = (None, None),
    teacher: Teacher | None = None,
) -> EncoderModel:
    """Build the recipe's model around loaded encoders; see `build_around`."""
    towers = [None if encoder is None else tower_of(encoder) for encoder in encoders]
    return build_around(towers, recipe=recipe, dims=dims, device=device, cuts=cuts, teacher=teacher)


def build_around(
    towers: Sequence[Tower | None],
    recipe: Recipe,
    dims: Sequence[int],
    device: torch.device,
    cuts: Sequence[int | None] = (None, None),
    teacher: Teacher | None = None,
) -> EncoderModel:
    """Build the recipe's model around towers. Weights are drawn from torch's generator.

    Args:
        towers: image before text; None: that side is cached.
        dims: widths of what the heads take.
        cuts: as of `Side`.
        teacher: for a shared encoder with distillation.

    Raises:
        RecipeError: as `fit_encoder` does.
    """
    if recipe.shared is not None:
        live_towers = [tower for tower in towers if tower]
        return build_shared(live_towers, recipe=recipe, device=device, teacher=teacher)
    try:
        heads = build_heads(recipe.image, text=recipe.text, image_dim=dims[0], text_dim=dims[1])
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None
    structured = recipe.loss.structure > 0
    sides: list[Side] = []
    for tower, head, cut in zip(towers, heads, cuts, strict=True):
        sides.append(Side(tower, head=head.to(device), cut=cut, structured=structured))
    # All adapters are in before the rules are applied: rules name adapters too.
    for side in sides:
        _prepare(side, recipe)
    live = [(side.tower, side.head) for side in sides if side.tower is not None]
    matches = freeze_towers(live, recipe.towers) if live else ()
    for side in sides:
        _require_frozen_below(side, matches, recipe)
        side.n_frozen_blocks = None if side.tower is None else find_cut(matches, side.tower).cut
    temperature = build_temperature(recipe.loss).to(device)
    rates: list[tuple[nn.Parameter, float]] = []
    for live_tower, live_head in live:
        rates += trained_parameters(live_tower, live_head, matches)
    modalities: tuple[Modality, ...] = ("image", "text")
    for modality, side in zip(modalities, sides, strict=True):
        if side.tower is None:
            rates += freeze_head(modality, side.head, recipe.towers)
    rates += [(p, 1.0) for p in temperature.parameters() if p.requires_grad]
    undecayed: list[nn.Parameter] = []
    for live_tower, _ in live:
        undecayed += spared_parameters(live_tower, matches, recipe.optimizer.undecayed)
    return EncoderModel(
        sides[0],
        text=sides[1],
        temperature=temperature,
        rates=rates,
        objective=recipe.loss,
        undecayed=undecayed,
    )


def build_shared(
    towers: Sequence[Tower],
    recipe: Recipe,
    device: torch.device,
    teacher: Teacher | None,
) -> EncoderModel:
    """Build a shared encoder around two towers, image before text.

    Raises RecipeError as `build_sides` does.
    """
    assert recipe.shared is not None
    image, text, rates, undecayed = build_sides(
        recipe,
        spec=recipe.shared,
        towers=towers,
        device=device,
    )
    outer = build_temperature(recipe.loss).to(device)
    inner = build_temperature(recipe.loss).to(device)
    distillation = None
    if recipe.distillation is not None:
        assert teacher is not None
        distillation = Distillation(
            recipe.distillation,
            dim=image.dim,
            teacher_dim=teacher.dim,
            teacher=teacher.features,
        ).to(device)
    loss = SharedLoss(image.dim, inner=inner, spec=recipe.loss, distillation=distillation)
    # The loss holds the inner temperature and the distillation's projection.
    loss_parameters = [*outer.parameters(), *loss.parameters()]
    rates += [(p, 1.0) for p in loss_parameters if p.requires_grad]
    return EncoderModel(
        image,
        text=text,
        temperature=outer,
        rates=rates,
        objective=recipe.loss,
        shared=loss,
        undecayed=undecayed,
    )


def _prepare(side: Side, recipe: Recipe) -> None:
    """Put the recipe's adapters into a side's tower, and set its checkpointing."""
    if side.tower is None:
        return
    if side.head.spec.standardize:
        raise RecipeError(
            f"recipe {recipe.name}: {side.tower.modality}.standardize takes the statistics of "
            "cached features, but "
            f"that tower trains; set {side.tower.modality}.standardize=false"
        )
    adapter = recipe.towers.adapter(side.tower.modality)
    if adapter:
        insert_adapters(side.tower, adapter)
    side.tower.checkpointing = recipe.towers.checkpointing


def _require_frozen_below(side: Side, matches: Sequence[FreezeDecision], recipe: Recipe) -> None:
    """Raise RecipeError if something below the cached tokens would train."""
    if side.tower is None or side.cut is None:
        return
    tower_cut = find_cut(matches, side.tower)
    is_lower = isinstance(tower_cut.cut, int) and tower_cut.cut < side.cut
    if tower_cut.cut is None or is_lower:
        raise RecipeError(
            f"recipe {recipe.name}: the {side.tower.modality} features are tokens after "
            f"{side.cut} blocks, but "
            f"{tower_cut.reason}; choose features of a lower layer, or of none"
        )
