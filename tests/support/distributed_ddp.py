"""What each rank does in the tests of DistributedDataParallel, and what one process leaves behind for them."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastlora
from support.distributed_help import batch, optimiser, read, train_alone, train_rank, trained
from support.tracker_help import data, loss_of, model

STEPS, CUT = range(4), 2
STATISTICS = {
    "grad_sq": dict(statistics=("grad_sq", "act_var")),
    "fisher": dict(statistics=("fisher", "act_var")),
    "fisher of sums": dict(statistics="fisher", loss_reduction="sum"),
    "every second step": dict(statistics=("grad_sq", "act_var"), every=2),
    "plain mean": dict(statistics="grad_sq", ema=None, probes=3),
    "columns": dict(statistics=("grad_sq", "grad_abs", "act_var"), probe_kind="columns"),
    "fisher by columns": dict(statistics="fisher", probe_kind="columns"),
    "exact": dict(estimator="exact", statistics=("grad_sq", "fisher", "grad_abs", "act_var", "act_cov", "grad_cov")),
    "exact fisher of sums": dict(estimator="exact", statistics="fisher", loss_reduction="sum"),
}


class Sometimes(nn.Module):
    """An expert that only some batches reach."""

    def __init__(self):
        super().__init__()
        self.query, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.query(x) + (self.other(x) if float(x[0, 0, 0].detach()) > 0 else 0.0)


def experts():
    torch.manual_seed(0)
    m = nn.Sequential(Sometimes(), nn.Linear(8, 3)).double()
    config = fastlora.LoraConfig(r=2, target_modules=["query", "other"], init_lora_weights=False)
    return fastlora.inject(m, config, check="off")


def routed(rank, reached):
    x, y = data(seed=rank)
    x[0, 0, 0] = 1.0 if reached else -1.0
    return x, y


# Which of the ranks reach the expert, by step; the others have no gradient for it.
REACHED = [lambda rank: rank == 1, lambda rank: False, lambda rank: True]


def statistics(rank, world, kwargs):
    m = model()
    parallel, found = DistributedDataParallel(m), {}
    for name, options in kwargs.items():
        with fastlora.track(parallel, **options) as tracker:
            train_rank(parallel, tracker, rank, STEPS, sync=parallel.no_sync)
        found[name] = read(tracker)
    return found


def training(rank, world, how):
    """Losses, parameters and scores of training with a penalty, the tracker made in different ways."""
    m = model()
    if how == "track first":
        tracker = fastlora.track(m)
        parallel = DistributedDataParallel(m)
    else:
        parallel = DistributedDataParallel(m)
        given = {"wrapper": parallel, "model": m, "compiled": torch.compile(parallel, backend="eager"), "group": m}[how]
        tracker = fastlora.track(given, **({"process_group": dist.group.WORLD} if how == "group" else {}))
    optimizer = optimiser(m)
    optimizer.register_step_pre_hook(lambda *_: tracker.apply_penalty(0.01))
    losses = train_rank(parallel, tracker, rank, STEPS, optimizer=optimizer, sync=parallel.no_sync)
    tracker.close()
    return losses, trained(m), read(tracker), tracker.every


def penalty_in_loss(rank, world):
    m = model()
    parallel = DistributedDataParallel(m)
    with fastlora.track(parallel, warmup=1) as tracker:
        train_rank(parallel, tracker, rank, range(1))
        (loss_of(parallel, batch(1, 0, rank)) + tracker.penalty(0.1)).backward()
    return {n: p.grad for n, p in m.named_parameters() if p.requires_grad}


# By step: the adapter of each of a rank's samples; "b" is nowhere in step 1, and with the last rank alone in step 2.
IDS = [lambda last: [0, 1, 1], lambda last: [0, 0, -1], lambda last: [0, 1, 0] if last else [0, 0, 0]]


def two_adapters():
    return fastlora.add_adapter(model(), "b", fastlora.LoraConfig(r=1, target_modules=["query"]))


def several_loss(parallel, m, step, rank, world):
    ids = torch.tensor(IDS[step](rank == world - 1))
    x, y = data(samples=3, seed=10 * step + rank)
    with fastlora.use_adapters(m, ids):
        logits = parallel(x).mean(1)
    return fastlora.per_adapter_mean(nn.functional.cross_entropy(logits, y, reduction="none"), ids)


def several_adapters(rank, world):
    m = two_adapters()
    parallel, found = DistributedDataParallel(m), []
    for options in (dict(statistics=("grad_sq", "act_var")), dict(statistics="fisher"), dict(estimator="exact")):
        with fastlora.track(parallel, adapter="b", **options) as tracker:
            for step in range(len(IDS)):
                several_loss(parallel, m, step, rank, world).backward()
                tracker.step()
                m.zero_grad()
        found.append((read(tracker), {kind: c.tolist() for kind, c in tracker._averages.counts.items()}))
    return found


def not_finite(rank, world):
    m = model()
    parallel = DistributedDataParallel(m)
    with fastlora.track(parallel, estimator="exact", statistics=("grad_sq", "act_cov"), ema=None) as tracker:
        for step in range(3):
            x, y = batch(step, 0, rank)
            if step == 1 and rank == world - 1:
                x = x * torch.inf
            loss_of(parallel, (x, y)).backward()
            tracker.step()
            m.zero_grad()
    return tracker.skipped, tracker._averages.counts["grad_sq"].tolist(), read(tracker)


def partly_absent(rank, world):
    m = experts()
    parallel = DistributedDataParallel(m, find_unused_parameters=True)
    with fastlora.track(parallel, ema=None, statistics=("grad_sq", "act_var")) as tracker:
        for reached in REACHED:
            loss_of(parallel, routed(rank, reached(rank))).backward()
            tracker.step()
            m.zero_grad()
    return read(tracker), {kind: c.tolist() for kind, c in tracker._averages.counts.items()}


def all_reduces(rank, world):
    """How many collectives each step takes beside DDP's own."""
    m = model()
    parallel, calls, plain = DistributedDataParallel(m), [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(args[0].numel()) or plain(*args, **kwargs)
    counts = []
    with fastlora.track(parallel, statistics=("grad_sq", "act_var"), probes=4) as tracker:
        for step in range(3):
            train_rank(parallel, tracker, rank, [step])
            counts.append(len(calls))
            size = calls[-1]
            calls.clear()
    dist.all_reduce = plain
    return counts, size


def disagreeing(rank, world):
    m, messages = DistributedDataParallel(model()), []
    for options in (
        {"seed": rank},
        {"statistics": ("grad_sq", "act_var") if rank else ("grad_sq",)},
        {"every": 1 + rank},
    ):
        with fastlora.track(m, **options) as tracker:
            loss_of(m, batch(0, 0, rank)).backward()
            try:
                tracker.step()
            except ValueError as error:
                messages.append(str(error))
    return messages


def alone(rank, world):
    """Each rank for itself: when it says so, or when nothing says that the model is trained together."""
    found, records = [], []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("fastlora.tracking.all_reduce").addHandler(handler)
    for options in ({"process_group": None}, {}):
        m = model()
        with fastlora.track(m, every=1, **options) as tracker:
            train_rank(m, tracker, rank, range(2))
        found.append(read(tracker))
    return found, records


def resume(rank, world, folder):
    """Take up what one process left, and go on to the end."""
    m, state = model(), torch.load(f"{folder}/half.pt", weights_only=True)
    m.load_state_dict(state["model"])
    parallel, optimizer = DistributedDataParallel(m), optimiser(m)
    optimizer.load_state_dict(state["optimizer"])
    with fastlora.track(parallel) as tracker:
        tracker.load_state_dict(state["tracker"])
        train_rank(parallel, tracker, rank, range(CUT, len(STEPS)), optimizer=optimizer)
    return trained(m), read(tracker), tracker.state_dict()


def calibrated(rank, world):
    found = {}
    for method in ("fc", "fim", "fw"):
        m = model_at_start()
        batches = [batch(step, 0, rank) for step in range(3)]
        scores = fastlora.calibrate(m, batches, loss_of, steps=3, method=method, progress=False)
        ranks = fastlora.allocate(scores, budget=12, r_min=1, r_max=4)
        fastlora.set_ranks(m, ranks)
        parallel = DistributedDataParallel(m)  # compares the shapes of all ranks
        loss_of(parallel, batches[0]).backward()
        found[method] = dict(scores), ranks
    return found


def model_at_start():
    m = model()
    with torch.no_grad():
        for layer in fastlora.nn.linear.adapted_layers(m).values():
            for b in layer.lora_B.parameters():
                b.zero_()
    return m


HOW = ("wrapper", "model", "track first", "compiled", "group")


def work(rank, world, folder):
    logging.disable(logging.NOTSET)
    found = {
        "statistics": statistics(rank, world, STATISTICS),
        "training": {how: training(rank, world, how) for how in (HOW if world == 2 else HOW[:1])},
        "resume": resume(rank, world, folder),
    }
    for scenario in (
        alone,
        several_adapters,
        penalty_in_loss,
        not_finite,
        partly_absent,
        all_reduces,
        disagreeing,
        calibrated,
    ):
        found[scenario.__name__] = scenario(rank, world)
    return found


def half_way(world, path):
    """One process trains for the first steps and saves."""
    m = model()
    optimizer = optimiser(m)
    with fastlora.track(m, every=1) as tracker:
        train_alone(m, tracker, world, range(CUT), optimizer=optimizer)
    torch.save({"model": m.state_dict(), "optimizer": optimizer.state_dict(), "tracker": tracker.state_dict()}, path)
