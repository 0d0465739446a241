"""What is kept of the leaderboard: sets that a clone can load, each with its line in the ledger of cells."""
import json
from pathlib import Path

import pytest

from rdd_lib.published import load_compressed
from rdd_lib.reproduce.ledger import Ledger

FOLDER = Path(__file__).parents[1] / "figures/cpu/leaderboard"
SETS = sorted((FOLDER / "sets").glob("*.safetensors"))

@pytest.fixture(scope="module")
def fingerprints():
    results = (json.loads(line)["result"] for _, line in Ledger(FOLDER / "cells.jsonl").cells.values())
    return {result["set"] for result in results if "set" in result}

def test_budgets_of_digits_have_sets():
    for ipc in (1, 10, 50): assert any(path.name.startswith(f"mnist_6000_{ipc}_") for path in SETS)

@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_a_set_loads_and_is_in_the_ledger(path, fingerprints):
    assert load_compressed(path).fingerprint in fingerprints

def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in SETS) < 5e6
    assert (FOLDER / "cells.jsonl").stat().st_size < 1e6
