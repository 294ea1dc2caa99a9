"""The run folder of the encoder trainer: recipe and history, a checkpoint while it runs, weights when it is done.

Only what training can change is kept; frozen parameters are those of the encoder that `encoder.json` names.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from apecache.errors import MismatchError, RunError, require_new
from apecache.evaluate.retrieval import RetrievalReport
from apecache.fingerprint import Fingerprint, Json, describe_difference
from apecache.recipes.recipe import Recipe
from apecache.recipes.trained_encoders import DESCRIPTION, WEIGHTS, read_tensors

HISTORY, RECIPE, IDENTITY, CHECKPOINT = "history.jsonl", "recipe.json", "identity.json", "checkpoint.safetensors"
OURS = {HISTORY, RECIPE, IDENTITY, CHECKPOINT, WEIGHTS, DESCRIPTION}
Progress = Callable[[dict[str, Any]], None]
"""Called with one line of the history after every epoch; epoch 0 is before training."""


@dataclass
class Checkpoint:
    """After `epoch` epochs: current and best tensors, the optimiser's state, and the history so far."""

    epoch: int
    tensors: dict[str, Tensor]
    best_epoch: int
    best: dict[str, Tensor]
    best_dev: RetrievalReport
    untrained: RetrievalReport
    history: list[dict[str, Any]]
    optimiser: dict[str, Tensor]

    @staticmethod
    def begin(tensors: Mapping[str, Tensor], untrained: RetrievalReport) -> "Checkpoint":
        """Before training; what is untrained is no candidate, so the first epoch is the best so far."""
        copied = _copy(tensors)
        return Checkpoint(0, copied, 0, copied, untrained, untrained, [], {})

    def add(self, line: dict[str, Any]) -> "Checkpoint":
        self.history.append(line)
        return self

    def advance(self, epoch: int, tensors: Mapping[str, Tensor], dev: RetrievalReport) -> None:
        self.epoch, self.tensors = epoch, _copy(tensors)
        if epoch == 1 or dev.mean_recall > self.best_dev.mean_recall:
            self.best_epoch, self.best, self.best_dev = epoch, self.tensors, dev

    def restore(self, optimiser: torch.optim.Optimizer) -> None:
        """Give an optimiser over the same parameters its state back."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.optimiser.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def begin_run(out: Path, recipe: Recipe, identity: Fingerprint, overwrite: bool) -> Checkpoint | None:
    """A new folder, or the checkpoint of the same run that was broken off.

    Raises:
        RunError: a finished run, something else, or a damaged checkpoint. MismatchError: another run, broken off.
    """
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    ours = bool(names) and names <= OURS | {f".{name}.tmp" for name in OURS}
    if names and (not ours or (DESCRIPTION in names and not overwrite)):
        require_new(out, "run folder", overwrite)
    if CHECKPOINT in names and not overwrite:
        return _resume(out, identity)
    if out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    _write(out / RECIPE, recipe.model_dump(mode="json"))
    _write(out / IDENTITY, dict(identity.fields))
    return None


def _resume(out: Path, identity: Fingerprint) -> Checkpoint:
    try:
        found = Fingerprint(json.loads((out / IDENTITY).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        raise RunError(f"{out / IDENTITY} cannot be read; add --overwrite to begin anew") from None
    differences = identity.difference(found)
    if differences:
        raise MismatchError(
            f"{out} holds another run, broken off: {describe_difference(differences)}; choose another --out, or add "
            "--overwrite",
            differences,
        )
    return _load_checkpoint(out / CHECKPOINT)


def save_checkpoint(out: Path, checkpoint: Checkpoint, optimiser: torch.optim.Optimizer) -> None:
    """Replace the checkpoint at once, then the history."""
    states = optimiser.state_dict()["state"]
    checkpoint.optimiser = {f"{i}.{key}": tensor for i, state in states.items() for key, tensor in state.items()}
    groups = {"now": checkpoint.tensors, "best": checkpoint.best, "optimiser": checkpoint.optimiser}
    tensors = {f"{g}.{name}": t.detach().cpu().clone() for g, content in groups.items() for name, t in content.items()}
    header = {
        "epoch": checkpoint.epoch,
        "best_epoch": checkpoint.best_epoch,
        "best_dev": asdict(checkpoint.best_dev),
        "untrained": asdict(checkpoint.untrained),
        "history": checkpoint.history,
    }
    _save(tensors, out / CHECKPOINT, header)
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in checkpoint.history)
    (out / HISTORY).write_text(lines, encoding="utf-8")


def _load_checkpoint(path: Path) -> Checkpoint:
    tensors, header = read_tensors(path)
    groups: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "optimiser": {}}
    try:
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = tensor
        reports = (RetrievalReport.from_json(header["best_dev"]), RetrievalReport.from_json(header["untrained"]))
        epochs = (header["epoch"], header["best_epoch"])
        return Checkpoint(
            epochs[0], groups["now"], epochs[1], groups["best"], *reports, header["history"], groups["optimiser"]
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunError(f"{path} is damaged; add --overwrite to begin anew") from None


def finish_run(out: Path, tensors: Mapping[str, Tensor], description: dict[str, Json]) -> None:
    """Write the weights, then the description, whose presence makes the folder a finished run."""
    _save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, out / WEIGHTS, {})
    _write(out / DESCRIPTION, description)
    for name in (CHECKPOINT, IDENTITY):
        (out / name).unlink(missing_ok=True)


def _save(tensors: dict[str, Tensor], path: Path, header: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"apecache": json.dumps(header)})
    os.replace(temporary, path)


def _write(path: Path, value: Mapping[str, Json]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
