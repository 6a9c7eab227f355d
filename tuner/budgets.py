"""Every number that bounds the tuner's work, with its unit."""

from __future__ import annotations

from dataclasses import dataclass

from autofuse.errors import BadInput

__all__ = [
    "BUSY_SHARE",
    "COMPILE_BUDGET_S",
    "COMPILE_LIMIT_S",
    "EFFORTS",
    "FINAL_SHARE",
    "GUARD_BYTES",
    "GUARD_ROWS",
    "GUESSED_PACE",
    "KILL_GRACE_S",
    "LANES",
    "LANE_BYTES",
    "LANE_CORES",
    "LONGEST_PAUSE_S",
    "LOOK_S",
    "MOST_GUARD_BYTES",
    "OTHERS_SHARE",
    "RANK_WAIT_S",
    "STOP_GRACE_S",
    "VERIFY_MEMORY_SHARE",
    "WATCH_DUTY",
    "WATCH_LOOK_S",
    "Effort",
    "Limits",
    "Pace",
    "effort",
]

COMPILE_BUDGET_S = 300.0
"""How long the compilations of one process may tune in all, unless ``autofuse.tune_budget`` says otherwise."""

FINAL_SHARE = 0.4
"""Of the time that a bucket has within a budget, so much is kept for its last measurement, beside the unfused code."""

STOP_GRACE_S = 30.0
"""How long a tuning process may go on beyond its budget to finish the measurement it is at, and how long it may take to
put things in order when it is told to stop."""

KILL_GRACE_S = 30.0
"""How long the system may take to end a worker that was killed: a GPU's driver waits for what runs there."""

COMPILE_LIMIT_S = 300.0
"""How long a compiler that runs in a worker process may take for one kernel."""

GUARD_ROWS = 16
"""A guard zone is as long as so many rows of its tensor: blocks of several tokens miss by rows, not by bytes."""

GUARD_BYTES = 4096
"""But at least so long."""

MOST_GUARD_BYTES = 4 << 20
"""And at most so long."""

BUSY_SHARE = 0.2
"""A device is busy with others' work if that takes more than this share of it."""

LOOK_S = 1.0
"""How long a device is looked at to find out."""

WATCH_DUTY = 0.25
"""Of its time, so much a service tunes at most, unless it is told otherwise."""

WATCH_LOOK_S = 15.0
"""How often a service looks for new sites, and whether a busy device is idle again."""

RANK_WAIT_S = 60.0
"""How long a rank of a distributed job waits for a lower one to compile, before it decides without."""

LONGEST_PAUSE_S = 60.0
"""What lies further apart in the database was not measured in one go: a forecast leaves it out."""

OTHERS_SHARE = 0.1
"""A CPU was busy if other processes had more than this share of its cores during a measurement."""

LANES = {"cpu": 1, "cuda": 5, "hip": 5}
"""Kind of target → how many buckets are tuned at a time on one device. They take turns on it: while one is measured,
others compile. On a CPU both are work for the same cores."""

LANE_CORES = 3
"""But each of these has at least so many cores of the host,"""

LANE_BYTES = 8 << 30
"""and so many bytes of a GPU's memory: what one takes would look like another's failure."""

VERIFY_MEMORY_SHARE = 0.25
"""Of the device's free memory, so much may hold inputs and references for the next candidate of a bucket; what is
beyond is computed anew for each."""


@dataclass(frozen=True)
class Pace:
    """How fast a device tunes.

    Attributes:
        trial_s: to verify and time a config.
        bucket_s: what a bucket takes besides: its inputs, the first compilation, the baselines, the last measurement.
        open_s: of this, what comes before the first trial.
    """

    trial_s: float
    bucket_s: float
    open_s: float


GUESSED_PACE = {"cpu": Pace(0.4, 12.0, 2.0), "cuda": Pace(0.2, 5.0, 1.5), "hip": Pace(0.2, 5.0, 1.5)}
"""Kind of target → what a forecast goes by where nothing was measured. Guesses: the CPU's is that of two cores of an
EPYC, the others are not measured."""


