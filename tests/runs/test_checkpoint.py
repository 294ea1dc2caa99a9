"""Checkpoints of interrupted fits, also those of earlier versions."""

from pathlib import Path

import torch

from apecache.runs.checkpoint import load_checkpoint, save_checkpoint


def test_a_checkpoint_with_former_names_is_read_under_the_names_of_today(tmp_path: Path) -> None:
    tensors = {"optimiser/0/exp_avg": torch.ones(2), "model/image.weight": torch.zeros(2)}
    save_checkpoint(tmp_path, tensors, {"recipe": {"optimiser": {"lr": 0.1}, "name": "optimiser"}})

    read_tensors, state = load_checkpoint(tmp_path)

    assert set(read_tensors) == {"optimizer/0/exp_avg", "model/image.weight"}
    assert state["recipe"] == {"optimizer": {"lr": 0.1}, "name": "optimiser"}
