"""What only the full data sets can show: exact distances, a cover of a class, the level of the paper's baseline."""
import pytest
import torch
from conftest import FULL, needs
from rdd_lib.coresets.random import Random
from rdd_lib.covering.distances import distances
from rdd_lib.covering.k_center import k_mcs
from rdd_lib.data import load, sample
from rdd_lib.models import Net
from rdd_lib.evaluation.outcome import std_score
from rdd_lib.training.trainer import Trainer


@needs("cifar10")
def test_distances_of_photographs_are_exact():
    x = load("cifar10", "test").x[:60]
    rows = x.flatten(1).long()
    exact = (rows[:, None] - rows[None]).square().sum(2)
    assert torch.equal((distances(x, x).square() * 255 ** 2).round().long(), exact)


@needs("mnist")
def test_a_whole_class_is_covered_and_bounded():
    data = load("mnist")
    threes = data.x[data.y == 3]
    cover = k_mcs(threes, 50, time_limit=8)
    cover.check(threes)
    assert len(cover) == 50 and 0 < cover.lower_bound <= cover.radius


@needs("mnist")
@pytest.mark.skipif(not FULL, reason="minutes; in make test-all")
def test_random_images_reach_the_level_of_the_paper():
    """MCS paper, Table 1: Rand with 50 images per class, ResNet-18, 20 epochs: 95.15 +- .14.

    One seed, 500 test images: five points either way."""
    S, test = Random().compress(load("mnist"), ipc=50, seed=0), sample(load("mnist", "test"), 500)
    score = std_score(S, test, Net("resnet18"), Trainer(), seeds=(0,), device="cpu")
    assert abs(100 * score.mean - 95.15) < 5