@dataclass(frozen=True)
class Limits:
    """How long the worker process may take for what is asked of it, in seconds, before it is ended. They are there for
    what never ends, and far beyond what is usual on a busy machine.

    Attributes:
        start_s: to import PyTorch and to find its device.
        open_s: to draw a bucket's inputs and compute their references. No candidate runs.
        verify_s: to verify a candidate.
        time_s: to time it.
        baselines_s: to compile the unfused code.
        final_s: to time the finalists, or one of them and the baselines, in turns.
        turn_s: to wait while others use the device, where several buckets are tuned on it; no part of the other times.
        slowdown: to each of the four before that is added so many times what opening the bucket took: on large inputs
            all is slow. To ``final_s``, that time is added once more for each round of everything that is timed.
    """

    start_s: float = 300.0
    open_s: float = 900.0
    verify_s: float = 60.0
    time_s: float = 60.0
    baselines_s: float = 900.0
    final_s: float = 120.0
    turn_s: float = 3600.0
    slowdown: float = 10.0


@dataclass(frozen=True)
class Effort:
    """How much work one bucket may cost.

    Attributes:
        exhaustive_up_to: spaces of at most so many configs are measured whole; larger ones are searched.
        trials: configs measured per bucket by a search at most, those already in the database included.
        fewest_trials: so many at least, before a search may end for what it expects.
        settled: it ends, but for ``polish`` trials, when no config is expected to beat the best by this share.
        polish: of the trials, so many at the end are configs that differ from the best in one tunable, as long as there
            are such. None where a kernel in another language is faster by ``race_margin``.
        triton_fewest, triton_settled, triton_polish: the same of the search among kernels in Triton, which take their
            compiler a second each and know what the kernel in C++ reaches.
        priors: winners of other buckets, problems and devices that are tried before anything else.
        startup_trials: of these, before a model proposes any: what is tried first, and the rest at random.
        batch: configs that are proposed at once, so that they compile side by side.
        race_margin: a config that takes so many times as long as the best before it is not timed to the end.
        race_pairs: rounds of both, side by side, that must all say so.
        trial_rounds: timed rounds per config that is.
        finalists: best configs that are measured again to choose one of them.
        final_rounds: interleaved rounds to choose it, and as many fresh ones of it and the baselines, from which its
            time and the gain's interval come.
        places: on a GPU, the rounds that choose it are spread over so many rings of inputs, at other addresses.
        tie: finalists whose times differ by less than this share, or by less than the noise, are equally good,
        widest_tie: but none that takes longer by more than this share.
        steady_interval: a gain whose interval is wider, high ÷ low, was measured on a busy machine.
        attempts: such a measurement of the gain is made at most so many times; the steadiest counts, and is marked if
            it is not steady.
        round_us: length of one timed round on a GPU, in µs, at least half of it. Rounds of 0.5 ms that begin with a
            busy GPU differ no more than rounds of 1 ms that do not, which are made twice as long.
        cpu_round_us: the same on a CPU.
        warmup_rounds: untimed rounds before each measurement.
        ring_bytes: the inputs of consecutive calls are different ones, together at least so many bytes, so that they
            do not stay in the last-level cache (H200: 60 MB).
        ring_sets: at most so many sets of inputs, or up to two more; tiny ones would need thousands.
        verify_seeds: random inputs that a config must compute rightly before it is timed.
        limits: after which a candidate is taken for one that never ends.
    """

    exhaustive_up_to: int = 64
    trials: int = 74
    fewest_trials: int = 60
    settled: float = 0.0001
    polish: int = 12
    triton_fewest: int = 20
    triton_settled: float = 0.003
    triton_polish: int = 8
    priors: int = 4
    startup_trials: int = 10
    batch: int = 4
    race_margin: float = 1.1
    race_pairs: int = 2
    trial_rounds: int = 7
    finalists: int = 4
    final_rounds: int = 25
    places: int = 3
    tie: float = 0.005
    widest_tie: float = 0.015
    steady_interval: float = 1.15
    attempts: int = 4
    round_us: float = 1_000.0
    cpu_round_us: float = 3_000.0
    warmup_rounds: int = 2
    ring_bytes: int = 160 << 20
    ring_sets: int = 255
    verify_seeds: int = 2
    limits: Limits = Limits()


EFFORTS = {
    "quick": Effort(
        exhaustive_up_to=24,
        trials=24,
        fewest_trials=16,
        settled=0.003,
        polish=6,
        triton_fewest=8,
        triton_settled=0.01,
        triton_polish=0,
        trial_rounds=5,
        final_rounds=15,
        places=1,
    ),
    "default": Effort(),
    "exhaustive": Effort(exhaustive_up_to=100_000),
}


def effort(name: str) -> Effort:
    """The effort of that name. Raises BadInput."""
    if name not in EFFORTS:
        raise BadInput(f"effort {name!r} is none of {', '.join(EFFORTS)}")
    return EFFORTS[name]
