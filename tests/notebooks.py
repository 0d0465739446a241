"""Runs the notebooks as `nbdev_test` does, each in a process of its own.

    python tests/notebooks.py [--papers] [--slow] [NOTEBOOK ...]

`nbdev_test` runs many in one process, where a class that one notebook defines again (`Mart`, in the registry of
objectives) is there for the next one, which wants the library's."""
import argparse
import os
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from nbdev.config import get_config
from nbdev.test import test_nb

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT/"nbs"
SKIPPED = get_config(path=ROOT).tst_flags.split()     # cells with these flags
SLOW = ["slow"]                                       # of them, those that `make test-all` runs
# Elsewhere a process that has loaded torch cannot be forked, and each child loads it itself.
PROCESSES = get_context("fork" if sys.platform == "linux" else "spawn")


def notebooks(papers):
    found = [path for path in sorted(NOTEBOOKS.rglob("*.ipynb")) if not path.parent.name.startswith((".", "_"))]
    return [path for path in found if papers or not path.is_relative_to(NOTEBOOKS/"papers")]


def run(path, force):
    passed, _ = test_nb(path, skip_flags=SKIPPED, force_flags=force, basepath=ROOT)
    sys.exit(not passed)


def in_children(paths, workers, force):
    "Yields path, whether it passed, and seconds, as they end. A child may have children: it is no daemon."
    todo, running = [*reversed(paths)], {}
    while todo or running:
        while todo and len(running) < workers:
            child = PROCESSES.Process(target=run, args=(path := todo.pop(), force))
            child.start()
            running[child.sentinel] = child, path, time.monotonic()
        for sentinel in wait(running):
            child, path, begun = running.pop(sentinel)
            child.join()
            yield path.relative_to(ROOT), child.exitcode == 0, time.monotonic() - begun


def main():
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    asked.add_argument("notebooks", nargs="*", type=lambda path: Path(path).resolve(), help="none: all")
    asked.add_argument("--papers", action="store_true", help="the papers' pages too")
    asked.add_argument("--slow", action="store_true", help="the cells marked #| slow too")
    asked.add_argument("--workers", type=int, default=os.cpu_count())
    args = asked.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")     # torch's threads of several children wait for one another
    if PROCESSES.get_start_method() == "fork": import pandas, sklearn.metrics, torchvision  # noqa: E401, F401  (once)
    ended, failed = 0, []
    for path, passed, seconds in in_children(args.notebooks or notebooks(args.papers), args.workers, SLOW*args.slow):
        print(f"{seconds:5.0f} s  {path}{'' if passed else '  FAILED'}", flush=True)
        ended += 1
        if not passed: failed.append(str(path))
    print(f"{ended - len(failed)} of {ended} notebooks passed", *failed, sep="\n  failed: ")
    sys.exit(bool(failed))


if __name__ == "__main__": main()
