"""What the page about clusters shows: its commands exist, its job is the one that would be submitted, its cells run."""
import importlib
import os
import re
import sys
from pathlib import Path
import pytest
import typer
from rdd_lib import cli
from rdd_lib.reproduce.cluster import job_script, read_clusters
from rdd_lib.reproduce.grid import product, run_grid
from rdd_lib.reproduce.orders import Orders
from rdd_lib.reproduce.runner import items, parameters_of, typed_settings
from rdd_lib.reproduce.store import CellStore

PAGE = (Path(__file__).parents[1] / "docs/clusters.md").read_text(encoding="utf-8")


def blocks(language): return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


def typed(program):
    "The lines of the page that begin with `program`, those within a script and a `--wrap` as well."
    text = "\n".join(blocks("bash")).replace("$SLURM_ARRAY_TASK_ID", "3")
    found = re.findall(rf"^{program} .*|(?<=; ){program} [^\"]*", text, re.M)
    return [line.partition("  #")[0].strip() for line in found]


@pytest.mark.parametrize("line", typed("rdd"))
def test_the_commands_of_the_page_exist(line):
    "Their names, arguments, options, and the settings of the page that they name; none is run."
    _, name, *words = line.split()
    asked = typer.main.get_command(cli.app).commands[name].make_context(name, words).params
    if name != "reproduce": return
    path = next(i.path for i in items() if i.name == asked["item"])
    typed_settings(asked["item"], parameters_of(path), dict(s.split("=") for s in asked["set_"] or ()))
    Orders(asked["executor"], asked["cluster"], workers=asked["workers"], share=asked["share"], part=asked["part"])


def test_there_are_commands():
    assert len(typed("rdd")) > 12 and len(typed("dask")) == 2 and any("--part 3/10" in line for line in typed("rdd"))


def test_dasks_own_commands_exist():
    pytest.importorskip("distributed")
    from distributed.cli import dask_scheduler, dask_worker
    for line in typed("dask"):
        _, name, *words = line.split()
        {"scheduler": dask_scheduler, "worker": dask_worker}[name].main.make_context(name, words)


def test_the_job_that_is_shown_is_the_one_that_would_be_submitted(tmp_path):
    pytest.importorskip("dask_jobqueue")
    (tmp_path / "cluster.toml").write_text(*blocks("toml"))
    slurm = read_clusters(str(tmp_path / "cluster.toml"))["slurm"]
    assert f"slurm: {slurm.jobs} jobs of {slurm.workers()} workers each" in PAGE
    shown = next(b for b in blocks("text") if "#SBATCH" in b)
    def impersonal(text): return re.sub(r"tcp://\S+", "tcp://", text).split()
    assert impersonal(job_script(slurm).replace(sys.executable, "python")) == impersonal(shown)


def test_the_cells_of_the_page_run(tmp_path, monkeypatch):
    mine, run = blocks("python")
    assert "product(data=\"mnist5k\", ipc=[1, 5], seed=range(2))" in run
    (tmp_path / "mine.py").write_text(mine)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "cells"))
    accuracy = importlib.import_module("mine").accuracy
    rows = run_grid(product(data="mnist5k", ipc=[1, 5], seed=range(2)), accuracy, progress=False)
    assert len(rows) == 4 and all(r["std"] > .2 for r in rows) and rows[0]["std"] < rows[2]["std"]
    assert len(CellStore(os.environ["RDD_STORE"])) == 6                              # two sets, each made once
