"""What whitening, FRePo, DiM and TESLA cost, as ratios in one run on one thread.

    whitening  a forward pass of a network on whitened images, beside the same pass on the images as they are
    frepo      a whole iteration, beside one without its step on the images' features (the rest: real features, online)
    tesla      an iteration with TESLA's gradient, beside the exact one
    dim        a turn of the game with matching, beside one without

    python benchmarks/kernel.py [--quick] [--only whitening ...] [--repeats 7] [--out benchmarks/kernel.csv]

Noise of CIFAR-10's shape (whitening, of its own 3072 x 3072 matrix) and digits of mnist5k. Both sides take turns, who
begins alternates, the first pair warms up. Seconds are processor time; `ratio` is the median of the pairs, `lowest` and
`highest` stand beside it; `ms` is for one pass or iteration.
"""
import os
import tempfile
from dataclasses import replace
import torch
from squeeze import command, pairs
from rdd_lib.core import generator_of
from rdd_lib.data import ImageSet, load
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.generative import GenerativeDistillation
from rdd_lib.distill.kernel_regression import frepo_settings, NeuralFeatureRegression
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import Net
from rdd_lib.whitening import whitening


def whitened(size, repeats):
    x = torch.randint(256, (64, 3, 32, 32), generator=generator_of(0), dtype=torch.uint8)
    noise = ImageSet(x, torch.arange(64) % 10, tuple("0123456789"), "noise")
    whitening(noise)
    images = torch.rand(256, 3, 32, 32, generator=generator_of(1))
    times = 2 if size < 100 else 5
    for width in (32, 128):
        net = Net("convnet", dict(width=width))
        plain, white = net(noise), replace(net, whiten=.1)(noise)
        def passes(model):
            def run():
                with torch.no_grad():
                    for _ in range(times): model(images)
            return run
        yield {"what": f"pass of 256 images, width {width}, whitened / plain"} | pairs(
            passes(white), passes(plain), times, repeats)


class Unmoved(NeuralFeatureRegression):
    "Without the step on the images: what is left are the real features and the pool's own training."
    def _miss(self, s, net, x, goal):
        with torch.no_grad():
            for part in x.split(250): net.model.embed(part)
        yield s.u.sum() * 0


def regression(size, repeats):
    digits = load("mnist5k")
    n = 3 if size < 100 else 20
    for ipc in (1, 10):
        asked = dict(frepo_settings("mnist5k", ipc), iterations=n)
        def run(kind): return lambda: kind(**asked).compress(digits, ipc=ipc, device="cpu")
        yield {"what": f"iteration, ipc {ipc} / without the images' part"} | pairs(
            run(NeuralFeatureRegression), run(Unmoved), n, repeats)


def unrolled(size, repeats):
    digits, net, n = load("mnist5k"), Net("convnet", dict(width=16)), 2 if size < 100 else 6
    experts = Experts(n=1, epochs=2, batch=256)
    with tempfile.TemporaryDirectory() as folder:
        experts(net, digits, 2, folder, "cpu")
        how = dict(iterations=n, student_steps=8, expert_epochs=1, max_start=1, experts=experts, net=net)
        def run(gradient):
            method = TrajectoryMatching(gradient=gradient, **how)
            return lambda: method.compress(digits, ipc=1, device="cpu", buffers=folder)
        yield {"what": "iteration of 8 steps, tesla / exact"} | pairs(run("tesla"), run("recompute"), n, repeats)


def game(size, repeats):
    digits = load("mnist5k").subset(torch.arange(0, 4000, 40 if size < 100 else 10))
    turns = -(-len(digits) // 32)
    small = dict(width=32, convs=1, depth=5, batch=32, match_batch=32)
    how = small | dict(real_steps=4, nets=(Net("convnet", dict(width=32)),))
    alone, matched = (GenerativeDistillation(epochs=1, match_epochs=1, coef=coef, **how) for coef in (0., .01))
    def run(method): return lambda: method.compress(digits, ipc=1, device="cpu")
    yield {"what": "two turns, one of them with matching / none"} | pairs(run(matched), run(alone), turns, repeats)


PARTS = {"whitening": whitened, "frepo": regression, "tesla": unrolled, "dim": game}


def rows(only, size, repeats):
    with tempfile.TemporaryDirectory() as store:
        os.environ["RDD_STORE"] = f"{store}/cells"                  # nothing is read from the user's cache
        for part in only:
            for row in PARTS[part](size, repeats): yield {"part": part} | row


if __name__ == "__main__": command(__doc__, PARTS, rows)
