"""Which run is next, and making it in a process of its own. Several processes may work on one file of runs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import plan, runs
from .train import Job


class Choice(NamedTuple):
    """The rate and penalty that a setting is run at, its mean score in tuning, and which are an edge of their three."""

    rate: float
    penalty: float
    score: float
    edges: tuple[str, ...]


def tuning_jobs(data: str, setting: plan.Setting) -> list[Job]:
    return [
        Job(data, "tuning", setting.name, rate, penalty, seed)
        for rate in setting.rates for penalty in setting.penalties for seed in plan.TUNING_SEEDS
    ]  # fmt: skip


def chosen(data: str, setting: plan.Setting, results: Sequence[Mapping[str, Any]]) -> Choice | None:
    """The highest mean on the tuning split, the lower rate (then penalty) on a tie; None until all are tuned."""
    made = {runs.key(result): result for result in results}
    found: dict[tuple[float, float], list[float]] = {}
    for job in tuning_jobs(data, setting):
        result = made.get(runs.key(job._asdict()))
        if result is None:
            return None
        found.setdefault((job.rate, job.penalty), []).append(result["tuning"])
    (rate, penalty), score = min(
        ((pair, statistics.fmean(scores)) for pair, scores in found.items()), key=lambda item: (-item[1], item[0])
    )
    tried = {"rate": (rate, setting.rates), "lambda": (penalty, setting.penalties)}
    edges = (name for name, (value, values) in tried.items() if len(values) > 1 and value in (values[0], values[-1]))
    return Choice(rate, penalty, score, tuple(edges))


def jobs(data: str, results: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
    """Every run that can be made now, by hypothesis: tuning and the first seeds of the primary comparison, then of the
    others, then the further seeds of all."""
    settings = {setting.name: setting for setting in plan.settings_of(data)}
    seen: set[str] = set()
    for comparisons in plan.in_order(data):
        new: list[plan.Setting] = []
        for part in (comparisons[:1], comparisons[1:]):
            names = dict.fromkeys(name for c in part for name in (c.against, c.setting) if name not in seen)
            seen |= set(names)
            there = [settings[name] for name in names]
            for setting in there:
                yield from tuning_jobs(data, setting)
            yield from _finals(data, there, plan.SEEDS[: plan.FIRST_SEEDS], results)
            new += there
        yield from _finals(data, new, plan.SEEDS[plan.FIRST_SEEDS :], results)
    yield from _all_beyond(data, results)


def beyond(data: str, name: str, results: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """A setting's mean on the tuning split at the rate beyond the edge, and at its choice; None until it is tuned."""
    choice = chosen(data, next(setting for setting in plan.settings_of(data) if setting.name == name), results)
    made = {runs.key(result): result.get("tuning") for result in results}
    tuned = [made.get(runs.key(job._asdict())) for job in _beyond(data, name, "tuning", plan.TUNING_SEEDS)]
    return None if choice is None or None in tuned else (statistics.fmean(tuned), choice.score)


def _beyond(data: str, name: str, phase: str, seeds: Sequence[int]) -> list[Job]:
    return [Job(data, phase, name, plan.BEYOND[data][name], 0.0, seed) for seed in seeds]


def _all_beyond(data: str, results: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
    """One rate beyond the edge: in tuning, and on the seeds where that is better than the choice."""
    for name in plan.BEYOND[data]:
        yield from _beyond(data, name, "tuning", plan.TUNING_SEEDS)
    for name in plan.BEYOND[data]:
        found = beyond(data, name, results)
        if found is not None and found[0] > found[1]:
            yield from _beyond(data, name, "final", plan.SEEDS)


def _finals(
    data: str, settings: Sequence[plan.Setting], seeds: Sequence[int], results: Sequence[Mapping[str, Any]]
) -> Iterator[Job]:
    """Seed by seed, of the settings that are tuned."""
    choices = {setting.name: chosen(data, setting, results) for setting in settings}
    for seed in seeds:
        for name, choice in choices.items():
            if choice is not None:
                yield Job(data, "final", name, choice.rate, choice.penalty, seed)


class Claims:
    """A byte of a file for each run, locked by the process that makes it: given up however the process ends."""

    def __init__(self, path: Path):
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT)

    @contextmanager
    def of(self, job: Job) -> Iterator[bool]:
        """Whether nobody else is at this run."""
        place = int(hashlib.sha256(json.dumps(job).encode()).hexdigest()[:8], 16)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, place)


def work(
    data: str, path: Path, make: Callable[[Job], Mapping[str, Any]], ends: float, wanted: Sequence[str] | None = None
) -> None:  # fmt: skip
    """Make runs until none is left, or until ``ends`` (a ``time.time``), after which none is begun."""
    claims = Claims(path.with_suffix(".lock"))
    while time.time() < ends:
        made, waiting = None, False
        results = runs.read(path)
        done = set(map(runs.key, results))
        for job in jobs(data, results):
            if runs.key(job._asdict()) in done or wanted and job.setting not in wanted:
                continue
            with claims.of(job) as mine:
                # Another process may have made it since the file was read.
                if mine and runs.key(job._asdict()) not in set(map(runs.key, runs.read(path))):
                    made = make(job)
                    runs.add(path, made)
                    print(line(made), flush=True)
                    break
                waiting = True
        if made is None and not waiting:
            return
        if made is None:
            time.sleep(1)  # what another process makes may open further runs


def line(result: Mapping[str, Any]) -> str:
    """What is printed of a run; no score, so that nobody decides by what he sees."""
    penalty = f" lambda {result['penalty']:g}" if result["penalty"] else ""
    return (
        f"{result['data']} {result['phase']} {result['setting']} rate {result['rate']:g}{penalty} "
        f"seed {result['seed']}: {result['cpu_seconds']:.0f} CPU s, {result['peak_mib']:.0f} MiB"
        f"{', diverged' if result['diverged'] else ''}"
    )


def apart(call: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """``call()`` in a child process, with its CPU seconds and peak memory as the kernel counts them."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(call(), pipe)
            status = 0
        except BaseException:  # whatever it is: the parent raises, the child must not go on as the parent
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise RuntimeError(f"a run ended with status {os.waitstatus_to_exitcode(status)}")
    seconds = usage.ru_utime + usage.ru_stime
    return {**pickle.loads(sent), "cpu_seconds": round(seconds, 2), "peak_mib": round(usage.ru_maxrss / 1024, 1)}
