"""Saves that are killed, interrupted, or find the disk full: the old adapter or the new one, whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import time

import pytest
import torch
from support.peft_help import CONFIG, SIDE, TENSORS, logits, make_vit, peft

import fastlora
from fastlora._utils.files import PENDING, read_together, replace_together

STEPS = ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def adapted(rank):
    config = fastlora.LoraConfig(r=rank, target_modules="qkv", init_lora_weights=False, modules_to_save=["head"])
    return fastlora.inject(make_vit(), config)


@pytest.fixture(scope="module")
def models():
    """Two adapters of different ranks: a mixture of their files cannot be loaded, or has other logits."""
    found = [adapted(2), adapted(5)]
    return found, [logits(m) for m in found]


KNOWN = {}


def by_us(folder):
    return fastlora.load(make_vit(), folder)


def by_peft(folder):
    return peft.PeftModel.from_pretrained(make_vit(), str(folder))


def which(folder, expected, read=by_us):
    """Which of the adapters a folder holds; a state of the folder that was seen before is not read again."""
    files = sorted((str(p.relative_to(folder)), p.read_bytes()) for p in folder.rglob("*") if p.is_file())
    state = (read, repr(files), *map(id, expected))
    if state not in KNOWN:
        loaded = logits(read(folder))
        whole = [torch.allclose(loaded, logit, atol=1e-6) for logit in expected]
        assert sum(whole) == 1
        KNOWN[state] = whole.index(True)
    return KNOWN[state]


def which_plain(folder, expected):
    """The same as PEFT sees it, which does not know what is pending; None where there is no config."""
    if (folder / CONFIG).exists():
        return which(folder, expected, by_peft)
    with pytest.raises(ValueError):
        by_peft(folder)
    return None


def at_step(monkeypatch, step, act):
    """Call ``act`` in place of the ``step``-th call into the file system."""
    calls = itertools.count()
    for name in STEPS:
        function = getattr(os, name)

        def wrapped(*args, function=function, **kwargs):
            if next(calls) == step:
                act()
            return function(*args, **kwargs)

        monkeypatch.setattr(os, name, wrapped)


def in_child(work):
    """Run ``work`` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_each_step(monkeypatch, folder, model, reset):
    """Save in a process that kills itself at its first, second, ... step, until it gets through."""
    for step in itertools.count():
        reset()

        def work(step=step):
            at_step(monkeypatch, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            fastlora.save(model, folder)

        status = in_child(work)
        yield status
        if status == 0:
            return
        assert status == -signal.SIGKILL


def test_killed_at_any_step_the_old_or_the_new_adapter_is_there(models, tmp_path, monkeypatch):
    (old, new), expected = models
    found, foreign = [], []
    for _ in killed_at_each_step(monkeypatch, tmp_path, new, lambda: fastlora.save(old, tmp_path)):
        found.append(which(tmp_path, expected))
        foreign.append(which_plain(tmp_path, expected))
    assert len(found) > 10
    assert found == sorted(found) and set(found) == {0, 1}
    assert foreign[0] == 0 and foreign[-1] == 1 and None in foreign
    # What was left lying about is gone after the last save.
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CONFIG, TENSORS, SIDE])


def test_with_the_same_config_peft_finds_an_adapter_at_every_step(models, tmp_path, monkeypatch):
    (old, _), (logit, _) = models
    new = adapted(2)
    with torch.no_grad():
        new.head.weight.neg_()
    expected = [logit, logits(new)]
    for _ in killed_at_each_step(monkeypatch, tmp_path, new, lambda: fastlora.save(old, tmp_path)):
        assert which_plain(tmp_path, expected) is not None
        which(tmp_path, expected)


def test_a_first_save_that_is_killed_leaves_no_adapter_or_a_whole_one(models, tmp_path, monkeypatch):
    (_, new), expected = models
    folder, found = tmp_path / "a", []
    for _ in killed_at_each_step(monkeypatch, folder, new, lambda: subprocess.run(["rm", "-rf", folder], check=True)):
        try:
            found.append(which(folder, expected))
        except FileNotFoundError:
            found.append(-1)
    assert found == sorted(found) and set(found) == {-1, 1}


