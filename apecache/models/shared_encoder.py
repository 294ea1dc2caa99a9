"""Build the shared encoder: one block for both modalities above the lower halves of two towers.

A teacher may guide it. Source: "Leveraging pretrained unimodal models for efficient image-text
retrieval", sections 3.2 and 3.3, and its published code.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.encoders.tower import Tower
from apecache.encoders.tower_forward import MASKED
from apecache.errors import RecipeError
from apecache.fingerprint import Modality
from apecache.heads.normalization import normalize
from apecache.losses.contrastive import Groups, Temperature
from apecache.losses.distillation import TeacherBank, distil_classes, distil_contrastive, distil_mse
from apecache.losses.registry import LossTerms, contrast
from apecache.losses.spec import LossSpec
from apecache.models.freezing import (
    FreezeDecision,
    freeze_towers,
    spared_parameters,
    trained_parameters,
)
from apecache.recipes.recipe import Recipe
from apecache.recipes.sections import DistillationSpec, SharedSpec

STD = 0.02
"""Of linear layers before the truncation at one deviation, which leaves 0.0108."""
NORM_EPS = 1e-6


def draw_linear(layer: nn.Linear) -> None:
    """Draw a new linear layer as the published code does: N(0, 0.02) cut at +-0.02, biases 0."""
    nn.init.trunc_normal_(layer.weight, std=STD, a=-STD, b=STD)
    nn.init.zeros_(layer.bias)


class SharedBlock(nn.Module):
    """Apply pre-norm attention and feed-forward, each with LayerScale.

    LayerScale is a learned scale for each feature.
    """

    def __init__(self, dim: int, spec: SharedSpec) -> None:
        super().__init__()
        self.n_heads = spec.n_heads or max(1, dim // 64)
        if dim % self.n_heads:
            raise RecipeError(
                f"shared.n_heads {self.n_heads} does not divide the towers' width {dim}"
            )
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, spec.expansion * dim)
        self.down = nn.Linear(spec.expansion * dim, dim)
        for layer in (self.qkv, self.project, self.up, self.down):
            draw_linear(layer)
        self.scale1 = nn.Parameter(torch.full((dim,), spec.layer_scale))
        self.scale2 = nn.Parameter(torch.full((dim,), spec.layer_scale))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: tokens [n, length, dim].
            mask: int64 [n, length], 0 for padding.

        Returns:
            The feed-forward's first layer before its GELU, [n, length, expansion x dim], and the
            output, [n, length, dim].
        """
        x = x + self.scale1 * self._attend(self.norm1(x), mask)
        inner = self.up(self.norm2(x))
        return inner, x + self.scale2 * self.down(F.gelu(inner))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # [n, length, 3 dim] -> three of [n, n_heads, length, head_dim].
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        score_mask = None
        if mask is not None:
            is_padding = mask[:, None, None, :] == 0
            score_mask = is_padding.to(query.dtype) * MASKED
        attended = F.scaled_dot_product_attention(query, key, value, score_mask)
        joined_heads = attended.transpose(1, 2).flatten(2)
        projected: Tensor = self.project(joined_heads)
        return projected


class SharedLayers(nn.Module):
    """Apply what both modalities share: the embedding of the modality, and the block."""

    def __init__(self, dim: int, spec: SharedSpec) -> None:
        super().__init__()
        # Image before text.
        self.types = nn.Parameter(torch.randn(2, dim))
        self.type_scale = nn.Parameter(torch.full((dim,), spec.type_scale))
        self.block = SharedBlock(dim, spec)

    def forward(self, x: Tensor, mask: Tensor | None, modality: Modality) -> tuple[Tensor, Tensor]:
        """Return the two outputs of the first token: [n, expansion x dim], [n, dim]."""
        modality_embedding = self.types[0 if modality == "image" else 1]
        inner, output = self.block(x + modality_embedding * self.type_scale, mask)
        return inner[:, 0], output[:, 0]


