"""Rows of the experiment as its runs make them, of numbers that follow from the job alone."""

from __future__ import annotations

import math

from benchmarks.experiment import jobs, plan, runs


def made(job, gain=None):
    """A row as ``run`` makes it, of numbers that follow from the job alone."""
    noise = 0.002 * math.sin(1 + job.seed * 7 + sum(map(ord, job.setting)))
    value = 0.8 + (gain or {}).get(job.setting, 0.0) + noise
    final = dict(score=value, dev=value) if job.phase == "final" else {}
    if final and job.seed == plan.SEEDS[0]:
        final |= dict(dev_fp32=value, dev_changed=0)
    return {
        **job._asdict(), **final, "tuning": value - abs(job.rate - 2e-3), "diverged": False,
        "settings": {"sentences": 8}, "splits": plan.FINGERPRINTS[job.data], "environment": {"cpu": "x"},
        "ranks": {}, "parameters": {"adapters": 82_944, "head": 770, "other": 0}, "step_cpu_seconds": 0.2,
        "setup_cpu_seconds": 0.0, "cpu_seconds": 60.0, "peak_mib": 900.0,
    }  # fmt: skip


def all_rows(gain=None, seeds=8, wanted=None, data="sst2"):
    found = []
    for _ in range(2):  # what is tuned first opens the rest
        keys = set(map(runs.key, found))
        todo = [job for job in jobs.jobs(data, found) if runs.key(job._asdict()) not in keys]
        found += [
            made(job, gain) for job in todo
            if (wanted is None or job.setting in wanted) and job.seed not in plan.SEEDS[seeds:]
        ]  # fmt: skip
    return found
