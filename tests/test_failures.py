"""Whatever happens to a run: nothing is lost, nothing is done twice but what was in flight, and it says what happened.

A worker is killed, dies each time, hangs, runs out of memory; the driver is killed or interrupted; the disk is full;
two drivers share a store; clocks disagree. What needs Dask's processes stands in test_dask.py."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent, indent
import pytest
from rdd_lib.core import Unwritable
from rdd_lib.reproduce.grid import CellError, PartMissing, product, run_grid
from rdd_lib.reproduce.orders import Orders
from rdd_lib.reproduce.store import CellStore
from rdd_lib.reproduce.work import Work, failures, noted_runs
from toy_cells import begun, ended, odd, square

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture
def store(tmp_path): return CellStore(tmp_path / "cells")


@pytest.fixture
def log(tmp_path): return str(tmp_path / "log")


def squares(rows): return [r.get("square") for r in rows]


def right(n): return [i * i for i in range(n)]


def run(cells, fn, store, executor, orders=Orders(), **how):
    how = dict(workers=2, threads=1) | how if executor == "processes" else how
    return run_grid(cells, fn, store, executor, progress=False, orders=orders, **how)


# for processes that import what stands beside the tests
FINDS_TESTS = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
HEAD = """
from toy_cells import odd, square
from rdd_lib.reproduce.grid import product, run_grid
from rdd_lib.reproduce.store import CellStore
"""


def python(code, store, log, **how):
    "Another process that runs `code`, in which `store`, `log` and what the imports of `HEAD` bring are known."
    known = f"{HEAD}store, log = CellStore({str(store.folder)!r}), {log!r}"
    text = 'if __name__ == "__main__":\n' + indent(f"{known}\n{dedent(code)}", "    ")
    return subprocess.Popen([sys.executable, "-c", text], env=os.environ | FINDS_TESTS, text=True, **how)


def driver(store, log, executor="serial", n=12, seconds=.3, **how):
    "Another process that runs squares."
    two = ", workers=2, threads=1" if executor == "processes" else ""
    cells = f"product(i=range({n}), log=log, seconds={seconds})"
    return python(f"run_grid({cells}, square, store, {executor!r}, progress=False{two})", store, log, **how)


def told_by(code, store, log):
    "What it printed, and what it said on stderr."
    return python(code, store, log, stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate(timeout=120)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(.05)


def gone(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError: return True


def pids(log): return {int(line.split()[-1]) for line in Path(log).read_text().splitlines()}


# --- workers ----------------------------------------------------------------------------------------------------------

def test_a_worker_that_dies_once_costs_a_second_try(store, log):
    rows = run(product(i=range(4), log=log, bad=1, how="dies once"), odd, store, "processes")
    assert squares(rows) == right(4) and sorted(begun(log)) == [0, 1, 1, 2, 3]
    assert "1 begun again after a worker was lost" in noted_runs(Work(store.folder))[-1]["ended"]


def test_a_cell_that_kills_each_worker_fails_and_the_others_go_on(store, log):
    cells = product(i=range(4), log=log, bad=1, how="dies")
    rows = run(cells, odd, store, "processes", on_error="record")
    assert squares(rows) == [0, None, 4, 9] and "died" in rows[1]["error"] and begun(log).count(1) == 2
    told, = failures(Work(store.folder)).values()
    assert "i=1" in told["what"] and "memory" in told["error"]
    assert noted_runs(Work(store.folder))[-1]["ended"].startswith("3 computed, 1 failed")


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_a_cell_that_hangs_is_stopped(store, log, executor):
    cells = product(i=range(3), log=log, bad=1, how="hangs")
    rows = run(cells, odd, store, executor, Orders(limit=2.), on_error="record")
    assert squares(rows) == [0, None, 4] and "limit of 2 seconds" in rows[1]["error"]
    assert run(cells[::2], odd, store, executor) and len(store) == 2 and not Work(store.folder).claims()


def test_a_cell_that_asks_for_all_memory(store, log):
    "Where the system has a limit, it is an error like others."
    told, error = told_by("""
        import resource, torch
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**30,) * 2)
        cells = product(i=range(3), log=log, bad=1, how="eats")
        print(run_grid(cells, odd, store, progress=False, on_error="record")[1]["error"])""", store, log)
    assert "MemoryError" in told, error
    assert len(store) == 2


# --- cells ------------------------------------------------------------------------------------------------------------

def test_with_keep_going_the_failure_comes_last_and_names_all(store, log):
    cells = product(i=range(4), log=log, bad=1, how="raises")
    with pytest.raises(CellError, match="i=1.*ValueError: no luck"): run(cells, odd, store, "serial", on_error="later")
    assert len(store) == 3
    with pytest.raises(CellError, match="i=1"): run(cells, odd, store, "serial")
    assert begun(log) == [0, 1, 2, 3, 1]
    told = failures(Work(store.folder))
    assert len(told) == 1 and "ValueError" in "".join(next(iter(told.values()))["traceback"])


def test_what_has_been_computed_after_all_is_no_failure_any_more(store, log):
    cells = product(i=range(2), log=log, bad=1, how="dies once")
    run(cells, odd, store, "processes")
    assert not failures(Work(store.folder))


# --- drivers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("executor", ["serial", "processes"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_or_interrupted_leaves_nobody_behind(store, log, executor, how):
    one = driver(store, log, executor=executor, stderr=subprocess.DEVNULL)
    until(lambda: len(store) >= 3)
    one.send_signal(how)
    one.wait(30)
    until(lambda: all(map(gone, pids(log))), 20)
    before, done = begun(log), len(store)
    assert done < 12
    assert squares(run(product(i=range(12), log=log, seconds=.3), square, store, "serial")) == right(12)
    again = set(before) & set(begun(log)[len(before):])
    assert len(again) <= 2 and len(store) == 12                                # what was in flight


def test_a_run_is_alive_until_it_is_killed(store, log):
    one = driver(store, log)
    until(lambda: len(store) >= 3)
    told, = noted_runs(Work(store.folder))
    assert told["alive"] and told["total"] == 12
    one.kill()
    one.wait()
    assert not noted_runs(Work(store.folder))[0]["alive"]


def test_two_drivers_on_one_store_share_the_work(store, log):
    both = [driver(store, log) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    assert sorted(begun(log)) == list(range(12)) and len(store) == 12
    told = [r["ended"] for r in noted_runs(Work(store.folder))]
    assert sum(int(t.split(" computed")[0]) for t in told) == 12 and any("by another run" in t for t in told)


def test_clocks_that_disagree_change_nothing(store, log, monkeypatch):
    "A claim is as old as the file system says."
    now = time.time
    with Work(store.folder).claimed("square-1", "one"):
        for hours in (-48, 48):
            monkeypatch.setattr(time, "time", lambda hours=hours: now() + 3600 * hours)
            with Work(store.folder).claimed("square-1", "another") as holder: assert holder["run"] == "one"


def test_a_full_disk_ends_the_run_and_loses_what_was_in_flight(store, log):
    _, error = told_by("""
        import resource
        cells = product(i=range(6), log=log, seconds=0.)
        run_grid(cells[:3], square, store, progress=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        run_grid(cells, square, store, progress=False)""", store, log)
    assert "Unwritable" in error and "cannot write" in error, error
    assert len(store) == 3 and begun(log) == [0, 1, 2, 3]
    assert squares(run(product(i=range(6), log=log, seconds=0.), square, store, "serial")) == right(6)


def test_nothing_can_be_written(tmp_path, log):
    (tmp_path / "file").touch()
    with pytest.raises(Unwritable): run(product(i=range(2), log=log), square, CellStore(tmp_path / "file"), "serial")
    assert not begun(log)


# --- progress ---------------------------------------------------------------------------------------------------------

def test_the_driver_of_processes_shows_how_far_it_is(store, log, monkeypatch):
    "In a log file, too; its workers show nothing."
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    code = "run_grid(product(i=range(3), log=log), square, store, 'processes', workers=1, threads=1)"
    told = python(code, store, log, stderr=subprocess.PIPE).communicate(timeout=120)[1]
    assert "square:   0%" in told and "0/3" in told and told.count("cell/s") == 1, told    # a line every ten seconds


# --- parts ------------------------------------------------------------------------------------------------------------

def test_parts_join_in_the_store(store, log):
    cells = product(i=range(20), log=log, seconds=0.)
    for part in ("3/3", "1/3"):
        with pytest.raises(PartMissing, match="lacking: parts .*2/3"):
            run(cells, square, store, "serial", Orders(part=part))
    rows = run(cells, square, store, "serial", Orders(part="2/3"))
    assert squares(rows) == right(20) and sorted(begun(log)) == list(range(20))
    assert ended(log) == set(range(20))
