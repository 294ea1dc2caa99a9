"""What a student learns from a teacher's features (the shared-encoder paper, section 3.3; See, Hear
and Read)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apecache.heads.normalization import at_least_float32, normalize, similarities


def distil_contrastive(
    student: Tensor,
    teacher: Tensor,
    bank: Tensor,
    scale: Tensor | float,
    own: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of finding the own teacher's feature among this batch's and a bank's.

    Args:
        student [m, dim], teacher [n, dim]: L2-normalised, of images (or captions) and of images.
            own: int64 [m], the
        row of the teacher of each; None: row by row. bank: [k, dim], L2-normalised features of the
        teacher; k may be 0. Neither teacher nor bank gets a gradient.
    """
    candidates = torch.cat([teacher, bank]).detach()
    targets = torch.arange(len(student), device=student.device) if own is None else own
    return F.cross_entropy(similarities(scale * at_least_float32(student), candidates), targets)


def distil_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features [n, dim], as they are (nothing is normalised here)."""
    return F.mse_loss(student, teacher.detach())


def distil_classes(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher, student) of class distributions in nats, mean over rows.

    `logits` of the student [n, classes]; `teacher` probabilities [n, classes], rows of sum 1.
    """
    return F.kl_div(
        F.log_softmax(at_least_float32(logits), dim=-1),
        teacher.detach(),
        reduction="batchmean",
    )


class TeacherBank(nn.Module):
    """The last `size` features of the teacher, first in first out; random unit vectors at the
    start.

    Features of the *student* do not belong here: stale ones make the training collapse
    (shared-encoder paper). Entries and position are buffers, hence saved, moved to a device and
    never trained.
    """

    entries: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("entries", normalize(torch.randn(size, dim), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, teacher: Tensor) -> None:
        """Put features [n, dim], L2-normalised, in place of the oldest; of more than `size` only
        the last stay."""
        size = len(self.entries)
        kept = teacher[-size:]
        places = (self.position + torch.arange(len(kept), device=self.entries.device)) % size
        self.entries[places] = kept.to(self.entries)
        self.position.copy_((self.position + len(kept)) % size)
