"""Faults on purpose, counted: ``python tools/faults.py --out benchmarks/results/faults.json``.

Each function breaks something many times, judges what is left, and returns how often it did; ``AssertionError`` says
what was wrong. ``tests/repo/test_faults.py`` runs them with fewer repetitions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import result_file
import torch
from small_model import adapted, batch, loss_fn, machine, plain, snapshot
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora


class Kill(TorchDispatchMode):
    """Calls ``fault`` in place of the ``at``-th operation on tensors inside."""

    def __init__(self, at: int, fault: Callable[[], None]):
        super().__init__()
        self.at, self.fault, self.count = at, fault, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            self.fault()
        return func(*args, **(kwargs or {}))


def _output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(99)[0])


def kills_during_save(folder: Path, trials: int, seed: int = 0) -> Counter:
    """``kill -9`` at random moments of saving in a loop: the old or the new adapter loads, whole."""
    models, chance, found = [adapted(2), adapted(4)], random.Random(seed), Counter()
    expected = [_output(model) for model in models]
    began = time.perf_counter()
    for model in models:
        fastlora.save(model, folder)
    seconds = time.perf_counter() - began
    for _ in range(trials):
        child = os.fork()
        if child == 0:
            for model in itertools.cycle(models):
                fastlora.save(model, folder)
        time.sleep(chance.uniform(0.05, 1.5) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = _output(fastlora.load(plain(), folder))
        same = [torch.equal(loaded, y) for y in expected]
        assert sum(same) == 1, "neither the old adapter nor the new one"
        found["old" if same[0] else "new"] += 1
    return found


def full_disk(folder: Path, step: int = 97) -> Counter:
    """A limit on the size of files at every ``step``-th byte: a named error, and what was there still loads."""
    old, new, found = adapted(2), adapted(4), Counter()
    fastlora.save(old, folder)
    expected, size = [_output(old), _output(new)], sum(p.stat().st_size for p in folder.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, size, step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            fastlora.save(new, folder)
            outcome = "new"
        except OSError as error:
            outcome = "old"
            assert str(folder) in str(error), f"the error does not name the folder: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        loaded = _output(fastlora.load(plain(), folder))
        assert torch.equal(loaded, expected[outcome == "new"]), f"limit {limit}: not the {outcome} adapter"
        found[outcome] += 1
        if outcome == "new":
            fastlora.save(old, folder)
    return found


def _step(model: nn.Module, tracker: fastlora.Tracker, number: int, mode: Any = None) -> None:
    loss = loss_fn(model, batch(number))
    if mode is None:
        loss.backward()
    else:
        with mode:
            loss.backward()
    tracker.step()
    model.zero_grad()


def _probes(tracker: fastlora.Tracker) -> list[torch.Tensor | None]:
    leaves = [z for layer in tracker.layers.values() for z in layer.probes["default"].Z.values()]
    return [None if z.grad is None else z.grad.clone() for z in leaves]


def out_of_memory(most: int | None = None) -> int:
    """Every operation of a backward in turn finds no memory: nothing half added, and a retry as if it never failed."""

    def fault() -> None:
        raise torch.OutOfMemoryError("simulated")

    model = adapted()
    tracker = fastlora.track(model, statistics=("grad_sq", "act_var"), every=1)
    loss_fn(model, batch(0)).backward()
    clean = _probes(tracker)
    tracker.step()
    expected, weights = dict(tracker.scores()), snapshot(model)[0]
    for at in itertools.count(1):
        model = adapted()
        tracker = fastlora.track(model, statistics=("grad_sq", "act_var"), every=1)
        try:
            _step(model, tracker, 0, Kill(at, fault))
        except torch.OutOfMemoryError:
            for found, whole in zip(_probes(tracker), clean, strict=True):
                assert found is None or torch.equal(found, whole), f"operation {at}: half a statistic"
            assert tracker.steps == 0 and snapshot(model)[0] == weights, f"operation {at}: the failed step counted"
            model.zero_grad()
            tracker.discard()
            _step(model, tracker, 0)
            assert dict(tracker.scores()) == expected, f"operation {at}: the failed backward was counted"
            if at == most:
                return at
        else:
            return at - 1


def out_of_memory_in_merge(made: Callable[[], nn.Module] = adapted) -> int:
    """Every operation of a merge in turn finds no memory: no layer is merged. Of unmerge: it goes on where it was."""

    def fault() -> None:
        raise torch.OutOfMemoryError("simulated")

    expected, count = snapshot(made()), 0
    for verb in (fastlora.merge, fastlora.unmerge):
        for at in itertools.count(1):
            model = made() if verb is fastlora.merge else fastlora.merge(made())
            try:
                with Kill(at, fault):
                    verb(model)
                break
            except torch.OutOfMemoryError:
                if verb is fastlora.unmerge:
                    fastlora.unmerge(model)
                assert snapshot(model) == expected, f"operation {at} of {verb.__name__}: some layers are merged"
                count += 1
    return count


def _poison(module: nn.Module, args: Any, y: torch.Tensor) -> None:
    y.register_hook(lambda dy: dy * math.nan)


def _averages(path: str, bad: int, steps: int, poisoned: bool) -> tuple[dict[str, float], int]:
    """Scores and skipped steps; step ``bad`` has NaN behind the layer ``path``, or no backward at all."""
    model = adapted()
    with fastlora.track(model, every=1, ema=None) as tracker:
        for number in range(steps):
            if number != bad:
                _step(model, tracker, number)
            elif poisoned:
                hook = model.get_submodule(path).register_forward_hook(_poison)
                _step(model, tracker, number)
                hook.remove()
            else:
                tracker.step()
    return dict(tracker.scores()), tracker.skipped


def not_a_number(steps: int = 6) -> int:
    """NaN in the gradient of one layer in one step, each in turn: as if that step had not been, and counted."""
    paths = list(fastlora.nn.linear.adapted_layers(adapted()))
    for path, bad in itertools.product(paths, range(steps)):
        (found, skipped), (expected, _) = (_averages(path, bad, steps, poisoned) for poisoned in (True, False))
        assert skipped == 1 and found == expected, f"{path}, step {bad}: left a trace, {skipped} skipped"
    return len(paths) * steps


def ctrl_c(trials: int, seed: int = 0) -> Counter:
    """A real SIGINT at random operations and at random moments of a calibration: the model is as it was."""
    # A shell that starts a job in the background has it ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _interrupted_calibrations(trials, seed)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted_calibrations(trials: int, seed: int) -> Counter:
    model, chance, found = adapted(), random.Random(seed), Counter()
    model.register_buffer("calls", torch.zeros(()))  # a forward changes it, and putting it back takes an operation
    model.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)
    batches = [batch(i) for i in range(4)]
    counter = Kill(0, lambda: None)
    with counter:
        expected = dict(fastlora.calibrate(model, batches, loss_fn, steps=4, progress=False))
    began = time.perf_counter()
    fastlora.calibrate(model, batches, loss_fn, steps=4, progress=False)
    seconds, before = time.perf_counter() - began, snapshot(model)
    for trial in range(trials):
        # An interrupt inside of torch.no_grad's own exit leaves it on.
        torch.set_grad_enabled(True)
        timer, mode = None, Kill(chance.randint(1, counter.count), lambda: signal.raise_signal(signal.SIGINT))
        if trial % 2:
            # No mode of torch's around it: an interrupt inside of its exit would leave it on for good.
            mode = contextlib.nullcontext()
            timer = threading.Timer(chance.uniform(0, seconds), lambda: os.kill(os.getpid(), signal.SIGINT))
        outcome = "interrupted"
        try:
            if timer is not None:
                timer.start()
            with mode:
                fastlora.calibrate(model, batches, loss_fn, steps=4, progress=False)
            outcome = "finished"
            if timer is not None:
                timer.join()
                time.sleep(0.01)  # the signal reaches Python here, if not before
        except KeyboardInterrupt:
            pass
        assert snapshot(model) == before, f"trial {trial}: {outcome}, and the model is another"
        found[outcome] += 1
    assert dict(fastlora.calibrate(model, batches, loss_fn, steps=4, progress=False)) == expected
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the counts")
    arguments, began = parser.parse_args(), time.time()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        found = {
            "kill -9 during save": dict(kills_during_save(root / "killed", 200)),
            "file size limit during save": dict(full_disk(root / "full", 31)),
            "no memory at an operation of backward": out_of_memory(),
            "no memory at an operation of merge or unmerge": out_of_memory_in_merge(),
            "NaN in one layer and step": not_a_number(),
            "Ctrl-C in calibration": dict(ctrl_c(400)),
        }
    total = sum(sum(v.values()) if isinstance(v, dict) else v for v in found.values())
    document = {"command": "python tools/faults.py", "seconds": round(time.time() - began, 1), "faults": total,
                "by kind": found, **machine()}  # fmt: skip
    text = result_file.dumps(document)
    sys.stdout.write(text)
    if arguments.out is not None:
        arguments.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
