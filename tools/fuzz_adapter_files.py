"""Fuzz the reader of adapter folders: ``python tools/fuzz_adapter_files.py --seconds 300 --out RESULT.json``.

An input is a string of bytes that says how one of two good folders, ours and PEFT's, is damaged: bytes flipped, cut,
put in or taken out, JSON values and headers replaced, files swapped for links, folders, pipes and pickles.
For every one ``fastlora.load`` either loads it or raises ``ValueError`` or ``FileNotFoundError`` with the folder's name
in it and the model as it was; it opens nothing outside of the folder, writes nothing, and runs nothing.

With atheris (coverage-guided) where it is installed and ``--seconds`` is given, else a fixed sequence of ``--inputs``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import result_file
from small_model import adapted, machine, plain, snapshot
from torch import nn

import fastlora
from fastlora.peft_io.folder import CONFIG, SIDE, TENSORS

NAMES = (TENSORS, CONFIG, SIDE)
FORBIDDEN = ("pickle.find_class", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.",
             "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.", "ctypes.dlopen", "marshal.loads")  # fmt: skip
# What a hostile file might say.
VALUES = [None, True, False, 0, 1, 2, -1, 3.5, 2**31, 2**63, 10**30, 1e308, "", "a", "../../etc/passwd", "/etc/passwd",
          "head\x00", ".*", "(", "(a+)+$", "__class__", "blocks.0.attn.qkv", "weight", [], {}, [[]], [None], ["head"],
          ["../head"], [0, 8], [8, 0], [-1, 4], [0, 2**62], [2**62, 2], {"": 1}, {"a": {}}, "F32", "I64", "F8_E4M3",
          "constant", "per_rank"]  # fmt: skip


class Choices:
    """Decisions read from a string of bytes; zeros when it has run out."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def below(self, n: int) -> int:
        return (self.byte() << 16 | self.byte() << 8 | self.byte()) % max(n, 1)

    def of(self, items: Any) -> Any:
        return items[self.below(len(items))]

    def bytes(self) -> bytes:
        count = self.below(64)
        found = self.data[self.at : self.at + count]
        self.at += count
        return found


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON document."""
    found = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


def damage_json(document: Any, choices: Choices) -> Any:
    for _ in range(1 + choices.below(3)):
        where = places(document)
        if not where:
            return choices.of(VALUES)
        container, key = choices.of(where)
        what = choices.below(4)
        if what == 0 and isinstance(container, dict):
            container[choices.of([*map(str, VALUES), *(k for c, k in where if isinstance(k, str))])] = container.pop(
                key
            )
        elif what == 1:
            del container[key]
        elif what == 2:
            container[key] = copy.deepcopy(choices.of([c[k] for c, k in where]))
        else:
            container[key] = copy.deepcopy(choices.of(VALUES))
    return document


def damage_bytes(data: bytes, choices: Choices) -> bytes:
    damaged = bytearray(data)
    for _ in range(1 + choices.below(4)):
        at, what = choices.below(len(damaged) + 1), choices.below(4)
        if what == 0 and damaged:
            damaged[at % len(damaged)] ^= 1 << choices.below(8)
        elif what == 1:
            damaged[at:at] = choices.bytes()
        elif what == 2:
            del damaged[at : at + 1 + choices.below(64)]
        else:
            del damaged[at:]
    return bytes(damaged)


def damage_header(data: bytes, choices: Choices) -> bytes:
    """A safetensors file whose header says something else; its length fits, or not."""
    size = int.from_bytes(data[:8], "little")
    header = damage_json(json.loads(data[8 : 8 + size]), choices)
    text = json.dumps(header).encode()
    length = choices.of([len(text), len(text), len(text), 0, 2**63, 2**40, len(text) + 1])
    return length.to_bytes(8, "little") + text + data[8 + size :]


def damage_kind(path: Path, choices: Choices) -> None:
    """Something that is not an ordinary file under the name of one."""
    path.unlink()
    what = choices.below(6)
    if what == 0:
        path.symlink_to("/etc/passwd")
    elif what == 1:
        path.symlink_to(path.name)
    elif what == 2:
        path.mkdir()
    elif what == 3:
        os.mkfifo(path)
    elif what == 4:
        path.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    else:
        path.with_name("adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")


def damage(folder: Path, choices: Choices) -> None:
    path = folder / choices.of([n for n in NAMES if (folder / n).exists()])
    what = choices.below(8)
    if what == 0:
        damage_kind(path, choices)
    elif what < 3 and path.name == TENSORS:
        path.write_bytes(damage_header(path.read_bytes(), choices))
    elif what < 6 and path.name != TENSORS:
        path.write_text(json.dumps(damage_json(json.loads(path.read_text()), choices)))
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), choices))


class Guard:
    """An audit hook that, while armed, notes what a reader of data must not do."""

    def __init__(self) -> None:
        self.armed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple) -> None:
        if self.armed is None:
            return
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path, mode = os.fsdecode(args[0]), args[1] or "r"
            inside = Path(path).is_relative_to(self.armed) or path.endswith((".py", ".pyc"))
            if set(str(mode)) & set("wax+") or not inside:
                self.seen.append(f"{event}: {path} {mode}")
        elif event.startswith(FORBIDDEN):
            self.seen.append(f"{event}: {args!r:.100}")


class Target:
    """The good folders and models, and the judgement on one input."""

    def __init__(self, root: Path):
        self.root, self.guard, self.outcomes = root, Guard(), Counter()
        fastlora.save(adapted(), root / "ours")
        shutil.copytree(root / "ours", root / "theirs")
        (root / "theirs" / SIDE).unlink()
        self.models = [plain(), adapted()]

    def run(self, data: bytes) -> str:
        """What became of an input: ``"loaded"`` or the kind of error; ``AssertionError`` when that was not right."""
        choices = Choices(data)
        folder = self.root / "input"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / choices.of(("ours", "theirs")), folder)
        damage(folder, choices)
        which = choices.below(2)
        model = self.models[which]
        before = snapshot(model)
        self.guard.seen, self.guard.armed = [], folder
        try:
            fastlora.load(model, folder)
            outcome = "loaded"
        except (ValueError, FileNotFoundError) as error:
            outcome = type(error).__name__
            self.guard.armed = None
            assert str(folder) in str(error), f"the error does not name the folder: {error}"
            assert snapshot(model) == before, f"refused and changed: {error}"
        finally:
            self.guard.armed = None
        assert not self.guard.seen, f"loading did {self.guard.seen}"
        if outcome == "loaded":
            self._whole(model)
            self.models[which] = plain() if which == 0 else adapted()
        self.outcomes[outcome] += 1
        return outcome

    def _whole(self, model: nn.Module) -> None:
        """A model that took a file can be saved: nothing in it is half of something."""
        fastlora.save(model, self.root / "again")


def sequence(count: int, seed: int = 0) -> Iterator[bytes]:
    """The fixed inputs: the same in every run."""
    generator = random.Random(seed)
    for _ in range(count):
        yield generator.randbytes(generator.randint(0, 160))


def guided(target: Target, seconds: int, finish: Callable[[], None]) -> None:
    """Coverage-guided inputs; ends the process when time is up (0) or an input was judged wrong (77)."""
    import atheris

    for name, module in list(sys.modules.items()):
        if name.startswith("fastlora.peft_") or name == "fastlora.config":
            for member, function in list(vars(module).items()):
                if getattr(function, "__module__", "") == name and isinstance(function, types.FunctionType):
                    setattr(module, member, atheris.instrument_func(function))
    corpus, until = target.root / "corpus", time.monotonic() + seconds
    corpus.mkdir()
    for i, data in enumerate(sequence(200)):
        (corpus / str(i)).write_bytes(data)

    def one(data: bytes) -> None:
        target.run(data)
        if time.monotonic() > until:  # libFuzzer's own limit leaves without a chance to write anything
            finish()
            os._exit(0)

    options = ["-max_len=256", "-rss_limit_mb=4096", "-timeout=20", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def result(target: Target, began: float, mode: str) -> dict[str, Any]:
    return {"mode": mode, "command": f"python tools/{Path(__file__).name} {' '.join(sys.argv[1:])}",
            "seconds": round(time.time() - began, 1), "inputs": sum(target.outcomes.values()),
            "outcomes": dict(target.outcomes), "wrong": 0, **machine()}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, help="coverage-guided, with atheris, for so long")
    parser.add_argument("--inputs", type=int, default=2000, help="length of the fixed sequence (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the fixed sequence (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments, began = parser.parse_args(), time.time()
    folder = Path(tempfile.mkdtemp()).resolve()
    target = Target(folder)

    def finish() -> None:
        mode = "fixed sequence" if arguments.seconds is None else "coverage-guided"
        text = result_file.dumps(result(target, began, mode))
        sys.stdout.write(text)
        sys.stdout.flush()
        if arguments.out is not None:
            arguments.out.write_text(text)
        shutil.rmtree(folder)

    if arguments.seconds is not None:
        guided(target, arguments.seconds, finish)
    for data in sequence(arguments.inputs, arguments.seed):
        target.run(data)
    finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
