"""The shared encoder: lower halves of an image and a text tower below one block for both
modalities, with a teacher.

Leveraging pretrained unimodal models for efficient image-text retrieval, sections 3.2 and 3.3, and
its published code.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.encoders.tower import MASKED, Tower
from apecache.errors import RecipeError
from apecache.fingerprint import Modality
from apecache.heads.normalization import normalize
from apecache.losses.contrastive import Groups, Temperature
from apecache.losses.distillation import TeacherBank, distil_classes, distil_contrastive, distil_mse
from apecache.losses.objective import contrast
from apecache.losses.spec import LossSpec
from apecache.models.freezing import freeze_towers, trained_parameters
from apecache.recipes.recipe import Recipe
from apecache.recipes.sections import DistillationSpec, SharedSpec


class SharedBlock(nn.Module):
    """Pre-norm attention and feed-forward, each branch times a learned scale per feature
    (LayerScale)."""

    def __init__(self, dim: int, spec: SharedSpec) -> None:
        super().__init__()
        self.n_heads = spec.n_heads or max(1, dim // 64)
        if dim % self.n_heads:
            raise RecipeError(
                f"shared.n_heads {self.n_heads} does not divide the towers' width {dim}"
            )
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.up = nn.Linear(dim, spec.expansion * dim)
        self.down = nn.Linear(spec.expansion * dim, dim)
        for layer in (self.qkv, self.project, self.up, self.down):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.scale1, self.scale2 = (
            nn.Parameter(torch.full((dim,), spec.layer_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [n, length, dim], mask int64 [n, length] -> (the feed-forward's first layer before
        its GELU, the output), `expansion` times as wide and as wide."""
        x = x + self.scale1 * self._attend(self.norm1(x), mask)
        inner = self.up(self.norm2(x))
        return inner, x + self.scale2 * self.down(F.gelu(inner))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        added = None if mask is None else (mask[:, None, None, :] == 0).to(query.dtype) * MASKED
        attended = F.scaled_dot_product_attention(query, key, value, added)
        projected: Tensor = self.project(attended.transpose(1, 2).flatten(2))
        return projected


class SharedLayers(nn.Module):
    """What both modalities go through: the embedding of the modality (image before text), and the
    block."""

    def __init__(self, dim: int, spec: SharedSpec) -> None:
        super().__init__()
        self.types = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.type_scale = nn.Parameter(torch.full((dim,), spec.type_scale))
        self.block = SharedBlock(dim, spec)

    def forward(self, x: Tensor, mask: Tensor | None, modality: Modality) -> tuple[Tensor, Tensor]:
        """The two outputs of the first token: [n, expansion x dim], [n, dim]."""
        own = self.types[0 if modality == "image" else 1]
        inner, output = self.block(x + own * self.type_scale, mask)
        return inner[:, 0], output[:, 0]


class SharedSide(nn.Module):
    """A tower cut off after its first blocks, and the layers of both sides -> [n, dim],
    L2-normalised, float32."""

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
        """Both contrastive points side by side, raw: [n, expansion x dim + dim]."""
        hidden = self.tower.run_to(self.tower.n_blocks, inputs, mask)
        return torch.cat(self.layers(hidden, mask, self.tower.modality), dim=-1)


