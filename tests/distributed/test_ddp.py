"""DistributedDataParallel: two and four ranks with unequal data do what one process does with all of it."""

from __future__ import annotations

import pytest
import torch
from support.distributed_ddp import (
    HOW,
    IDS,
    REACHED,
    STATISTICS,
    STEPS,
    experts,
    half_way,
    model_at_start,
    routed,
    several_loss,
    two_adapters,
    work,
)  # fmt: skip
from support.distributed_help import assert_read, batch, optimiser, read, run_ranks, train_alone, train_rank, trained
from support.tracker_help import loss_of, model

import fastlora


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ddp")
    half_way(request.param, folder / "half.pt")
    return run_ranks(work, request.param, folder)


def same_everywhere(found):
    assert all(str(other) == str(found[0]) for other in found)
    return found[0]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_the_global_batch(ranks, name):
    got = same_everywhere([found["statistics"][name] for found in ranks])
    m, options = model(), STATISTICS[name]
    with fastlora.track(m, **{"every": 1, **options}) as tracker:
        train_alone(m, tracker, len(ranks), STEPS)
    want = read(tracker)
    if options.get("loss_reduction") == "sum":
        # Each rank's loss counts in full; one process has divided it by the number of ranks.
        want["fisher"] = {key: value * len(ranks) ** 2 for key, value in want["fisher"].items()}
    assert_read(got, want)


def test_a_mean_of_the_ranks_squares_is_another_number(ranks):
    """The data of this file can tell the right reduction from the wrong one."""
    got = ranks[0]["statistics"]["plain mean"]["grad_sq"]
    squares = []
    for rank in range(len(ranks)):
        m = model()
        with fastlora.track(m, every=1, **STATISTICS["plain mean"]) as tracker:
            train_rank(m, tracker, rank, STEPS)
        squares.append(tracker.scores("grad_sq"))
    for key, value in got.items():
        wrong = sum(own[key] for own in squares) / len(ranks)
        assert wrong > 1.1 * value


@pytest.mark.parametrize("how", HOW)
def test_losses_parameters_and_scores_are_those_of_one_process(ranks, how):
    if how not in ranks[0]["training"]:
        pytest.skip("with two ranks only")
    m = model()
    optimizer = optimiser(m)
    with fastlora.track(m, every=1) as tracker:
        optimizer.register_step_pre_hook(lambda *_: tracker.apply_penalty(0.01))
        losses = train_alone(m, tracker, len(ranks), STEPS, optimizer=optimizer)
    for rank, found in enumerate(ranks):
        got, parameters, scores, every = found["training"][how]
        assert every == 1
        torch.testing.assert_close(got, losses[rank], rtol=1e-9, atol=0)
        for name, want in trained(m).items():
            torch.testing.assert_close(parameters[name], want, rtol=1e-7, atol=1e-9)
        for key, want in tracker.scores("grad_sq").items():
            assert scores["grad_sq"][key] == pytest.approx(want, rel=1e-6)


def test_a_penalty_in_the_loss_counts_once(ranks):
    m = model()
    with fastlora.track(m, every=1, warmup=1) as tracker:
        train_alone(m, tracker, len(ranks), range(1))
        for rank in range(len(ranks)):
            (loss_of(m, batch(1, 0, rank)) / len(ranks)).backward()
        tracker.penalty(0.1).backward()
    for found in ranks:
        for name, p in m.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(found["penalty_in_loss"][name], p.grad, rtol=1e-9, atol=1e-12)


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(ranks):
    m = model()
    with fastlora.track(m, estimator="exact", statistics=("grad_sq", "act_cov"), ema=None) as tracker:
        for step in (0, 2):
            for rank in range(len(ranks)):
                (loss_of(m, batch(step, 0, rank)) / len(ranks)).backward()
            tracker.step()
    for found in ranks:
        skipped, counts, got = found["not_finite"]
        assert skipped == 1 and set(counts) == {2.0}
        assert_read(got, read(tracker))


