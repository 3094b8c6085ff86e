"""``python executed_lines.py FILE FOLDER MODULE ARGUMENTS``: runs a module and writes which of FOLDER's lines ran.

FILE takes a JSON object: the name of each file, and the numbers of the lines of it that ran, in order.
"""

from __future__ import annotations

import dis
import json
import runpy
import sys
from pathlib import Path
from types import CodeType, FrameType


def lines_of(file: Path) -> set[int]:
    """The lines of a file that can run."""
    found, waiting = set(), [compile(file.read_text(), str(file), "exec")]
    while waiting:
        code = waiting.pop()
        found |= {line for _, line in dis.findlinestarts(code) if line}
        waiting += [part for part in code.co_consts if isinstance(part, CodeType)]
    return found


def main() -> None:
    """Run the module under a tracer that looks at the folder's files alone."""
    out, folder, module, *arguments = sys.argv[1:]
    ran: dict[str, set[int]] = {}

    def local(frame: FrameType, event: str, argument: object):
        ran[frame.f_code.co_filename].add(frame.f_lineno)
        return local

    def enter(frame: FrameType, event: str, argument: object):
        name = frame.f_code.co_filename
        if not name.startswith(folder):
            return None
        ran.setdefault(name, set()).add(frame.f_lineno)
        return local

    sys.argv = [module, *arguments]
    sys.settrace(enter)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.settrace(None)
        found = {Path(name).name: sorted(lines) for name, lines in ran.items()}
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
