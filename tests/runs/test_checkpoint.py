"""Checkpoints of interrupted fits, also those of earlier versions."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from apecache.runs.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint


def test_a_checkpoint_with_former_names_is_read_under_the_names_of_today(tmp_path: Path) -> None:
    tensors = {"optimiser/0/exp_avg": torch.ones(2), "model/image.weight": torch.zeros(2)}
    save_checkpoint(tmp_path, tensors, {"recipe": {"optimiser": {"lr": 0.1}, "name": "optimiser"}})

    read_tensors, state = load_checkpoint(tmp_path)

    assert set(read_tensors) == {"optimizer/0/exp_avg", "model/image.weight"}
    assert state["recipe"] == {"optimizer": {"lr": 0.1}, "name": "optimiser"}


def test_a_checkpoint_with_the_former_header_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"model/x": torch.ones(2)}, {"step": 3})
    tensors, state = load_checkpoint(tmp_path)
    path = tmp_path / CHECKPOINT
    save_file(load_file(path), path, {"state": json.dumps(state)})

    former_tensors, former_state = load_checkpoint(tmp_path)

    assert former_state == state
    assert former_tensors.keys() == tensors.keys()
