"""Golden runs: a run folder of every released form is read and embeds as it did when it was made.

`tests/golden/run-1` was fitted by version 0.1.0 before its modules were moved. It is never made
anew: it stands for the runs that people have.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from apecache.report.records import read_records
from apecache.runs.folder import read_history
from apecache.runs.heads import load_heads
from apecache.runs.ledger import load_ledger
from apecache.runs.load import load_run, recorded_training

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = sorted(path.name for path in GOLDEN.glob("run-*") if path.is_dir())


@pytest.mark.parametrize("name", RUNS)
def test_heads_embed_as_they_did(name: str) -> None:
    served = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    heads = load_heads(GOLDEN / name)
    assert heads.digest == served["digest"]
    for side in ("image", "text"):
        features = torch.from_numpy(np.array(served[f"{side}_features"], np.float16))
        embedded = getattr(heads, side).embed(features)
        # Bits depend on the processor that made them; float32 rounding is far below 1e-5.
        torch.testing.assert_close(embedded, torch.tensor(served[side]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_everything_else_in_the_folder_is_read(name: str) -> None:
    run = GOLDEN / name
    assert load_run(run).digest == load_heads(run).digest
    assert len(list(read_history(run))) == 4
    ledger = load_ledger(run)
    assert ledger is not None
    assert ledger.n_steps == 9
    recipe = recorded_training(run)["recipe"]
    assert recipe["name"] == "projection"
    # The run has the former spelling of this key.
    assert recipe["optimizer"]["kind"] == "adamw"
    assert read_records([run])[0].n_train_images == 48


@pytest.mark.parametrize("name", RUNS)
def test_golden_runs_hold_nothing_of_the_machine_that_made_them(name: str) -> None:
    for path in (GOLDEN / name).iterdir():
        for folder in (b"/home", b"/root", b"/tmp"):
            assert folder not in path.read_bytes(), path
