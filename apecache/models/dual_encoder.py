"""The model of the encoder trainer: two sides, each a tower (unless it is cached) and a head, and a
temperature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.tower import Cut, Tower, tower_of
from apecache.errors import RecipeError, RunError
from apecache.fingerprint import Modality
from apecache.heads.build import build_heads
from apecache.heads.head import Head, SeveralHeads
from apecache.losses.contrastive import Groups, Temperature
from apecache.losses.objective import build_temperature, contrast, structure_term, structure_weight
from apecache.losses.spec import LossSpec
from apecache.models.adapters import insert_adapters
from apecache.models.freezing import Match, find_cut, freeze_head, freeze_towers, trained_parameters
from apecache.models.shared_encoder import Distillation, SharedLoss, SharedSide, build_sides
from apecache.recipes.recipe import Recipe


class Side(nn.Module):
    """A tower, unless its output comes from the cache, and a head: -> [n, dim], L2-normalised,
    float32. `cut`: inputs are the tokens after so many blocks; None: pixels or token ids. `still`:
    so many blocks, and the embeddings, train nothing and run without dropout, cached or not;
    `pooled`: the whole tower. `structured`: the loss compares what the head gives with what it is
    given."""

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
        self.still: Cut | None = None

    def train(self, mode: bool = True) -> "Side":
        super().train(mode)
        if mode and self.tower is not None and self.still is not None:
            self.tower.module.eval()
            for block in self.tower.blocks[
                self.tower.n_blocks if self.still == "pooled" else self.still :
            ]:
                block.train()
        return self

    @property
    def dim(self) -> int:
        return self.head.out_dim

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded: Tensor = self.head(self._pooled(inputs, mask))
        return embedded

    def outputs(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the loss takes: [n, dim], or with `structured` [n, dim + in_dim], the pooled
        features behind."""
        pooled = self._pooled(inputs, mask)
        embedded: Tensor = self.head(pooled)
        return (
            torch.cat([embedded, pooled.detach().to(embedded.dtype)], dim=-1)
            if self.structured
            else embedded
        )

    def _pooled(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        if self.tower is None:
            return inputs
        if self.cut is None:
            return self.tower(inputs, mask)  # type: ignore[no-any-return]
        return self.tower.forward_from(self.cut, inputs, mask)


class EncoderModel(nn.Module):
    """Two sides, a temperature, and for a shared encoder a loss of its own."""

    def __init__(
        self,
        image: Side | SharedSide,
        text: Side | SharedSide,
        temperature: Temperature,
        rates: Sequence[tuple[nn.Parameter, float]],
        objective: LossSpec | None = None,
        shared: SharedLoss | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.temperature = temperature
        self.shared = shared
        self.objective = objective or LossSpec()
        self._rates = list(rates)

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """What trains, each with its factor of the learning rate."""
        return self._rates

    def loss(
        self,
        image: Tensor,
        text: Tensor,
        rows: Sequence[int],
        groups: Groups | None = None,
        step: int = 0,
    ) -> Tensor:
        """From the sides' `outputs`, float32, at the 0-based `step`. `rows`: of the images, which a
        teacher needs; `groups` as for the losses."""
        if self.shared is not None:
            return self.shared(image, text, rows, self.temperature, groups)  # type: ignore[no-any-return]
        spec = self.objective
        dim = self.image.dim
        ends = image[:, :dim], text[:, :dim]
        total = contrast(*ends, self.temperature, groups, spec, self._widths())
        if spec.structure:
            terms = [
                structure_term(side[:, dim:], end, spec)
                for side, end in zip((image, text), ends, strict=True)
            ]
            total = total + structure_weight(step, spec) * torch.stack(terms).mean()
        return total

    def _widths(self) -> Sequence[int]:
        head = getattr(self.image, "head", None)
        return head.widths if isinstance(head, SeveralHeads) else ()

    def clamp(self) -> None:
        """Bring the temperatures back into their bounds."""
        for temperature in (self.temperature, *((self.shared.inner,) if self.shared else ())):
            temperature.clamp()

    @property
    def n_trained(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def kept_state(self) -> dict[str, Tensor]:
        """What training can change: trained parameters, and all of heads and temperature."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        ours = ("image.head.", "text.head.", "temperature.", "shared.")
        kept = {n: t for n, t in self.state_dict().items() if n in trained or n.startswith(ours)}
        return {
            name: tensor for name, tensor in kept.items() if not name.startswith("text.layers.")
        }  # the image's

    def final_state(self) -> dict[str, Tensor]:
        """The same without what is of use in training only."""
        return {name: tensor for name, tensor in self.kept_state().items() if ".bank." not in name}

    def load_kept(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises RunError unless these are what `kept_state` gives."""
        wanted = self.kept_state()
        wrong = sorted(
            n for n in wanted.keys() | tensors.keys() if _shape(wanted, n) != _shape(tensors, n)
        )
        if wrong:
            raise RunError(
                f"saved weights do not fit the model of their recipe: {', '.join(wrong[:3])}; "
                "train again"
            )
        self.load_state_dict(dict(tensors), strict=False)


def _shape(tensors: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Width of what is taught, and of every image of a store [n_images, dim]; None where nothing
    trains any more."""

    dim: int
    features: Tensor | None = None


def build_model(
    recipe: Recipe,
    encoders: Sequence[ImageEncoder | TextEncoder | None],
    dims: Sequence[int],
    device: torch.device,
    cuts: Sequence[int | None] = (None, None),
    teacher: Teacher | None = None,
) -> EncoderModel:
    """`build_around` the towers of loaded encoders."""
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
    """The recipe's model around towers, image before text (None: that side is cached). `dims`: what
    the heads take; `cuts`: as of `Side`. Draws from torch's generator. Raises RecipeError as
    `fit_encoder` does."""
    if recipe.shared is not None:
        return build_shared(
            [tower for tower in towers if tower],
            recipe=recipe,
            device=device,
            teacher=teacher,
        )
    try:
        heads = build_heads(recipe.image, text=recipe.text, image_dim=dims[0], text_dim=dims[1])
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: {error}") from None
    structured = recipe.loss.structure > 0
    parts = zip(towers, heads, cuts, strict=True)
    sides = [
        Side(tower, head=head.to(device), cut=cut, structured=structured)
        for tower, head, cut in parts
    ]
    for side in sides:
        _prepare(side, recipe)
    live = [(side.tower, side.head) for side in sides if side.tower is not None]
    matches = freeze_towers(live, recipe.towers) if live else ()
    for side in sides:
        _require_frozen_below(side, matches, recipe)
        side.still = None if side.tower is None else find_cut(matches, side.tower).cut
    temperature = build_temperature(recipe.loss).to(device)
    pairs = [pair for tower, head in live for pair in trained_parameters(tower, head, matches)]
    names: tuple[Modality, ...] = ("image", "text")
    cached = [
        (name, side.head) for name, side in zip(names, sides, strict=True) if side.tower is None
    ]
    pairs += [pair for name, head in cached for pair in freeze_head(name, head, recipe.towers)]
    pairs += [(p, 1.0) for p in temperature.parameters() if p.requires_grad]
    return EncoderModel(
        sides[0],
        text=sides[1],
        temperature=temperature,
        rates=pairs,
        objective=recipe.loss,
    )


def build_shared(
    towers: Sequence[Tower],
    recipe: Recipe,
    device: torch.device,
    teacher: Teacher | None,
) -> EncoderModel:
    """A shared encoder around two towers, image before text. Raises RecipeError as `build_sides`
    does."""
    assert recipe.shared is not None
    image, text, pairs = build_sides(recipe, spec=recipe.shared, towers=towers, device=device)
    outer, inner = (build_temperature(recipe.loss).to(device) for _ in range(2))
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
    pairs += [(p, 1.0) for module in (outer, loss) for p in module.parameters() if p.requires_grad]
    return EncoderModel(
        image,
        text=text,
        temperature=outer,
        rates=pairs,
        objective=recipe.loss,
        shared=loss,
    )


def _prepare(side: Side, recipe: Recipe) -> None:
    if side.tower is None:
        return
    if side.head.spec.standardise:
        raise RecipeError(
            f"recipe {recipe.name}: {side.tower.modality}.standardise takes the statistics of "
            "cached features, but "
            f"that tower trains; set {side.tower.modality}.standardise=false"
        )
    adapter = recipe.towers.adapter(side.tower.modality)
    if adapter:
        insert_adapters(side.tower, adapter)
    side.tower.checkpointing = recipe.towers.checkpointing


def _require_frozen_below(side: Side, matches: Sequence[Match], recipe: Recipe) -> None:
    """Raises RecipeError if something below the cached tokens would train."""
    if side.tower is None or side.cut is None:
        return
    found = find_cut(matches, side.tower)
    if found.cut is None or (isinstance(found.cut, int) and found.cut < side.cut):
        raise RecipeError(
            f"recipe {recipe.name}: the {side.tower.modality} features are tokens after "
            f"{side.cut} blocks, but "
            f"{found.reason}; choose features of a lower layer, or of none"
        )
