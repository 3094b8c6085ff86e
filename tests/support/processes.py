"""Test files in other processes beside this one, their reports replayed here.

The kernel cases run in Triton's interpreter, which is chosen when Triton is imported: always a process of its own.
``--processes N`` adds others. Each process claims one file after the other; counts, failures, durations, XML and exit
status are those of a single run, and a case whose process dies is a failure.
"""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("processes")
    group.addoption("--processes", type=int, default=1, metavar="N", help="processes that share the files (default 1)")
    group.addoption("--worker", help="what this process is to run; for processes that pytest starts itself")


def pytest_configure(config: pytest.Config) -> None:
    plugin = Worker if config.option.worker else Main
    config.pluginmanager.register(plugin(config), "fastlora-processes")


def interpreted(item: pytest.Item) -> bool:
    """Whether the case wants Triton's interpreter and is not in it."""
    on_cpu = os.environ.get("FASTLORA_KERNEL_DEVICE", "cpu") == "cpu"
    return item.path.name.startswith("cases_") and on_cpu and os.environ.get("TRITON_INTERPRET") != "1"


def by_file(items: list[pytest.Item]) -> dict[Path, list[pytest.Item]]:
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    return files


def claimed(files: dict[Path, list[pytest.Item]], claims: Path, start: float) -> Iterator[pytest.Item]:
    """The items of the files that no other process has taken, from a place in the list on, once around it."""
    names = list(enumerate(files))
    first = int(start * len(names))
    for number, path in names[first:] + names[:first]:
        try:
            (claims / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from files[path]


def run_all(session: pytest.Session, items: Iterator[pytest.Item], after=lambda: None) -> None:
    """Pytest's own loop, over items that are claimed while it runs."""
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after()
        stop(session)
        item = following


def stop(session: pytest.Session) -> None:
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


class Worker:
    """In a process beside: runs what it can claim and writes its reports down."""

    def __init__(self, config: pytest.Config):
        self.config, job = config, json.loads(Path(config.option.worker).read_text())
        self.wanted, self.claims, self.start = set(job["nodeids"]), Path(job["claims"]), job["start"]
        self.reports = open(job["reports"], "a")  # noqa: SIM115

    def write(self, line: dict) -> None:
        self.reports.write(json.dumps(line) + "\n")
        self.reports.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.wanted]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        run_all(session, claimed(by_file(session.items), self.claims, self.start))
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self.config.hook
        self.write(hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str, nodeid: str) -> None:
        shown = {name: getattr(warning_message, name) for name in ("filename", "lineno")}
        shown |= {"message": str(warning_message.message), "category": warning_message.category.__name__}
        self.write({"warning": shown, "when": when, "nodeid": nodeid})


class Process:
    """A process beside, as seen from here."""

    def __init__(self, config: pytest.Config, folder: Path, name: str, files: list[Path], job: dict, **environment):
        self.reports, self.output = folder / f"{name}.jsonl", folder / f"{name}.txt"
        self.reports.touch()
        (folder / f"{name}.json").write_text(json.dumps({**job, "reports": str(self.reports)}))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}"]
        command += [f"--worker={folder / f'{name}.json'}", f"--tb={config.option.tbstyle}", *map(str, files)]
        for flag, name in (("-o", "override_ini"), ("-W", "pythonwarnings")):
            command += [word for value in getattr(config.option, name) or () for word in (flag, value)]
        with self.output.open("w") as output:
            environment = {**os.environ, **environment}
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self.lines = self.reports.open()
        self.rest = ""

    def ended(self) -> bool:
        return self.process.poll() is not None

    def read(self) -> Iterator[dict]:
        """What was written since the last call."""
        *lines, self.rest = (self.rest + self.lines.read()).split("\n")
        yield from map(json.loads, lines)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.lines.close()


class Main:
    """In the process that was called: starts the others, runs what it can claim, and replays reports file by file."""

    def __init__(self, config: pytest.Config):
        self.config = config
        self.processes: list[Process] = []
        self.found: dict[str, list[pytest.TestReport]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        option = session.config.option
        beside = by_file([item for item in session.items if interpreted(item)])
        files = by_file([item for item in session.items if not interpreted(item)])
        broken = session.testsfailed and not option.continue_on_collection_errors
        alone = option.processes == 1 and not beside
        if alone or broken or option.collectonly or getattr(option, "benchmark_only", False):
            return None
        self.waiting = {**files, **beside}
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.launch(Path(folder), files, beside)
                mine = claimed(files, Path(folder) / "shared", 0.0)
                run_all(session, self.noted(mine), self.replay)
                while self.waiting:
                    ended = all(process.ended() for process in self.processes)
                    self.replay()
                    stop(session)
                    if ended:
                        self.give_up()
                    time.sleep(0.05)
            finally:
                for process in self.processes:
                    process.close()
        return True

    def launch(self, folder: Path, files: dict[Path, list[pytest.Item]], beside: dict[Path, list[pytest.Item]]) -> None:
        def start(name: str, claims: str, some: dict[Path, list[pytest.Item]], place: float, **environment) -> None:
            (folder / claims).mkdir(exist_ok=True)
            nodeids = [item.nodeid for items in some.values() for item in items]
            job = {"nodeids": nodeids, "claims": str(folder / claims), "start": place}
            self.processes.append(Process(self.config, folder, name, list(some), job, **environment))

        (folder / "shared").mkdir()
        if beside:
            cache = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "triton")}
            start("interpreter", "interpreted", beside, 0.0, **cache)
        count = min(self.config.option.processes, len(files))
        for number in range(1, count):
            start(f"worker{number}", "shared", files, number / count)

    def noted(self, items: Iterator[pytest.Item]) -> Iterator[pytest.Item]:
        """The same items; nobody else's report is awaited for their files."""
        for item in items:
            self.waiting.pop(item.path, None)
            yield item

    def replay(self) -> None:
        """Report the files that other processes have finished."""
        hook = self.config.hook
        for process in self.processes:
            for line in process.read():
                if shown := line.get("warning"):
                    shown["category"] = getattr(builtins, shown["category"], UserWarning)
                    given = {"when": line["when"], "nodeid": line["nodeid"], "location": None}
                    given["warning_message"] = warnings.WarningMessage(**shown)
                    hook.pytest_warning_recorded.call_historic(kwargs=given)
                else:
                    report = hook.pytest_report_from_serializable(config=self.config, data=line)
                    if isinstance(report.longrepr, list):  # of a skip: JSON has no tuples
                        report.longrepr = tuple(report.longrepr)
                    self.found.setdefault(report.nodeid, []).append(report)
        for path, items in list(self.waiting.items()):
            if all(item.nodeid in self.found and self.found[item.nodeid][-1].when == "teardown" for item in items):
                self.tell(path)

    def tell(self, path: Path) -> None:
        for item in self.waiting.pop(path):
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for report in self.found.pop(item.nodeid):
                item.ihook.pytest_runtest_logreport(report=report)
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def give_up(self) -> None:
        """Every process has ended: what has no report yet will get none."""
        said = [f"exit {each.process.returncode}:\n{each.output.read_text()[-3000:]}" for each in self.processes]
        text = (
            "The process of this case ended before the case did. The last words of each process, and its exit status:\n"
        )
        for path, items in list(self.waiting.items()):
            for item in items:
                reports = self.found.setdefault(item.nodeid, [])
                if not reports or reports[-1].when != "teardown":
                    lost = pytest.TestReport(item.nodeid, item.location, {}, "failed", text + "\n".join(said), "call")
                    reports.append(lost)
            self.tell(path)