class Distillation(nn.Module):
    """From the first token's output to the teacher's features (or classes). `teacher` [n_images,
    teacher_dim]: of every image of the store, by row; it is neither trained nor saved. Without one
    the loss cannot be had."""

    def __init__(
        self,
        spec: DistillationSpec,
        dim: int,
        teacher_dim: int,
        teacher: Tensor | None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, teacher_dim)
        self.teacher = teacher
        banked = spec.kind == "contrastive" and teacher is not None
        self.bank = TeacherBank(spec.bank, teacher_dim) if banked else None

    def forward(self, outputs: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """Mean over both modalities' outputs [k n, dim], k of them for each image; `rows`: of the n
        images. The teacher's features enter the bank afterwards."""
        assert self.teacher is not None
        teacher = self.teacher[torch.tensor(rows, device=self.teacher.device)].float()
        students = [self.project(self.norm(output)) for output in outputs]
        own = [
            torch.arange(len(teacher), device=teacher.device).repeat_interleave(
                len(x) // len(teacher)
            )
            for x in students
        ]
        match self.spec.kind:
            case "mse":
                losses = [
                    distil_mse(student, teacher[rows])
                    for student, rows in zip(students, own, strict=True)
                ]
            case "classes":
                losses = [
                    distil_classes(student, teacher[rows])
                    for student, rows in zip(students, own, strict=True)
                ]
            case "contrastive":
                losses = self._contrast(
                    [normalize(student, dim=-1) for student in students],
                    teacher,
                    own,
                )
        return torch.stack(losses).mean()

    def _contrast(
        self,
        students: Sequence[Tensor],
        teacher: Tensor,
        own: Sequence[Tensor],
    ) -> list[Tensor]:
        assert self.bank is not None
        unit = normalize(teacher, dim=-1)
        scale = 1 / self.spec.temperature
        pairs = zip(students, own, strict=True)
        losses = [
            distil_contrastive(student, teacher=unit, bank=self.bank.entries, scale=scale, own=rows)
            for student, rows in pairs
        ]
        self.bank.push(unit)
        return losses


class SharedLoss(nn.Module):
    """Mean of two contrastive losses, each with a scale of its own, plus the distillation, if there
    is one."""

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
    ) -> Tensor:
        """`image`, `text`: as `SharedSide.outputs` gives them, float32; of each image the same
        number of texts, one after another, in the order of `rows`."""
        inner = [normalize(side[:, : -self.dim], dim=-1) for side in (image, text)]
        outputs = [side[:, -self.dim :] for side in (image, text)]
        unit = [normalize(output, dim=-1) for output in outputs]
        first = contrast(
            inner[0],
            text=inner[1],
            temperature=self.inner,
            groups=groups,
            spec=self.spec,
        )
        both = (
            first
            + contrast(unit[0], text=unit[1], temperature=outer, groups=groups, spec=self.spec)
        ) / 2
        return both if self.distillation is None else both + self.distillation(outputs, rows)


def build_sides(
    recipe: Recipe,
    spec: SharedSpec,
    towers: Sequence[Tower],
    device: Any,
) -> tuple[SharedSide, SharedSide, list[tuple[nn.Parameter, float]]]:
    """Both sides, and (parameter, factor of the learning rate) of all that trains in them; the
    towers lose the blocks that do not count. Draws from torch's generator.

    Raises:
        RecipeError: towers of different widths, without a first token that sees all, or with too
            few blocks.
    """
    for tower, count in zip(towers, (spec.image_blocks, spec.text_blocks), strict=True):
        _cut_off(tower, count, recipe)
    if towers[0].dim != towers[1].dim:
        raise RecipeError(
            f"recipe {recipe.name}: the towers are {towers[0].dim} and {towers[1].dim} wide; one "
            "block serves both "
            "only if they are as wide as one another"
        )
    layers = SharedLayers(towers[0].dim, spec).to(device)
    matches = freeze_towers([(tower, nn.Identity()) for tower in towers], recipe.towers)
    pairs = [
        pair
        for tower in towers
        for pair in trained_parameters(tower, nn.Identity(), _below_end(matches, tower))
    ]
    reached = {id(parameter) for parameter, _ in pairs}
    for tower in towers:
        for parameter in tower.parameters():
            parameter.requires_grad_(id(parameter) in reached)
    return (
        SharedSide(towers[0], layers),
        SharedSide(towers[1], layers),
        [*pairs, *((p, 1.0) for p in layers.parameters())],
    )


def _below_end(matches: Any, tower: Tower) -> list[Any]:
    """What lies before the end of the last block: the final norm is not run."""
    return [
        match
        for match in matches
        if match.side == tower.modality and match.part.depth < tower.n_blocks
    ]


def _cut_off(tower: Tower, count: int, recipe: Recipe) -> None:
    if tower.n_blocks < count:
        raise RecipeError(
            f"recipe {recipe.name}: the {tower.modality} tower has {tower.n_blocks} blocks; set "
            f"shared.{tower.modality}_blocks to that or less"
        )
    if tower.anatomy.family == "t5" or getattr(tower.module, "cls_token", 0) is None:
        raise RecipeError(
            f"recipe {recipe.name}: the {tower.modality} tower has no CLS token; choose one "
            "that has"
        )
    if recipe.towers.adapter(tower.modality):
        raise RecipeError(f"recipe {recipe.name}: a shared encoder has no adapters; leave them out")
    blocks: Any = tower.blocks
    del blocks[count:]
    tower.checkpointing = recipe.towers.checkpointing
