"""Run folders: checkpoints, heads, ledger, model card, and a finished run in use."""
