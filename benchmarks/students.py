"""Students side by side (`Trainer.many`, `evaluate_many`) beside the loop that trains and judges one after another.

1, 5, 20 and 50 students of 10 digits (batches of 10) and of 100 (batches of 50), plain and against PGD-3; and judged
on 200 test digits by PGD-10. The two ways take turns, who begins alternates, the first pair warms up (where a case
takes longer than 40 seconds it is the only one); `ratio` is the fewest seconds with all of them side by side over the
fewest of the loop (below 1: side by side is quicker), `lowest` and `highest` are of the pairs; on a CPU, processor
time on one thread. So many steps that a loop takes about --seconds, at least two. `chosen` is how many share their
operations where nobody says (1: the loop itself), `chosen ratio` what that takes. `MB` is what a way holds at its
peak beyond imports, images and one small training, each in a process of its own, for two steps; on a GPU, what torch
has allocated there.

    python benchmarks/students.py [--quick] [--device cuda] [--only "width 16"] [--students 5 20]
                                   [--repeats 3] [--out FILE]
"""
import argparse
import multiprocessing
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
import pandas as pd
import torch
from coresets import forget, peak
from covering import machine
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.threats import Linf
from rdd_lib.core import device_of
from rdd_lib.data import load, sample
from rdd_lib.evaluation.many import evaluate_many
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.files import save_table
from rdd_lib.models import Net
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.training.students import how_many
from rdd_lib.training.trainer import Trainer

NETS = {"mlp": Net("mlp"), "convnet, width 16": Net("convnet", dict(width=16)),
        "convnet, width 128": Net("convnet", dict(width=128))}
WORK = {"standard": Standard(), "PGD-3": Adversarial(PGD(Linf(.1), 3)), "judged by PGD-10": None}
JUDGE = PGD(Linf(.1), 10)
# (network, batch): fifty students take many minutes, and are left out
LONG = (("convnet, width 128", 50), ("convnet, width 16", 250))
PATIENCE = 40       # seconds, after which a case begins no further pair


@dataclass(frozen=True)
class Case:
    net: str
    work: str       # of `WORK`
    batch: int      # images in it; the set holds 10 where it is 10, else 100
    students: int
    device: str
    steps: int = 2

    @property
    def data(self): return digits("train", 10 if self.batch == 10 else 100)

    @property
    def trainer(self): return Trainer(WORK[self.work] or Standard(), steps=self.steps, batch=self.batch)

    def chosen(self):
        if not WORK[self.work]: return 1 if self.device == "cpu" else self.students
        return min(self.students, how_many(self.trainer, NETS[self.net], self.data, self.students,
                                           device_of(self.device)))

    def run(self, together):
        "All students; together=0 is the loop."
        net, seeds = NETS[self.net], [*range(self.students)]
        if WORK[self.work] and together: self.trainer.many(net, self.data, seeds, self.device, together)
        elif WORK[self.work]: [self.trainer(net, self.data, s, self.device) for s in seeds]
        elif together: evaluate_many(self.models, digits("test", 200), JUDGE, seeds, self.device, together=together)
        else: [evaluate(m, digits("test", 200), JUDGE, s, self.device) for m, s in zip(self.models, seeds)]
        if self.device == "cuda": torch.cuda.synchronize()

    @property
    def models(self): return trained(self.net, self.students)


@cache
def digits(split, n): return sample(load("mnist5k", split), n)

@cache
def trained(net, students):
    return [Trainer(steps=30, lr=.02)(NETS[net], digits("train", 100), s, "cpu") for s in range(students)]


def seconds(case, together):
    clock = time.process_time if case.device == "cpu" else time.perf_counter
    start = clock()
    case.run(together)
    return clock() - start

def timed(case, repeats):
    "Of each way the fewest seconds; and those of all pairs."
    ways, rounds = [*dict.fromkeys((0, case.students, case.chosen()))], []
    if case.chosen() == 1: ways = [0, case.students]
    begin = time.perf_counter()
    for k in range(repeats + 1):
        if k and time.perf_counter() - begin > PATIENCE: break
        took = {together: seconds(case, together) for together in (ways if k % 2 else ways[::-1])}
        rounds.append(took | {1: took[0]} if case.students > 1 else took)
    rounds = rounds[1:] or rounds
    least = {way: min(took[way] for took in rounds) for way in rounds[0]}
    ratios = [took[case.students] / took[0] for took in rounds]
    return {"pairs": len(rounds), "loop s": least[0], "side by side s": least[case.students],
            "ratio": least[case.students] / least[0], "lowest": min(ratios), "highest": max(ratios),
            "chosen ratio": least[case.chosen()] / least[0]}


def held(case, together):
    "Megabytes at the peak, beyond what was there before; for a process of its own."
    torch.set_num_threads(1)
    Case("mlp", "standard", 10, 1, case.device).run(0)                  # what is loaded once has been loaded
    case.data, case.models if not WORK[case.work] else None
    if case.device == "cuda": torch.cuda.reset_peak_memory_stats()
    forget()
    before = peak()
    case.run(together)
    return torch.cuda.max_memory_allocated() / 2**20 if case.device == "cuda" else peak() - before

def tell(pipe, *asked): pipe.send(held(*asked))

def apart(context, case, together):
    here, there = context.Pipe()
    child = context.Process(target=tell, args=(there, case, together))
    child.start()
    there.close()
    try: return here.recv()
    finally: child.join()


def cases(device, only, numbers):
    for net in (n for n in NETS if only in n):
        for work, batch in (("standard", 10), ("standard", 50), ("PGD-3", 10), ("judged by PGD-10", 250)):
            if "128" in net and work != "standard": continue
            for students in numbers:
                if students <= 20 or (net, batch) not in LONG: yield Case(net, work, batch, students, device)

def measured(context, case, budget, repeats):
    memory = {"side by side MB": apart(context, case, case.students), "loop MB": apart(context, case, 0)}
    if WORK[case.work]:
        for _ in range(2): step = seconds(Case(case.net, case.work, case.batch, 1, case.device), 0) / 2
        case = Case(**asdict(case) | {"steps": max(2, min(50, int(budget / step / case.students)))})
    return asdict(case) | {"chosen": case.chosen()} | timed(case, repeats) | memory

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, one pair: whether it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="networks whose name holds this")
    parser.add_argument("--students", nargs="+", type=int, help="how many; 1 5 20 50, with --quick 1 2")
    parser.add_argument("--seconds", type=float, default=3., help="about as long as a loop shall take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="write the table here; benchmarks/students.csv, with --quick nowhere")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    out = asked.out or (None if asked.quick else Path(__file__).with_suffix(".csv"))
    context, rows = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["rdd_lib.evaluation.many", "coresets"])
    numbers = asked.students or ((1, 2) if asked.quick else (1, 5, 20, 50))
    for case in cases(asked.device, asked.only, numbers):
        rows.append(measured(context, case, .1 if asked.quick else asked.seconds, 0 if asked.quick else asked.repeats))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        if out: save_table(pd.DataFrame(rows).assign(repeats=asked.repeats, threads=1, **machine()).round(4), out)


if __name__ == "__main__": main()
