"""Hold one parameter of all members of a population in one tensor.

The parameters of the members become views of the stack, and so do their gradients: an update of
one is an update of the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StackedParameter:
    """Hold a parameter of all members [k, …] and its gradient; the members have views of both.

    The first gradient after `StackedHeads.forget` replaces the old one; later ones are added.
    """

    def __init__(self, members: Sequence[nn.Parameter]) -> None:
        self.members = members
        self.value = torch.stack([member.detach() for member in members])
        self.trained = members[0].requires_grad
        self.fresh = True
        self.gradient = torch.zeros_like(self.value) if self.trained else None
        for i, member in enumerate(members):
            member.data = self.value[i]
            member.grad = None if self.gradient is None else self.gradient[i]

    def add(self, gradient: Tensor) -> None:
        """Add a gradient [k, …]."""
        if self.gradient is None:
            return
        if self.fresh:
            self.gradient.copy_(gradient)
        else:
            self.gradient.add_(gradient)
        self.fresh = False

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add the gradient `left @ right`, member by member, without a tensor for the product."""
        if self.gradient is None:
            return
        # With beta 0 the old gradient is not read, so that nothing has to be set to zero.
        beta = 0 if self.fresh else 1
        torch.baddbmm(self.gradient, left, right, beta=beta, out=self.gradient)
        self.fresh = False

    def move(self, value: Tensor, gradient: Tensor) -> None:
        """Move a trained parameter and its gradient to other memory of the same shape."""
        value.copy_(self.value)
        self.value = value
        self.gradient = gradient
        for i, member in enumerate(self.members):
            member.data = value[i]
            member.grad = gradient[i]

    def release(self) -> None:
        """Give members memory of their own."""
        for member in self.members:
            member.data = member.data.clone()
            member.grad = None
