"""A store of many results: how long it takes to list it, to read what its cells took, and to plan from that; beside
them what reading records as results takes, and cells that do nothing: with `run_grid`, with Dask on two workers here
(the driver's share of the processor), and a worker who claims each, looks for it and writes it, or who only sends it
back.

The records are of the kinds that a table of the first paper has, and of the size of theirs. Fastest of the repeats.

    python benchmarks/store.py [--records 100000] [--cells 1000] [--repeats 3] [--out benchmarks/store.csv]
"""
import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from pathlib import Path
import pandas as pd
from rdd_lib.files import save_table
from rdd_lib.reproduce.cells import score
from rdd_lib.reproduce.executors import cores
from rdd_lib.reproduce.grid import run_grid
from rdd_lib.reproduce.index import finished, Listing
from rdd_lib.reproduce.mcs import mcs_cells
from rdd_lib.reproduce.jobs import Errand, Job, work
from rdd_lib.reproduce.plan import bill
from rdd_lib.reproduce.store import CellKey, CellStore

RESULT = {"std": .5123, "std_hits": 5123, "rob": .3071, "rob_hits": 3071, "rob_clean": .4211, "images": 500,
          "radius": 7.42, "lower_bound": 7.11, "n_test": 10000, "test_images": "0123456789abcdef",
          "forward_samples": 1234567}


def empty(n): return n


def filled(folder, n):
    "A store of `n` results of Table 1, all seeds of a row in turn."
    store, rows = CellStore(folder), [c for _, c in mcs_cells("paper", "mnist", device="cpu")]
    keys, g = {}, random.Random(0)
    for row in rows:
        key = CellKey.of(score, **row)
        keys.setdefault(json.dumps(key.arguments["method"]), key)
    keys = [*keys.values()]
    folder.mkdir(parents=True)
    first = store.path(keys[0])
    store.put(keys[0], RESULT, seconds=1., device="cpu", threads=1)
    record = json.loads(first.read_text())
    first.unlink()
    for i in range(n):
        key = CellKey(score.cell_name, keys[i % len(keys)].arguments | {"seed": i // len(keys)})
        seal = json.dumps([key.function, key.arguments, key.version, RESULT], sort_keys=True)      # as `put` seals it
        told = record | {"arguments": key.arguments, "sha256": hashlib.sha256(seal.encode()).hexdigest(),
                         "seconds": round(g.uniform(1, 100), 3)}
        (folder / key.file).write_text(json.dumps(told, indent=1) + "\n")
    return len(keys), sum(p.stat().st_size for p in folder.iterdir()) // n


def at_work(cells, store, run=""):
    "What a worker does with each cell; with the name of a run he is at the store, and writes."
    errand = Errand.of(store, run)
    if run: errand.open()
    for cell in cells: work(Job.of(empty, cell), errand)


def fastest(do, repeats):
    "Seconds, and seconds of the processor: what a machine that is busy with other work does not add to."
    found = []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        do()
        found.append((time.perf_counter() - start, time.process_time() - used))
    return map(min, zip(*found, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write the table here, .csv or .parquet")
    asked = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    rows = []

    def measure(what, n, do, repeats=asked.repeats):
        seconds, used = fastest(do, repeats)
        rows.append((what, n, round(seconds, 3), round(used, 3), cores()))
        print(f"{what:40} {n:8,} {seconds:8.3f} s, {used:8.3f} s of the processor", flush=True)

    with tempfile.TemporaryDirectory() as place:
        os.environ["RDD_STORE"] = str(Path(place) / "cells")
        folder = Path(os.environ["RDD_STORE"])
        kinds, size = filled(folder, asked.records)
        print(f"{asked.records:,} records of {kinds} kinds, {size:,} bytes each")
        bill("mcs/table1", "smoke")                                     # what is imported once
        measure("list: names and counts", asked.records, lambda: Listing.of().counts)
        measure("what every cell took", asked.records, lambda: finished(Listing.of()))
        measure("plan of mcs/table1", asked.records, lambda: bill("mcs/table1", "paper"))
        measure("plan of everything, profile paper", asked.records, lambda: bill("all", "paper"), 1)
        few = [*Listing.of()][:1000]
        measure("read as results", len(few), lambda: [CellStore().record(folder / name) for name in few])
        cells = [dict(n=n) for n in range(asked.cells)]
        empties = iter(range(100))
        def fresh(): return CellStore(Path(place) / f"empty{next(empties)}")
        for executor in ("serial", "dask"):
            measure(f"run_grid, {executor}, empty cells", asked.cells,
                    lambda how=executor: run_grid(cells, empty, fresh(), how))
        measure("worker, sends results back", asked.cells, lambda: at_work(cells, fresh()))
        measure("worker, writes results", asked.cells, lambda: at_work(cells, fresh(), "run"))
        done = CellStore(Path(place) / "empty0")
        measure("run_grid, serial, finished ones", asked.cells, lambda: run_grid(cells, empty, done, executor="serial"))
    table = pd.DataFrame(rows, columns=["what", "records", "seconds", "processor_seconds", "cores"])
    if asked.out: save_table(table, asked.out)


if __name__ == "__main__":
    import store                     # whose `empty` other processes can import, which they cannot of a script
    store.main()