def test_killed_at_random_moments_by_another_process(models, tmp_path):
    old, new, third = *models[0], adapted(3)
    expected, chance = [*models[1], logits(third)], random.Random(0)
    for _ in range(20):
        fastlora.save(old, tmp_path)
        done, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for model in itertools.cycle((new, third, old)):
                    fastlora.save(model, tmp_path)
                    os.write(told, b".")
            finally:
                os._exit(1)
        os.close(told)
        # The saves that were told of, and not the clock, say which adapter has to be there.
        began = time.perf_counter()
        saves = sum(len(os.read(done, 1)) for _ in range(chance.randint(1, 4)))
        time.sleep(chance.random() * (time.perf_counter() - began) / saves)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(done, "rb") as rest:
            saves += len(rest.read())
        assert which(tmp_path, expected) in {saves % 3, (saves + 1) % 3}


def test_a_reader_beside_a_writer_sees_one_save(tmp_path):
    def write(i):
        replace_together(tmp_path, {"a": b"%d" % i * 1000, "b": b"%d" % i * 10, "c": b"%d" % (i % 3)})

    write(0)
    child = os.fork()
    if child == 0:
        for i in itertools.cycle(range(10)):
            write(i)
    try:
        seen = set()
        for _ in itertools.takewhile(lambda i: i < 300 or len(seen) < 2, itertools.count()):
            found = read_together(tmp_path, ("a", "b", "c"))
            i = int(found["b"][:1])
            assert found == {"a": b"%d" % i * 1000, "b": b"%d" % i * 10, "c": b"%d" % (i % 3)}
            seen.add(i)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(seen) > 1


def test_interrupted_by_the_keyboard_nothing_is_left_behind(models, tmp_path, monkeypatch):
    (old, new), expected = models

    def interrupt():
        raise KeyboardInterrupt

    for step in itertools.count():
        fastlora.save(old, tmp_path)
        with monkeypatch.context() as patch:
            at_step(patch, step, interrupt)
            try:
                fastlora.save(new, tmp_path)
            except KeyboardInterrupt:
                assert not list(tmp_path.glob(".fastlora-*.tmp"))
                which(tmp_path, expected)
            else:
                break
    assert step > 10 and which(tmp_path, expected) == 1


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_file_larger_than_allowed_is_named_and_the_old_adapter_stays(models, tmp_path):
    (old, new), expected = models
    fastlora.save(old, tmp_path)
    before = contents(tmp_path)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
        with pytest.raises(OSError, match=f"while saving {TENSORS}; what was there before is unchanged") as raised:
            fastlora.save(new, tmp_path)
        assert raised.value.errno == errno.EFBIG and raised.value.filename == str(tmp_path)

    assert in_child(work) == 0
    assert contents(tmp_path) == before and which(tmp_path, expected) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for one adapter and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = sum(len(data) for data in contents(saved_once(tmp_path / "measured")).values())
    pages = -(-size // 4096) * 3 // 2
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def saved_once(folder):
    fastlora.save(adapted(5), folder)
    return folder


def test_a_full_disk_is_named_and_the_old_adapter_stays(models, small_disk):
    (old, new), expected = models
    fastlora.save(new, small_disk / "a")
    before = contents(small_disk / "a")
    with pytest.raises(OSError, match="No space left on device, while saving") as raised:
        fastlora.save(new, small_disk / "a")
    assert raised.value.errno == errno.ENOSPC
    assert contents(small_disk / "a") == before and which(small_disk / "a", expected) == 1
    with pytest.raises(OSError, match="No space left on device"):
        fastlora.save(new, small_disk / "b")
    assert not (small_disk / "b").exists()


def test_what_is_pending_is_read_first_and_published_by_the_next_save(tmp_path):
    replace_together(tmp_path, {"weights": b"1", "config": b"1"})
    (tmp_path / PENDING).mkdir()
    (tmp_path / PENDING / "config").write_bytes(b"2")  # the weights have moved already
    (tmp_path / "weights").write_bytes(b"2")
    (tmp_path / "config").unlink()
    assert read_together(tmp_path, ("weights", "config", "other")) == {"weights": b"2", "config": b"2", "other": None}
    replace_together(tmp_path, {"weights": b"3", "config": b"3"})
    assert contents(tmp_path) == {"weights": b"3", "config": b"3"}


def test_other_files_of_the_folder_stay(models, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    fastlora.save(models[0][0], tmp_path)
    assert (tmp_path / "optimizer.pt").read_bytes() == b"x"
    assert json.loads((tmp_path / SIDE).read_text())["format_version"] == 1


def test_a_path_below_a_file_is_refused(models, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(ValueError, match="path: expected a folder"):
            fastlora.save(models[0][0], path)
