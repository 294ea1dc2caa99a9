"""Update the weights of all members by AdamW, Adam or Lion in a few operations.

On an accelerator an optimizer of each member would be several launches a member. Here the
weights of all members are one matrix with a row for each member, and so are gradients and moments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apecache.recipes.schedule import OptimizerSpec
from apecache.sweeps.population.stacked_parameter import StackedParameter
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import rates_at

ALIGNED = 4
"""Numbers of float32 in 16 bytes."""
N_SCALARS = 3
"""Numbers of a member's step: `StackedOptimizer.scalars_at`."""


def can_share_optimizer(members: Sequence[HeadFit]) -> bool:
    """Check whether one `StackedOptimizer` can update all members."""
    # Members of one kind whose same parameters are decayed.
    kinds = {
        (member.recipe.optimizer.kind, member.recipe.optimizer.decay_scalars) for member in members
    }
    has_average = {member.average is not None for member in members}
    # An average has copies of running statistics too, which are no weights.
    has_statistics = any(
        isinstance(module, nn.BatchNorm1d) for module in members[0].model.modules()
    )
    if len(kinds) > 1 or len(has_average) > 1 or (has_statistics and True in has_average):
        return False
    return members[0].recipe.optimizer.kind in ("adamw", "adam", "lion")


class StackedOptimizer:
    """Hold weights, gradients and moments of all members, [k, n_weights] each.

    The members' parameters, gradients and optimizer states become views of these.

    Args:
        members: Fits for which `can_share_optimizer` holds.
        stacks: The parameters of all members.
    """

    def __init__(self, members: Sequence[HeadFit], stacks: Sequence[StackedParameter]) -> None:
        self.members = members
        # Weights that decay come first, so that they are one slice.
        self.stacks = sorted(
            (stack for stack in stacks if stack.trained),
            key=lambda stack: not _is_decayed(stack, members[0].recipe.optimizer),
        )
        settings = [member.recipe.optimizer for member in members]
        self.kind = settings[0].kind
        device = stacks[0].value.device
        # Tensor cores read matrices that begin at a multiple of 16 bytes.
        widths = [-(-stack.value[0].numel() // ALIGNED) * ALIGNED for stack in self.stacks]
        shape = (len(members), sum(widths))
        self.values = torch.zeros(shape, device=device)
        self.gradients = torch.zeros(shape, device=device)
        self.first = torch.zeros(shape, device=device)
        self.second = None if self.kind == "lion" else torch.zeros(shape, device=device)
        self.steps = torch.zeros(len(members), len(self.stacks), device=device)
        self.average = None if members[0].average is None else torch.zeros(shape, device=device)
        self.n_decayed = sum(
            width
            for stack, width in zip(self.stacks, widths, strict=True)
            if _is_decayed(stack, settings[0])
        )
        begin = 0
        for number, (stack, width) in enumerate(zip(self.stacks, widths, strict=True)):
            columns = slice(begin, begin + stack.value[0].numel())
            begin += width
            stack.move(
                self.values[:, columns].view(stack.value.shape),
                self.gradients[:, columns].view(stack.value.shape),
            )
            self._take_states(stack, columns, number)
            self._take_averages(stack, columns)
        first_beta = torch.tensor([[setting.betas[0]] for setting in settings])
        second_beta = torch.tensor([[setting.betas[1]] for setting in settings])
        self.first_weight = (1 - first_beta).to(device)
        self.second_weight = (1 - second_beta).to(device)
        self.eps = torch.tensor([[setting.eps] for setting in settings]).to(device)
        self.average_weight = torch.tensor([[1 - setting.ema] for setting in settings]).to(device)
        self.longest: Tensor | None = None
        if any(setting.clip for setting in settings):
            lengths = [[setting.clip or torch.inf] for setting in settings]
            self.longest = torch.tensor(lengths).to(device)

    def _take_states(self, stack: StackedParameter, columns: slice, number: int) -> None:
        """Let the optimizers' states of a parameter be views, with the values that they have."""
        for i, (member, parameter) in enumerate(zip(self.members, stack.members, strict=True)):
            assert member.optimizer is not None
            state = member.optimizer.state[parameter]
            moments = {"exp_avg": self.first}
            if self.second is not None:
                moments["exp_avg_sq"] = self.second
            for name, moment in moments.items():
                view = moment[i, columns].view(parameter.shape)
                if name in state:
                    view.copy_(state[name])
                state[name] = view
            if self.kind == "lion":
                continue
            step = self.steps[i, number]
            if "step" in state:
                step.copy_(state["step"])
            state["step"] = step

    def _take_averages(self, stack: StackedParameter, columns: slice) -> None:
        """Let the members' averages of a parameter be views, with the values that they have."""
        if self.average is None:
            return
        for i, (member, parameter) in enumerate(zip(self.members, stack.members, strict=True)):
            assert member.average is not None
            (name,) = (n for n, p in member.model.named_parameters() if p is parameter)
            view = self.average[i, columns].view(parameter.shape)
            member.average[name] = view.copy_(member.average[name])

    def scalars_at(self, step: int, plan: StepCount) -> list[list[float]]:
        """Return the numbers of each member's update at a step, [k, N_SCALARS].

        Args:
            step: Step of the fit, from 0.
            plan: The plan of every member.
        """
        scalars: list[list[float]] = []
        for member in self.members:
            setting = member.recipe.optimizer
            # Heads have one learning rate for all of their parameters.
            rate = rates_at(member, step, plan)[0]
            first_correction = 1 - setting.betas[0] ** (step + 1)
            second_correction = 1 - setting.betas[1] ** (step + 1)
            decay = setting.weight_decay
            if self.kind != "adam":
                decay = 1 - rate * setting.weight_decay
            if self.kind == "lion":
                # Lion's moment is not corrected for its start at zero.
                first_correction = 1.0
            scalars.append([-rate / first_correction, second_correction**-0.5, decay])
        return scalars

    @torch.no_grad()
    def update(self, scalars: Tensor) -> None:
        """Update all weights from the present gradients.

        Args:
            scalars: float32 [k, N_SCALARS] on the device, as `scalars_at` gives them.
        """
        rate, correction, decay = scalars.split(1, dim=1)
        self.steps.add_(1)
        if self.longest is not None:
            lengths = torch.linalg.vector_norm(self.gradients, dim=1, keepdim=True)
            # The bound of torch's `clip_grad_norm_`, for a gradient of zeros.
            self.gradients.mul_((self.longest / (lengths + 1e-6)).clamp_(max=1.0))
        decayed = self.values[:, : self.n_decayed]
        if self.kind == "adam":
            self.gradients[:, : self.n_decayed].addcmul_(decayed, decay)
        else:
            decayed.mul_(decay)
        if self.second is None:
            direction = torch.lerp(self.first, self.gradients, self.first_weight).sign_()
            self.values.addcmul_(direction, rate)
            self.first.lerp_(self.gradients, self.second_weight)
            return
        self.first.lerp_(self.gradients, self.first_weight)
        self.second.lerp_(self.gradients.square(), self.second_weight)
        deviation = self.second.sqrt().mul_(correction).add_(self.eps)
        self.values.addcmul_(self.first.div(deviation), rate)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the averages toward the weights, once the temperatures are within their bounds."""
        if self.average is not None:
            self.average.lerp_(self.values, self.average_weight)

    def release(self) -> None:
        """Give optimizers' states and averages memory of their own."""
        for member in self.members:
            if member.average is not None:
                member.average = {name: t.clone() for name, t in member.average.items()}
        for stack in self.stacks:
            for member, parameter in zip(self.members, stack.members, strict=True):
                assert member.optimizer is not None
                state = member.optimizer.state[parameter]
                for name, tensor in state.items():
                    state[name] = tensor.clone()


def _is_decayed(stack: StackedParameter, setting: OptimizerSpec) -> bool:
    """Return whether weight decay applies to a parameter, as in `parameter_groups`."""
    # The first dimension is that of the members.
    n_dimensions = stack.value.ndim - 1
    return n_dimensions >= 2 or (n_dimensions == 0 and setting.decay_scalars)
