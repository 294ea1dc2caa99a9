"""Compute what a student learns from a teacher's features.

Sources: the shared-encoder paper, section 3.3; See, Hear and Read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.normalization import at_least_float32, normalize, similarities
from apecache.losses.contrastive import one_way


def distil_contrastive(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    scale: Tensor | float,
    own: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """Compute the cross-entropy of finding each student's teacher among this batch and a bank.

    Neither teacher nor bank gets a gradient.

    Args:
        student: [m, dim], L2-normalized, of images or captions.
        teacher: [n, dim], L2-normalized, of images.
        bank: [k, dim], L2-normalized features of the teacher; k may be 0.
        scale: factor of the cosines, 1 / temperature.
        own: int64 [m], the row in `teacher` of each student. None: row i belongs to row i.
        groups: int64 [n], the group of each image of `teacher`. All of its group are right for a
            student, with equal weights as in `grouped_info_nce`. None: its own alone is.

    Returns:
        A scalar, in nats.
    """
    candidates = torch.cat([teacher, bank]).detach()
    targets = torch.arange(len(student), device=student.device) if own is None else own
    logits = similarities(scale * at_least_float32(student), candidates)
    if groups is None:
        return F.cross_entropy(logits, targets)
    is_right = groups[targets].unsqueeze(1) == groups.unsqueeze(0)
    # The groups of the bank's features are not known: all of them are wrong answers.
    is_right = F.pad(is_right, (0, len(bank)))
    rows, columns = is_right.nonzero(as_tuple=True)
    return one_way(logits, logits.masked_fill(is_right, -torch.inf), (rows, columns))


def distil_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of features [n, dim], without normalizing them."""
    return F.mse_loss(student, teacher.detach())


def distil_classes(logits: Tensor, teacher: Tensor) -> Tensor:
    """Compute KL(teacher, student) of class distributions in nats, averaged over rows.

    Args:
        logits: [n, classes], of the student.
        teacher: [n, classes], probabilities whose rows sum to 1.
    """
    log_probabilities = F.log_softmax(at_least_float32(logits), dim=-1)
    # `batchmean` divides by rows; the default of kl_div divides by all values.
    return F.kl_div(log_probabilities, teacher.detach(), reduction="batchmean")


class TeacherBank(nn.Module):
    """Hold the last `size` features of the teacher, first in, first out.

    It starts with random unit vectors. Never push features of the *student*: stale ones make the
    training collapse (shared-encoder paper).
    """

    # Buffers, so that they are saved, moved between devices and never trained.
    entries: Tensor
    """[size, dim], L2-normalized."""
    position: Tensor
    """int64 scalar, the row of the oldest entry."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("entries", normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, teacher: Tensor) -> None:
        """Replace the oldest entries by features [n, dim], L2-normalized.

        Of more than `size` features only the last ones stay.
        """
        size = len(self.entries)
        newest = teacher[-size:]
        offsets = torch.arange(len(newest), device=self.entries.device)
        slots = (self.position + offsets) % size
        self.entries[slots] = newest.to(self.entries)
        self.position.copy_((self.position + len(newest)) % size)
