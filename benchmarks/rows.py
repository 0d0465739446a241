"""The cells of some rows of a paper's page, without the page: no papermill, no kernel. What was computed stays in the
store ($RDD_STORE); stopped and started again, it goes on from there.

    python benchmarks/rows.py mcs/table1 --profile paper --data cifar10 mnist5k --set methods=Rand --set seeds=1
                              [--device cuda] [--out rows.csv]

--data names what may be computed on, of which the first that is at hand is taken. The table holds all records of the
store, whether or not the run came to its end.
"""
import argparse
import logging
import pandas as pd
from rdd_lib.core import MissingData
from rdd_lib.files import kept, save_table
from rdd_lib.reproduce.ahead import compute
from rdd_lib.reproduce.orders import Orders
from rdd_lib.reproduce.store import CellStore


def at_hand(names):
    "Without a download."
    for name in names:
        if (kept("data") / name / "test.npz").exists() or name == "mnist5k": return name
    raise MissingData(f"none of {', '.join(names)} is in {str(kept('data'))!r}; set RDD_DATA to a folder with one")


def numbers(record):
    "A row of the table."
    result = record["result"] if isinstance(record["result"], dict) else {}
    told = {name: value for name, value in result.items() if isinstance(value, (int, float))}
    about = {name: record[name] for name in ("function", "seconds", "device")}
    return about | {"data": record["arguments"].get("data")} | told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", help="of `rdd list reproduce`")
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--data", nargs="+", default=())
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as of `rdd reproduce`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="write the table here, .csv or .parquet")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = dict(word.split("=", 1) for word in asked.set) | {"device": asked.device}
    if asked.data: settings["datasets"] = at_hand(asked.data)
    print(asked.item, asked.profile, settings, flush=True)
    try: compute(asked.item, Orders(), asked.profile, settings)
    finally:
        table = pd.DataFrame(map(numbers, CellStore()))
        print(table.to_string(index=False) if len(table) else "no cell was finished")
        if asked.out and len(table): save_table(table, asked.out)


if __name__ == "__main__": main()
