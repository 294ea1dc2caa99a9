"""Save and load the state of an unfinished fit.

One safetensors file holds the tensors, its header the rest as JSON. No pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apecache.errors import MismatchError, RunError, raise_if_refused
from apecache.fingerprint import Fingerprint, Json, shorten
from apecache.recipes.former_keys import NEW_KEYS, with_new_keys
from apecache.storage.replace import HEADER_KEY, replace_tensors

CHECKPOINT = "checkpoint.safetensors"
FORMAT_VERSION = 1
FORMER_HEADER_KEY = "state"
"""In checkpoints that earlier versions wrote."""


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Json]) -> None:
    """Replace the folder's checkpoint atomically.

    After a kill or a power cut either the old or the new checkpoint is on disk.
    """
    # One file for both: tensors and state can never be of different steps.
    text = json.dumps({"format": FORMAT_VERSION, **state}, ensure_ascii=False, allow_nan=False)
    # A safetensors header maps strings to strings, so the state is one string.
    replace_tensors(folder / CHECKPOINT, tensors, {HEADER_KEY: text})


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Read the tensors, on the CPU, and the state.

    Raises:
        RunError: The file is damaged, or of a newer format.
    """
    path = folder / CHECKPOINT
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            key = HEADER_KEY if HEADER_KEY in header else FORMER_HEADER_KEY
            state = with_new_keys(json.loads(header[key]))
            for name in file.keys():  # noqa: SIM118
                group_name, separator, inner_name = name.partition("/")
                new_name = NEW_KEYS.get(group_name, group_name)
                tensors[f"{new_name}{separator}{inner_name}"] = file.get_tensor(name)
        if state["format"] > FORMAT_VERSION:
            raise RunError(
                f"{path} has format {state['format']}; this apecache reads up to "
                f"{FORMAT_VERSION}: upgrade"
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        # The RunError of a newer format is itself a ValueError: do not report it as damage.
        if isinstance(error, RunError):
            raise
        raise_if_refused(path)
        why = str(error).splitlines()[0]
        raise RunError(f"{path} is damaged ({why}); begin anew with --overwrite") from None
    return tensors, state


def find_checkpoint(
    out: Path,
    identity: Fingerprint,
) -> tuple[dict[str, Tensor], dict[str, Json]] | None:
    """Read the checkpoint of an interrupted fit.

    Args:
        out: Run folder.
        identity: What the fit is: its recipe, data, seed, splits and encoders.

    Returns:
        Tensors and state of the checkpoint; None if there is not a checkpoint.

    Raises:
        MismatchError: The checkpoint is of a fit with another identity.
        RunError: The checkpoint is damaged.
    """
    if not (out / CHECKPOINT).is_file():
        return None
    tensors, state = load_checkpoint(out)
    differences = identity.difference(Fingerprint(fields=state.get("identity", {})))
    if differences:
        shown = "; ".join(
            f"{path} is {shorten(current_value)}, there {shorten(stored_value)}"
            for path, current_value, stored_value in differences[:3]
        )
        extra = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise MismatchError(
            (
                f"{out} holds another fit, broken off ({shown}{extra}); choose another --out, or "
                "add --overwrite"
            ),
            differences,
        )
    return tensors, state


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by `parameter number/name`.

    Settings, such as learning rates, are left out: the recipe has them.
    """
    tensors: dict[str, Tensor] = {}
    for number, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if value is not None:
                tensors[f"{number}/{name}"] = value
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `flatten_optimizer` returned into an optimizer of the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        # Earlier checkpoints have Lion's momentum under this name.
        state_name = "exp_avg" if name == "momentum" else name
        state.setdefault(int(number), {})[state_name] = value
    param_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})