class SharedSide(nn.Module):
    """Embed one modality by a shortened tower and the shared layers.

    Outputs are [n, dim], L2-normalized, float32.
    """

    cut = None

    def __init__(self, tower: Tower, layers: SharedLayers) -> None:
        super().__init__()
        self.tower = tower
        self.layers = layers

    @property
    def dim(self) -> int:
        return self.tower.dim

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return normalize(self.outputs(inputs, mask)[:, -self.dim :])

    def outputs(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return both outputs of the shared layers side by side, [n, expansion x dim + dim].

        They are not normalized.
        """
        hidden = self.tower.run_to(self.tower.n_blocks, inputs, mask)
        layer_outputs = self.layers(hidden, mask, self.tower.modality)
        return torch.cat(layer_outputs, dim=-1)


class Distillation(nn.Module):
    """Compare the first token's output with the teacher's features (or classes).

    Args:
        teacher: of every image of the store by row, [n_images, teacher_dim]; neither trained nor
            saved. None: the loss cannot be computed.
    """

    def __init__(
        self,
        spec: DistillationSpec,
        dim: int,
        teacher_dim: int,
        teacher: Tensor | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.project = nn.Linear(dim, teacher_dim)
        draw_linear(self.project)
        self.teacher = teacher
        banked = spec.kind == "contrastive" and teacher is not None
        self.bank = TeacherBank(spec.bank, teacher_dim) if banked else None

    def forward(
        self,
        outputs: Sequence[Tensor],
        rows: Sequence[int],
        groups: Groups | None = None,
    ) -> Tensor:
        """Return the mean loss over both modalities.

        The teacher's features enter the bank afterwards.

        Args:
            outputs: for each modality [k n, dim], with k of them for each of the n images.
            rows: of the n images in the store.
            groups: as for the losses; images of one group are no wrong answers for one another.
        """
        assert self.teacher is not None
        teacher = self.teacher[torch.tensor(rows, device=self.teacher.device)].float()
        students = [self.project(self.norm(output)) for output in outputs]
        # For each student the index of its image within this batch.
        image_indices: list[Tensor] = []
        for student in students:
            n_per_image = len(student) // len(teacher)
            indices = torch.arange(len(teacher), device=teacher.device)
            image_indices.append(indices.repeat_interleave(n_per_image))
        losses: list[Tensor] = []
        match self.spec.kind:
            case "mse":
                for student, indices in zip(students, image_indices, strict=True):
                    losses.append(distil_mse(student, teacher[indices]))
            case "classes":
                for student, indices in zip(students, image_indices, strict=True):
                    losses.append(distil_classes(student, teacher[indices]))
            case "contrastive":
                unit_students = [normalize(student, dim=-1) for student in students]
                losses = self._contrast(
                    unit_students,
                    teacher=teacher,
                    image_indices=image_indices,
                    groups=groups,
                )
        return torch.stack(losses).mean()

    def _contrast(
        self,
        students: Sequence[Tensor],
        teacher: Tensor,
        image_indices: Sequence[Tensor],
        groups: Groups | None,
    ) -> list[Tensor]:
        """Return one contrastive loss for each modality, and put the teacher into the bank."""
        assert self.bank is not None
        unit_teacher = normalize(teacher, dim=-1)
        scale = 1 / self.spec.temperature
        losses: list[Tensor] = []
        for student, indices in zip(students, image_indices, strict=True):
            loss = distil_contrastive(
                student,
                teacher=unit_teacher,
                bank=self.bank.entries,
                scale=scale,
                own=indices,
                groups=None if groups is None else groups.image,
            )
            losses.append(loss)
        # Last: a batch must not find its own features among the bank's negatives.
        self.bank.push(unit_teacher)
        return losses


class SharedLoss(nn.Module):
    """Compute the mean of two contrastive losses, each with its own scale, and any distillation."""

    def __init__(
        self,
        dim: int,
        inner: Temperature,
        spec: LossSpec,
        distillation: Distillation | None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.inner = inner
        self.spec = spec
        self.distillation = distillation

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        rows: Sequence[int],
        outer: Temperature,
        groups: Groups | None = None,
    ) -> LossTerms:
        """Compute the loss of one batch.

        Args:
            image: as `SharedSide.outputs` gives it, float32.
            text: likewise; every image has the same number of texts, one after another.
            rows: of the images in the store, in the order of the batch.
            outer: temperature of the loss on the block's output.
            groups: as for the losses.
        """
        inner_image = normalize(image[:, : -self.dim], dim=-1)
        inner_text = normalize(text[:, : -self.dim], dim=-1)
        image_output = image[:, -self.dim :]
        text_output = text[:, -self.dim :]
        unit_image = normalize(image_output, dim=-1)
        unit_text = normalize(text_output, dim=-1)
        inner_loss = contrast(
            inner_image,
            text=inner_text,
            temperature=self.inner,
            groups=groups,
            spec=self.spec,
        )
        outer_loss = contrast(
            unit_image,
            text=unit_text,
            temperature=outer,
            groups=groups,
            spec=self.spec,
        )
        contrastive = (inner_loss + outer_loss) / 2
        if self.distillation is None:
            return LossTerms(total=contrastive)
        distilled: Tensor = self.distillation([image_output, text_output], rows, groups)
        return LossTerms(total=contrastive + distilled, contrastive=contrastive.detach())


def build_sides(
    recipe: Recipe,
    spec: SharedSpec,
    towers: Sequence[Tower],
    device: torch.device,
) -> tuple[SharedSide, SharedSide, list[tuple[nn.Parameter, float]], list[nn.Parameter]]:
    """Build both sides; the towers lose their upper blocks.

    Weights are drawn from torch's generator.

    Args:
        towers: image before text.

    Returns:
        The image side, the text side, (parameter, factor of the learning rate) for all that trains
        in them, and what of it is not decayed.

    Raises:
        RecipeError: towers of different widths, without a CLS token, or with too few blocks.
    """
    block_counts = (spec.image_blocks, spec.text_blocks)
    for tower, n_blocks in zip(towers, block_counts, strict=True):
        _cut_off(tower, n_blocks, recipe)
    if towers[0].dim != towers[1].dim:
        raise RecipeError(
            f"recipe {recipe.name}: the towers are {towers[0].dim} and {towers[1].dim} wide; one "
            "block serves both "
            "only if they are as wide as one another"
        )
    layers = SharedLayers(towers[0].dim, spec).to(device)
    # The shared layers stand in for both heads, and always train.
    matches = freeze_towers([(tower, nn.Identity()) for tower in towers], recipe.towers)
    spared_sections = recipe.optimizer.undecayed
    rates: list[tuple[nn.Parameter, float]] = []
    undecayed: list[nn.Parameter] = []
    for tower in towers:
        tower_matches = _below_end(matches, tower)
        rates += trained_parameters(tower, nn.Identity(), tower_matches)
        undecayed += spared_parameters(tower, tower_matches, spared_sections)
    if "token_types" in spared_sections:
        undecayed.append(layers.types)
    trained_ids = {id(parameter) for parameter, _ in rates}
    for tower in towers:
        for parameter in tower.parameters():
            parameter.requires_grad_(id(parameter) in trained_ids)
    rates += [(parameter, 1.0) for parameter in layers.parameters()]
    return SharedSide(towers[0], layers), SharedSide(towers[1], layers), rates, undecayed


def _below_end(matches: Sequence[FreezeDecision], tower: Tower) -> list[FreezeDecision]:
    """Return the matches before the end of the tower's last block: the final norm is not run."""
    return [
        match
        for match in matches
        if match.side == tower.modality and match.part.depth < tower.n_blocks
    ]


def _cut_off(tower: Tower, n_blocks: int, recipe: Recipe) -> None:
    """Remove the tower's upper blocks, and refuse a tower that cannot be shared."""
    if tower.n_blocks < n_blocks:
        raise RecipeError(
            f"recipe {recipe.name}: the {tower.modality} tower has {tower.n_blocks} blocks; set "
            f"shared.{tower.modality}_blocks to that or less"
        )
    if not tower.has_cls:
        raise RecipeError(
            f"recipe {recipe.name}: the {tower.modality} tower has no CLS token; choose one "
            "that has"
        )
    if recipe.towers.adapter(tower.modality):
        raise RecipeError(f"recipe {recipe.name}: a shared encoder has no adapters; leave them out")
    blocks: Any = tower.blocks
    del blocks[n_blocks:]
    tower.checkpointing = recipe.towers.checkpointing
