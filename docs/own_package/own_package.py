"A method, an attack, an objective, a model, a data set of one's own."
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from rdd_lib import ImageSet
from rdd_lib.attacks.threats import Threat
from rdd_lib.attacks.walk import Attack, Walk
from rdd_lib.compressor import Compressor, method
from rdd_lib.core import generator_of
from rdd_lib.training.objectives import Objective, hard, searching


# @method adds where it comes from and an abbreviation; it may be left out
@method("nearest_mean", "you, 2026", alias="nm")
@dataclass(frozen=True)
class NearestMean(Compressor):
    "The images nearest to the mean of their class."
    norm: float = 2.    # of the distance; fields are settings: --set norm=1

    def make(self, data, counts, seed, device):
        x = data.images().flatten(1)         # floats in [0, 1], an image a row

        def nearest(rows, k):
            off = x[rows] - x[rows].mean(0)
            away = torch.linalg.vector_norm(off, self.norm, dim=1)
            return rows[away.argsort(stable=True)[:k]]
        picked = [nearest(rows, k) for rows, k in zip(data.per_class, counts)]
        return {"indices": torch.cat(picked)}


@dataclass(frozen=True)
class SignSteps(Walk):
    "Equal steps up the slope (linf: along its sign), twice the radius in all."
    threat: Threat               # the norm and the radius
    steps: int = 5               # --set attack.steps=20
    loss: str = "ce"             # what it climbs, a name in attacks.losses
    name = "sign_steps"          # in results

    def start(self, x, g): return x

    def step(self, s, losses, grad):
        size = 2 * self.threat.eps / self.steps
        # s["x"] are the images, s["at"] where they are now; it stays in the ball
        return s | dict(at=self.threat.ascend(s["x"], s["at"], grad, size))


@dataclass(frozen=True)
class Blend(Objective):
    "Cross-entropy at images and at what an attack makes of them, in shares."
    attack: Attack               # --set objective.steps=10 reaches into it
    share: float = .5            # of what is attacked: --set objective.share=1
    search_mode: str = "eval"    # of batch norm and dropout during the attack

    def losses(self, model, x, y, generator):    # (B,): the trainer weighs them
        with searching(model, self.search_mode):
            x_adv = self.attack(model, x, hard(y), generator)
        clean = F.cross_entropy(model(x), y, reduction="none")
        attacked = F.cross_entropy(model(x_adv), y, reduction="none")
        return (1 - self.share) * clean + self.share * attacked


# what is announced takes a threat
def blend(threat): return Blend(SignSteps(threat))


class TwoLayers(nn.Module):
    "Two linear layers with a ReLU between them."
    # three that are given, then settings: --set net.settings.width=32
    def __init__(self, channels, n_classes, size, width=64):
        super().__init__()
        first = nn.Linear(channels * size**2, width)
        self.features = nn.Sequential(nn.Flatten(), first, nn.ReLU())
        self.classifier = nn.Linear(width, n_classes)

    def embed(self, x): return self.features(x)  # for methods that compare features
    def forward(self, x): return self.classifier(self.embed(x))   # normalised


def stripes(split):
    "500 noisy images of stripes, across or upright, 28x28."
    n = 400 if split == "train" else 100
    g = generator_of(0, "stripes", split)   # so that everyone has the same ones
    y = torch.arange(n) % 2
    shift = 6.28 * torch.rand(n, 1, generator=g)
    waves = torch.sin(.8 * torch.arange(28) + shift)
    across = waves[:, None, :, None].expand(n, 1, 28, 28)
    x = torch.where((y == 0).view(n, 1, 1, 1), across, across.mT)
    x = (.5 + .3 * x + .1 * torch.randn(x.shape, generator=g)).clamp(0, 1)
    return ImageSet((255 * x).byte(), y, ("across", "upright"), "stripes", split)
