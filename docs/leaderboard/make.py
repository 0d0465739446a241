"""The rows of the reference leaderboard: `python docs/leaderboard/make.py [METHOD ...]` writes them into rows/.

Each row is what `rdd score` says of a set that `rdd compress` made, with the table of images that paired tests read.
Half an hour on one core: the proxy network of herding, DM, and adversarial training take most of it. DM runs for 200
iterations on a network of width 16; its paper has 20,000 and width 128. Its settings stand in its rows."""
import os
import sys
import tempfile
from pathlib import Path
import pandas as pd
from rdd_lib import find_method, load, load_compressed, save
from rdd_lib.cli_score import Asked, scored
from rdd_lib.addresses import sha256_of
from rdd_lib.sharing.rows import write_row

ROWS = Path(__file__).parent / "rows"
DATA, BUDGETS, ALL = "mnist5k", (1, 10), 400                       # ALL: images a class that there are
METHODS = {"random": {}, "k_center_greedy": {}, "minimal_coreset": {}, "herding": {},
           "dm": {"iterations": "200", "net.settings.width": "16"}}
COLUMNS = ["image", "label", "predicted", "correct", "survived", "student"]
MADE_BY, STEPS = "rdd_lib", 1000                                   # of every student, however many images it has


def score(S, path, name, train):
    "One row and its table."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "images.csv"
        how = dict(train=train, net="mlp", seeds=2, n_test=300, diagnose=True, settings={"steps": str(STEPS)})
        asked = Asked("paper", **how, out=out, device="cpu")
        row = scored(S, asked, print, (path.name, sha256_of(path)))
        table = pd.read_csv(out)[COLUMNS]
    images = ROWS / f"{name}.csv"
    table.astype(int).to_csv(images, index=False, lineterminator="\n")
    row |= {"per_image": {"file": images.name, "sha256": sha256_of(images)}, "by": MADE_BY}
    write_row(row, ROWS / f"{name}.json")


def make(method, ipc, settings, home):
    "Compress, unless that is done, and score twice."
    path = home / f"{method}-{ipc}.safetensors"
    if not path.exists():
        save(find_method(method).build(DATA, ipc, **settings).compress(load(DATA), ipc=ipc, device="cpu"), path)
    for train in ("standard", "adversarial"): score(load_compressed(path), path, f"{method}-{ipc}-{train}", train)


if __name__ == "__main__":
    ROWS.mkdir(exist_ok=True)
    home = Path(os.environ.get("SETS") or tempfile.mkdtemp())      # where the sets stay: too large for the repository
    for method in sys.argv[1:] or METHODS:
        for ipc in (*BUDGETS, ALL) if method == "random" else BUDGETS: make(method, ipc, METHODS[method], home)
