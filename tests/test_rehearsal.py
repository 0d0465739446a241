"""Every page of every paper in its own profile, from end to end, with each count cut to the least.

On a GPU, or one that is pretended. Two pages in `make test`, all in `make test-all`. A rehearsal keeps a page's
networks and pixels; without a real GPU networks are narrow here, and photographs have 64 pixels instead of 224, for all
pages together have to fit in twenty minutes of two cores."""
import json
import os
import pandas as pd
import pretend_gpu
import pytest
import torch
from conftest import FULL
from rdd_lib.core import BadArgument
from rdd_lib.reproduce.final_tables import final_plan, final_rows, FOLDERS, matched_rows
from rdd_lib.reproduce.grid import CellError
from rdd_lib.reproduce.guard import CONDENSED_PLANS, CONDENSERS, condenser, more_attacks
from rdd_lib.reproduce.mcs import CURVE_PLANS, curve_rows, mcs_cells
from rdd_lib.reproduce.rehearsal import cut, LEAST, undeclared
from rdd_lib.reproduce.runner import items, parameters_of, PROFILES

PATHS = {i.name: i.path for i in items()}
QUICK = ("mcs/example1", "mat/main")       # a cheap one, and one that distils


@pytest.fixture
def narrow(monkeypatch):
    if torch.cuda.is_available() and not pretend_gpu.pretended(): return
    for name, value in (("width", 16), ("size", 64)): monkeypatch.setitem(LEAST, name, value)


@pytest.mark.parametrize("name", PATHS if FULL else QUICK)
def test_the_paper_profile_runs_to_its_end(gpu, narrow, page, name):
    known = parameters_of(PATHS[name])
    asked = {"device": gpu, "workers": 1}                                       # another process would see no GPU
    folder = page(name, *(f"{k}={v}" for k, v in asked.items() if k in known), profile="paper", rehearse=True)
    tables = [*folder.glob("*.csv")]
    assert tables and all(set(pd.read_csv(path).rehearsal) == {"REHEARSAL"} for path in tables)


# --- no setting is forgotten ------------------------------------------------------------------------------------------

def plans(profile):
    "All that the pages of a profile run: rows, methods, protocols, attacks."
    for data in ("mnist", "cifar10"):
        yield [c for _, c in mcs_cells(profile, data)]
        for label in CONDENSERS:
            for ipc in (1, 10, 50):
                try: yield condenser(label, data, ipc, profile)
                except BadArgument: pass                                        # not every method has every budget
        yield more_attacks(data, profile), CONDENSED_PLANS[profile].protocol
    for plan in CURVE_PLANS[profile].values(): yield plan.protocol, [row.method for row in curve_rows(plan)]
    for data in ("cifar10", *FOLDERS):
        plan = final_plan(data, profile)
        yield plan.cells([*final_rows(data), *matched_rows(data, profile)]), plan.teacher_cells()


@pytest.mark.parametrize("profile", PROFILES)
def test_every_whole_number_of_a_plan_is_cut_or_known_to_be_no_count(profile):
    "A new setting fails here: it belongs into `LEAST`, or into `AS_IT_IS`."
    assert not set().union(*(undeclared(plan) for plan in plans(profile)))


def test_what_is_cut_stays_so(): assert all(cut(cut(plan)) == cut(plan) for plan in plans("paper"))


# --- nothing else is touched ------------------------------------------------------------------------------------------

SMALL = ("methods=Rand,k-center", "datasets=mnist", "readings=pixel", "workers=1", "device=cpu")


def files(folder): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_results_and_figures_stay_as_they_are(page, tmp_path, narrow):
    page("mcs/table1", "n_test=20", "seeds=1", "steps=3", *SMALL)
    before = files(tmp_path)
    assert before
    folder = page("mcs/table1", *SMALL, profile="cpu", rehearse=True)           # another profile than the paper's
    after = files(tmp_path)
    assert before.items() <= after.items() and {p.parent for p in {*after} - {*before}} == {folder}


def test_a_broken_cell_is_found(page, monkeypatch, narrow):
    def broken(*args): raise RuntimeError("the last hour of a week")
    monkeypatch.setattr("rdd_lib.reproduce.cells.judged", broken)
    with pytest.raises(CellError, match="the last hour of a week"):
        page("mcs/table1", *SMALL, profile="paper", rehearse=True)


def test_without_data_there_are_stand_ins(page, tmp_path, monkeypatch, narrow):
    monkeypatch.setenv("RDD_DATA", str(tmp_path / "nothing"))
    asked = ("methods=Rand", "datasets=svhn,cifar100", "readings=pixel", "workers=1", "device=cpu")
    folder = page("mcs/table1", *asked, profile="paper", rehearse=True)
    table = pd.read_csv(folder / "table1.csv")
    assert {"svhn", "cifar100"} == set(table[table.ours.notna()].dataset)


def test_from_the_shell_with_worker_processes(tmp_path, rdd):
    "Through a kernel; the notebook, the tables and the shell say what it was."
    usual = {**os.environ}
    told = rdd("reproduce", "mcs/budget", "--rehearse", "--set", "methods=Rand", "--set", "workers=2")
    assert told.returncode == 0, told.stderr
    assert "REHEARSAL of mcs/budget, profile smoke" in told.stdout and "4 cells ran in the place of 10" in told.stdout
    folder = tmp_path / "figures" / "rehearsal" / "mcs"
    first = json.loads((folder / "budget.ipynb").read_text())["cells"][0]
    assert first["cell_type"] == "markdown" and "REHEARSAL" in "".join(first["source"])
    assert not files(tmp_path / "store") and {**os.environ} == usual
