"""Choose the device that tensors live on."""

import torch

from apecache.errors import OptionError


def resolve_device(name: str) -> torch.device:
    """Return the device of a name, with its index: `cuda` is `cuda:0`, as tensors on it say.

    Args:
        name: `auto`, which is CUDA if there is any, else the CPU, or a name as torch takes it.

    Raises:
        OptionError: the device cannot be used.
    """
    torch_name = name
    if name == "auto":
        torch_name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # torch.device accepts devices that do not exist. Only an allocation finds out.
        return torch.empty(1, device=torch_name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device {name!r} cannot be used ({reason}); try --device auto or cpu"
        ) from None
