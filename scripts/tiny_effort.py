"""A tuner's budgets that end within seconds and measure nothing well: for what is about anything but speed."""

from __future__ import annotations

from autofuse.tuner.budgets import Effort

TINY = Effort(
    exhaustive_up_to=4,
    trials=4,
    startup_trials=2,
    batch=2,
    trial_rounds=2,
    race_margin=1e9,  # rounds that short tell nothing
    finalists=2,
    final_rounds=4,
    round_us=50.0,
    cpu_round_us=50.0,
    warmup_rounds=1,
    ring_bytes=1,
    verify_seeds=1,
)
