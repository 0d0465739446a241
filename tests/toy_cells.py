"""Cells that tests hand to workers in other processes: they say when they begin and end, wait, fail, die, hang."""
import os
import signal
import time
from pathlib import Path
from rdd_lib.files import atomic, kept
from rdd_lib.reproduce.store import cell


def _say(log, *words):
    with open(log, "a") as f: f.write(" ".join(map(str, (*words, os.getpid()))) + "\n")


def square(i, log, seconds=.1):
    _say(log, "begin", i)
    time.sleep(seconds)
    _say(log, "end", i)
    return {"square": i * i}


def odd(i, log, bad, how):
    "The cell `bad` goes wrong: it raises, dies, asks for all memory, or hangs."
    _say(log, "begin", i)
    if i == bad:
        if how == "raises": raise ValueError("no luck")
        if how == "dies": os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs": time.sleep(600)
        if how == "dies once" and not Path(f"{log}.died").exists():
            Path(f"{log}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "eats": return len([bytearray(2**24) for _ in range(10_000)])
    return {"square": i * i}


def begun(log) -> list[int]:
    "Which cells were begun, in order."
    if not Path(log).exists(): return []
    return [int(line.split()[1]) for line in Path(log).read_text().splitlines() if line.startswith("begin")]


def ended(log) -> set[int]:
    return {int(line.split()[1]) for line in Path(log).read_text().splitlines() if line.startswith("end")}


@cell("tests.toy.a_set", leaves_files=True)
def a_set(n, log):
    _say(log, "begin", n)
    with atomic(kept("compressed") / f"{n}.safetensors") as tmp: tmp.write_text(f"set {n}")
    return n


@cell("tests.toy.student", needs=lambda n, seed, log: [(a_set, {"n": n, "log": log})])
def student(n, seed, log): return f"{(kept('compressed') / f'{n}.safetensors').read_text()}, student {seed}"
