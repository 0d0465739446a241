"""Every page of every paper in its own profile, from end to end, with each count cut to the least: on a GPU, or one that
is pretended. Two in `make test`, all in `make test-all`."""
import pandas as pd
import pytest
from conftest import FULL
from rdd_lib.reproduce.runner import items, parameters_of

PATHS = {i.name: i.path for i in items()}
QUICK = ("mcs/example1", "guard_early/clean")       # a cheap one, and one that distils


@pytest.mark.parametrize("name", PATHS if FULL else QUICK)
def test_the_paper_profile_runs_to_its_end(gpu, page, name):
    known = parameters_of(PATHS[name])
    asked = {"device": gpu, "workers": 1}                                       # another process would see no GPU
    folder = page(name, *(f"{k}={v}" for k, v in asked.items() if k in known), profile="paper", rehearse=True)
    tables = [*folder.glob("*.csv")]
    assert tables and all(set(pd.read_csv(path).rehearsal) == {"REHEARSAL"} for path in tables)
