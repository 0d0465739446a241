"What every attack keeps to: it leaves no trace, and it gives the same bytes again."
import random
from contextlib import contextmanager
import numpy as np
import torch


def content(t): return None if t is None else t.detach().cpu().numpy().tobytes()


def state(net, x):
    "All that an attack might change besides its result."
    return {"flags": [m.training for m in net.modules()],
            "asking for a gradient": [p.requires_grad for p in net.parameters()],
            "gradients": [content(p.grad) for p in net.parameters()],
            "buffers": {k: content(v) for k, v in net.named_buffers()},
            "images": content(x),
            "torch's draws": content(torch.get_rng_state()),
            "NumPy's draws": np.random.get_state()[1].tolist(),
            "Python's draws": random.getstate()}


@contextmanager
def no_trace(net, x):
    net[0].weight.grad = torch.ones_like(net[0].weight)                 # someone's gradient, half-way accumulated
    before = state(net, x)
    yield
    after = state(net, x)
    for name in before: assert before[name] == after[name], name


def same_result(a, b, *fields):
    "The same bytes, from the same number of passes."
    for field in ("x_adv", *fields): assert content(getattr(a, field)) == content(getattr(b, field)), field
    assert (a.names, a.forward_samples, a.backward_samples) == (b.names, b.forward_samples, b.backward_samples)
