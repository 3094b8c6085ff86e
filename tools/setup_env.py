"""Make ``.venv`` ready: pinned dependencies, then this package with its native library. Does nothing when up to date.

A torch with CUDA that the calling Python already has is used, never replaced: the environment then sees the packages of
that Python, and only what is missing is installed. ``setup_env.py demo`` installs what the demo needs and no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fastlora-setup.json"
REQUIREMENTS = {"demo": ROOT / "requirements-demo.txt", "all": ROOT / "requirements.txt"}
MINIMUM = (3, 10)


def digest(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def cuda_torch() -> str | None:
    """Version of a torch with CUDA that this Python has and that can see a GPU, or None."""
    probe = "import torch; print(torch.__version__ if torch.version.cuda and torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def run(*words: object, **environment: str) -> None:
    command = [str(w) for w in words]
    print("+", " ".join(command).replace(f"{ROOT}/", ""), flush=True)
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **environment})


def files_of(kind: str) -> list[Path]:
    """The requirement files of a kind; what everything needs begins with what the demo needs."""
    return [REQUIREMENTS["demo"]] if kind == "demo" else list(REQUIREMENTS.values())


def missing_requirements(kind: str) -> list[str]:
    """Names in the requirement files that the environment lacks, whatever their version."""
    lines = [line for path in files_of(kind) for line in path.read_text().splitlines()]
    names = [line.partition("==")[0] for line in lines if "==" in line]
    probe = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: m.version(name)\n"
        "    except m.PackageNotFoundError: print(name)\n"
    )
    done = subprocess.run([PYTHON, "-c", probe, *names], capture_output=True, text=True, check=True)
    return done.stdout.split()


def install_dependencies(kind: str) -> None:
    torch = cuda_torch()
    if not PYTHON.exists():
        shutil.rmtree(VENV, ignore_errors=True)
        run(sys.executable, "-m", "venv", *(["--system-site-packages"] if torch else []), VENV)
    pip = (PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if torch is None:
        run(*pip, "-r", REQUIREMENTS[kind])
        return
    missing = missing_requirements(kind)
    if missing:
        constraint = VENV / "keep-torch.txt"
        constraint.write_text(f"torch=={torch}\n")
        run(*pip, "--constraint", constraint, *missing)


def main(kind: str = "all") -> None:
    if sys.version_info < MINIMUM:
        sys.exit(f"Python {MINIMUM[0]}.{MINIMUM[1]} or newer is needed, this is {sys.version.split()[0]}")
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
    project = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    wanted = {
        **{k: digest([*files_of(k), Path(__file__).resolve()]) for k in (REQUIREMENTS if kind == "all" else ["demo"])},
        "native": digest([*project, *sources]) + os.environ.get("FASTLORA_BUILD", "auto"),
        "root": str(ROOT),  # an editable install and a virtual environment do not survive a move
    }
    have = json.loads(STAMP.read_text()) if STAMP.exists() and PYTHON.exists() else {}
    if wanted.items() <= have.items():
        return
    if have.get("root") not in (None, str(ROOT)):
        shutil.rmtree(VENV)
        have = {}
    if have.get(kind) != wanted[kind]:
        install_dependencies(kind)
    # The name that an earlier checkout was installed under, and that another project has in the public index.
    run(PYTHON, "-m", "pip", "uninstall", "--quiet", "--disable-pip-version-check", "--yes", "fastlora")
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps",
        "--editable", ROOT)  # fmt: skip
    STAMP.write_text(json.dumps(have | wanted))


if __name__ == "__main__":
    main(*sys.argv[1:])
