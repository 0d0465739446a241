"""Cells on Dask: a scheduler and two nodes as separate processes. Workers, nodes, scheduler and driver are lost, and no
result is; at most the cells in flight are done twice. `make test-all` does the long one twenty times, and longer."""
import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
import pytest
from conftest import FULL
from rdd_lib.reproduce.executors import TookTooLong
from rdd_lib.reproduce.grid import product, run_grid
from rdd_lib.reproduce.orders import Orders
from rdd_lib.reproduce.store import CellStore
from rdd_lib.reproduce.work import Work, noted_runs
from test_failures import FINDS_TESTS, begun, gone, pids, python, right, squares, until
from toy_cells import odd, square, student

pytest.importorskip("distributed")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")
DASK = [sys.executable, "-m", "distributed.cli.dask_scheduler"], [sys.executable, "-m", "distributed.cli.dask_worker"]


class Machines:
    "A scheduler and nodes, each a process of its own."
    def __init__(self, folder, preload=None, **env):
        settings = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "3"} | FINDS_TESTS
        self.folder, self.preload, self.env, self.nodes = folder, preload, os.environ | settings | env, []
        self.port = random.Random(os.getpid() + time.time_ns()).randrange(20_000, 60_000)
        self.start()

    @property
    def address(self): return f"tcp://127.0.0.1:{self.port}"

    def _run(self, words):
        return subprocess.Popen(words, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start(self):
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"]
        self.scheduler = self._run([*DASK[0], *where])

    def node(self):
        n = len(self.nodes)
        words = [*DASK[1], self.address, "--nthreads", "1", "--name", str(n), "--no-dashboard", "--nanny",
                 "--local-directory", str(self.folder / f"node{n}"), "--death-timeout", "120"]
        self.nodes.append(self._run(words + (["--preload", str(self.preload)] if self.preload else [])))
        return self.nodes[-1]

    def stop(self):
        for p in (*self.nodes, self.scheduler):
            if p.poll() is None: p.terminate()
        for p in (*self.nodes, self.scheduler):
            try: p.wait(10)
            except subprocess.TimeoutExpired: p.kill()


@contextmanager
def machines(folder, nodes=2, **how):
    made = Machines(folder, **how)
    try:
        for _ in range(nodes): made.node()
        yield made
    finally: made.stop()


def dask_driver(store, log, address, n, seconds=.3):
    return python(f"""
        from rdd_lib.reproduce.orders import Orders
        cells = product(i=range({n}), log=log, seconds={seconds})
        run_grid(cells, square, store, "dask", progress=False, orders=Orders(cluster={address!r}))""", store, log)


@pytest.mark.parametrize("seed", range(20 if FULL else 1))
def test_a_worker_a_node_and_the_driver_are_killed(tmp_path, seed):
    n, chance = 30 if FULL else 12, random.Random(seed)
    moments = sorted(chance.sample(range(2, n - 3), 3))
    store, log = CellStore(tmp_path / "cells"), str(tmp_path / "log")
    with machines(tmp_path) as there:
        first = dask_driver(store, log, there.address, n)
        until(lambda: len(store) >= moments[0], 120)
        os.kill(chance.choice(sorted(pids(log))), signal.SIGKILL)             # a worker: its nanny starts another
        until(lambda: len(store) >= moments[1], 120)
        there.nodes[0].kill()                                                        # a node goes, worker and all
        until(lambda: len(store) >= moments[2], 120)
        first.kill()
        first.wait()
        there.node()
        rows = run_grid(product(i=range(n), log=log, seconds=.3), square, store, "dask", progress=False,
                        orders=Orders(cluster=there.address))
    print(f"seed {seed}: killed after {moments} of {n}; begun {len(begun(log))}")
    assert squares(rows) == right(n) and len(store) == n
    assert len(begun(log)) <= n + 2 + 2            # a worker's cell, a node's, and what the driver's end had in flight


def test_the_scheduler_goes_and_comes_back(tmp_path):
    store, log = CellStore(tmp_path / "cells"), str(tmp_path / "log")
    with machines(tmp_path, nodes=1) as there:
        run = dask_driver(store, log, there.address, 8)
        until(lambda: len(store) >= 3, 120)
        there.scheduler.kill()
        there.scheduler.wait()
        there.nodes[0].kill()
        there.start()
        there.node()
        assert run.wait(180) == 0
    assert len(store) == 8 and len(begun(log)) <= 8 + 1


def test_a_cell_that_hangs_or_kills_and_the_others_go_on(tmp_path):
    "And no worker is left behind by a cluster that was started for the run."
    store, log = CellStore(tmp_path / "cells"), str(tmp_path / "log")
    rows = run_grid(product(i=range(4), log=log, bad=1, how="hangs"), odd, store, "dask", progress=False, workers=2,
                    threads=1, on_error="record", orders=Orders(limit=3.))
    assert squares(rows) == [0, None, 4, 9] and str(TookTooLong("limit of 3")) in rows[1]["error"]
    rows = run_grid(product(i=range(4), log=log, bad=1, how="dies"), odd, store, "dask", progress=False, workers=2,
                    threads=1, on_error="record")
    assert squares(rows) == [0, None, 4, 9] and "died" in rows[1]["error"] and begun(log).count(1) <= 1 + 4
    assert "begun again after a worker was lost" in noted_runs(Work(store.folder))[-1]["ended"]
    until(lambda: all(map(gone, pids(log) - {os.getpid()})), 30)


def test_without_a_common_folder_results_and_files_travel(tmp_path):
    "Both nodes have folders of their own, and do not see the driver's."
    preload = tmp_path / "preload.py"
    preload.write_text("import os, tempfile; from pathlib import Path; from rdd_lib.reproduce.jobs import Errand\n"
                       "Errand.token = property(lambda errand: Path('/nowhere'))\n"
                       "os.environ['RDD_STORE'] = tempfile.mkdtemp() + '/cells'\n")
    store, log = CellStore(tmp_path / "cells"), str(tmp_path / "log")
    with machines(tmp_path, preload=preload) as there:
        cells, orders = product(n=7, seed=range(6), log=log), Orders(cluster=there.address)
        rows = run_grid(cells, student, store, "dask", progress=False, orders=orders)
    assert [r["result"] for r in rows] == [f"set 7, student {s}" for s in range(6)]
    assert begun(log).count(7) == 1 and len(store) == 7                     # the set was made once, by one of the nodes
    assert noted_runs(Work(store.folder))[-1]["ended"].startswith("7 computed")


@pytest.mark.skipif(not FULL, reason="half a minute; make test-all")
def test_ctrl_c_leaves_no_worker_behind(tmp_path):
    store, log = CellStore(tmp_path / "cells"), str(tmp_path / "log")
    run = python("""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cells = product(i=range(40), log=log, seconds=.5)
        run_grid(cells, square, store, "dask", progress=False, workers=2, threads=1)""", store, log)
    until(lambda: len(store) >= 3, 120)
    run.send_signal(signal.SIGINT)
    run.wait(60)
    until(lambda: all(map(gone, pids(log))), 30)
    assert len(store) < 40 and "interrupted" in noted_runs(Work(store.folder))[-1]["ended"]


REFUSED = "#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n"
QUEUED = "#!/bin/sh\necho Submitted batch job 7\n"


def batch_system(folder, **programs):
    "Programs of a batch system, found first."
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


def on_slurm(store, log, path, folder, n=3, seconds=0., hours=24., before=""):
    "A driver that submits two jobs."
    (folder / "cluster.toml").write_text(f"[slurm]\njobs = 2\nhours = {hours}\n")
    where = f"settings={str(folder / 'cluster.toml')!r}"
    return python(f"""
        import os
        from rdd_lib.reproduce import cluster
        from rdd_lib.reproduce.orders import Orders
        os.environ["PATH"] = {path!r}
        {before}
        cells = product(i=range({n}), log=log, seconds={seconds})
        run_grid(cells, square, store, "dask", progress=False, orders=Orders(cluster="slurm", {where}))
        """, store, log, stderr=subprocess.PIPE)


@pytest.mark.parametrize("programs, told", [(dict(sbatch=REFUSED), "invalid partition specified: gpu"),
                                            ({}, "there is no 'sbatch' on this machine")])
def test_a_batch_system_that_takes_no_job_is_an_error(tmp_path, programs, told):
    "Dask logs it and waits for ever."
    pytest.importorskip("dask_jobqueue")
    if not programs and shutil.which("sbatch"): pytest.skip("there is a SLURM here")
    path = batch_system(tmp_path, **programs)
    one = on_slurm(CellStore(tmp_path / "cells"), str(tmp_path / "log"), path, tmp_path)
    error = one.communicate(timeout=120)[1]
    assert one.returncode == 1 and "NotSubmitted: slurm does not take the job" in error and told in error, error


SHORT_JOBS = """#!/bin/sh
cp $1 $1.{name}.copy
(timeout -s KILL 30 sh $1.{name}.copy; rm $1.{name}.copy) >/dev/null 2>&1 &
echo submitted >> {folder}/submitted
echo Submitted batch job 7
"""


@pytest.mark.skipif(not FULL, reason="a minute; make test-all")
def test_a_job_whose_hours_are_over_is_submitted_again(tmp_path):
    "The batch system gives each job eighteen seconds; its workers leave before."
    pytest.importorskip("dask_jobqueue")
    store, log = CellStore(tmp_path / "cells"), str(tmp_path / "log")
    text = SHORT_JOBS.format(folder=tmp_path, name=os.getpid())
    path = batch_system(tmp_path, sbatch=text, scancel="#!/bin/sh\n")
    one = on_slurm(store, log, path, tmp_path, n=30, seconds=1., hours=.005, before="cluster.AWAY = cluster.SHORT = 2.")
    error = one.communicate(timeout=300)[1]
    assert one.returncode == 0 and "is over after 0.0 hours: it is submitted again" in error, error
    jobs = (tmp_path / "submitted").read_text().count("submitted")
    assert jobs > 2 and len(store) == 30 and len(begun(log)) <= 30 + jobs


def test_jobs_that_lived_are_renewed_and_broken_ones_are_not(monkeypatch, caplog):
    """Of the first one of two workers goes, of the second both; the third ends at once, the fourth loses its worker
    and gets another (Dask's nanny)."""
    from rdd_lib.reproduce import cluster
    monkeypatch.setattr(cluster, "AWAY", .1)
    monkeypatch.setattr(cluster, "SHORT", .2)

    async def nothing(): pass
    async def scale_down(jobs): gone.extend(jobs)
    gone, asked = [], []
    spec = dict.fromkeys(["job-1", "job-2", "job-3", "job-4"])
    made = SimpleNamespace(worker_spec=spec, workers={}, status=SimpleNamespace(name="running"), scale_down=scale_down,
                           scale=lambda jobs: asked.append(jobs), _correct_state=nothing)
    names = {"a": "job-1-0", "b": "job-1-1", "c": "job-2-0", "d": "job-2-1", "e": "job-4", "f": "job-3", "g": "job-4"}
    there = SimpleNamespace(workers={w: SimpleNamespace(name=name) for w, name in names.items()})

    async def happens():
        plugin = cluster.renewing(made, cluster.Cluster("slurm", jobs=4))
        for w in "abcde": plugin.add_worker(there, w)
        await asyncio.sleep(.3)
        plugin.add_worker(there, "f")
        for w in "acdef": plugin.remove_worker(there, w, stimulus_id="")
        plugin.add_worker(there, "g")
        await asyncio.sleep(.3)
    asyncio.run(happens())
    assert gone == ["job-2"] and asked == [4]
    assert "job-3 ended after 0 seconds: it is not submitted again" in caplog.text


def test_ctrl_c_while_jobs_wait_in_the_queue(tmp_path):
    pytest.importorskip("dask_jobqueue")
    store = CellStore(tmp_path / "cells")
    path = batch_system(tmp_path, sbatch=QUEUED, scancel=f"#!/bin/sh\necho $@ >> {tmp_path / 'cancelled'}\n")
    one = on_slurm(store, str(tmp_path / "log"), path, tmp_path)
    until(lambda: noted_runs(Work(store.folder)), 120)
    one.send_signal(signal.SIGINT)
    error = one.communicate(timeout=60)[1]
    assert one.returncode not in (0, None) and "KeyboardInterrupt" in error, error
    assert (tmp_path / "cancelled").read_text() == "7\n7\n"
