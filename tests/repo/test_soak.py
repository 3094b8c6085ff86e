"""Long use in short: nothing is left behind, threads and processes do not meet, imports and copies can be repeated."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastlora

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import soak  # noqa: E402
from small_model import adapted, batch, loss_fn  # noqa: E402

LEAKY = """
kept, step = [], soak.Soak.step

def leaky(self, *args):
    step(self, *args)
    kept.append(torch.zeros(1))

soak.Soak.step = leaky
"""


def cycles(number: int, folder: Path, first: str = "") -> list[dict[str, int]]:
    """Rows of the soak, in a process of its own: what other tests have left is not counted, nor when it goes."""
    code = f"import json, soak, torch\n{first}\nprint(json.dumps(soak.run({number}, {str(folder)!r})))"
    path = os.pathsep.join([str(Path(soak.__file__).parent), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_200_steps_leave_nothing_behind(tmp_path):
    rows = cycles(200 // soak.CYCLE, tmp_path / "adapter")
    assert rows[-1]["steps"] == 200
    settled = rows[1:]
    assert len({row["tensors"] for row in settled}) == 1 and len({row["hooks"] for row in settled}) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_is_left_behind_is_seen(tmp_path):
    rows = cycles(3, tmp_path / "adapter", LEAKY)
    assert rows[-1]["tensors"] - rows[-2]["tensors"] == soak.CYCLE


def trained(seed: int, steps: int = 12) -> tuple[list[bytes], dict[str, float]]:
    """Weights and statistics after a short training."""
    model = adapted()
    optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-2))
    with fastlora.track(model, every=1, seed=seed) as tracker:
        for i in range(steps):
            loss_fn(model, batch(100 * seed + i)).backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.step()
    return [p.detach().numpy().tobytes() for p in model.parameters()], dict(tracker.scores())


def test_two_threads_with_two_models():
    """Contexts, groups, trackers and probes belong to a model and a thread."""
    alone, found, errors = [trained(seed) for seed in (1, 2)], {}, []
    start = threading.Barrier(2)
    torch.manual_seed(0)

    def work(seed: int) -> None:
        try:
            start.wait()
            found[seed] = trained_here(seed)
        except BaseException as error:
            errors.append(error)

    models = {seed: adapted() for seed in (1, 2)}  # made here: torch's generator is one for all threads

    def trained_here(seed: int):
        model = models[seed]
        optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_lora=1e-2))
        with fastlora.track(model, every=1, seed=seed) as tracker:
            for i in range(12):
                with fastlora.use_adapters(model, "default"):
                    loss = loss_fn(model, batch(100 * seed + i))
                with fastlora.disable_adapters(model), torch.no_grad():
                    model(batch(0)[0])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.step()
        return [p.detach().numpy().tobytes() for p in model.parameters()], dict(tracker.scores())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors, errors
    assert [found[1], found[2]] == alone


class Embedded(Dataset):
    """Each worker runs an adapted model on its own samples."""

    def __init__(self, model):
        self.model = model

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(batch(i)[0])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    model = adapted().eval()
    loss_fn(model, batch(0)).backward()  # threads and caches of the parent are warm
    data = Embedded(model)
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start)
    for mine, theirs in zip([data[i] for i in range(6)], loader, strict=True):
        assert torch.equal(mine, theirs)


AGAIN = """
import importlib, sys
import torch, fastlora
fastlora.nn  # the first use of a public name loads the package
before = torch._C._dispatch_dump("fastlora::lora_linear")
model = fastlora.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), fastlora.LoraConfig(r=2, target_modules=["0"]))
for _ in range(3):
    importlib.import_module("fastlora")
    importlib.reload(fastlora)
assert torch._C._dispatch_dump("fastlora::lora_linear") == before
assert fastlora.summary(model).adapter_params == 16
assert isinstance(model[0], fastlora.nn.Linear)
model(torch.ones(2, 4)).sum().backward()
"""


def test_imported_and_reloaded_again():
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_copies_are_whole_and_apart(duplicate):
    """Ten generations, each trained a step further than the one it came from, which stays as it was."""
    model = adapted()
    for i in range(10):
        again = duplicate(model)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(fastlora.param_groups(again), lr=0.1)
        with fastlora.track(again, every=1) as tracker:
            loss_fn(again, batch(i)).backward()
            optimizer.step()
            tracker.step()
        assert all(v > 0 for v in tracker.scores().values())
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
        assert len(again._forward_pre_hooks) == len(model._forward_pre_hooks)
        model = again
        model.zero_grad()