def test_what_one_rank_lacks_counts_and_what_all_lack_does_not(ranks):
    m = experts()
    with fastlora.track(m, ema=None, every=1, statistics=("grad_sq", "act_var")) as tracker:
        for reached in REACHED:
            for rank in range(len(ranks)):
                (loss_of(m, routed(rank, reached(rank))) / len(ranks)).backward()
            tracker.step()
    for found in ranks:
        got, counts = found["partly_absent"]
        assert counts == {"grad_sq": [3.0, 2.0], "act_var": [3.0, 2.0]}
        assert_read(got, read(tracker))


def test_statistics_of_one_adapter_of_several(ranks):
    options = (dict(statistics=("grad_sq", "act_var")), dict(statistics="fisher"), dict(estimator="exact"))
    for i, kwargs in enumerate(options):
        m = two_adapters()
        with fastlora.track(m, adapter="b", every=1, **kwargs) as tracker:
            for step in range(len(IDS)):
                for rank in range(len(ranks)):
                    (several_loss(m, m, step, rank, len(ranks)) / len(ranks)).backward()
                tracker.step()
        for found in ranks:
            got, counts = found["several_adapters"][i]
            assert all(set(count) == {2.0} for count in counts.values())
            assert_read(got, read(tracker))


def test_one_all_reduce_a_step(ranks):
    m = model()
    layers = fastlora.nn.linear.adapted_layers(m).values()
    probes = sum(layer.out_features * 4 + 2 * (layer.out_features + 1) for layer in layers)
    for found in ranks:
        counts, size = found["all_reduces"]
        # Before the first, ranks compare what they were given.
        assert counts == [2, 1, 1]
        assert size == probes + 2 * len(layers) + 2


def test_ranks_that_were_given_different_things_all_raise(ranks):
    for rank, found in enumerate(ranks):
        messages = found["disagreeing"]
        assert messages[0] == f"track: seed differ between the data-parallel ranks; here: seed {rank}"
        assert messages[1].startswith("track: statistics differ") and messages[2].startswith("track: every differ")


def test_resumed_with_another_number_of_processes(ranks):
    world = len(ranks)
    m = model()
    optimizer = optimiser(m)
    with fastlora.track(m, every=1) as tracker:
        train_alone(m, tracker, world, STEPS, optimizer=optimizer)
    for found in ranks:
        parameters, scores, state = found["resume"]
        for name, want in trained(m).items():
            torch.testing.assert_close(parameters[name], want, rtol=1e-7, atol=1e-9)
        for key, want in tracker.scores("grad_sq").items():
            assert scores["grad_sq"][key] == pytest.approx(want, rel=1e-6)
    with fastlora.track(m, every=1) as resumed:  # and back into one process
        resumed.load_state_dict(state)
    assert_read(read(resumed), scores)


@pytest.mark.parametrize("method", ["fc", "fim", "fw"])
def test_calibration_gives_every_rank_the_scores_of_the_global_batch(ranks, method):
    scores, chosen = same_everywhere([found["calibrated"][method] for found in ranks])
    world = len(ranks)

    def loss(m, step):
        return sum(loss_of(m, batch(step, 0, rank)) for rank in range(world)) / world

    m = model_at_start()
    want = fastlora.calibrate(m, range(3), loss, steps=3, method=method, progress=False)
    assert scores == pytest.approx(dict(want), rel=1e-7, abs=1e-9)
    assert chosen == fastlora.allocate(want, budget=12, r_min=1, r_max=4)


def test_without_a_wrapper_each_process_is_alone_and_is_told(ranks):
    for rank, found in enumerate(ranks):
        both, records = found["alone"]
        m = model()
        with fastlora.track(m, every=1) as tracker:
            train_rank(m, tracker, rank, range(2))
        for got in both:
            assert_read(got, read(tracker))
        assert len(records) == 1 and "the model is neither wrapped by DDP nor sharded" in records[0]
