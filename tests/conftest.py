"""One thread, no network, the same examples in every run, and a store of its own: what every test here runs under.
And the networks that attacks are tested on."""
import os
import shutil
import socket
import sys
import threading
import warnings
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
import torch.nn.functional as F
import pretend_gpu
from hypothesis import settings
from torch import nn
from rdd_lib.core import generator_of
from rdd_lib.models import seeded
from rdd_lib.data import load
from rdd_lib.files import kept
from rdd_lib.models import build
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.threats import Linf

FULL = os.environ.get("RDD_TESTS") == "full"                            # `make test-all`
torch.set_num_threads(1)
# the same examples in every run; for others: pytest --hypothesis-profile=default
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """Those that need a GPU can be asked for: pytest -m gpu. The pretend one has to be there before the first backward
    pass: autograd counts devices then."""
    need = [i for i in items if "gpu" in getattr(i, "fixturenames", ())]
    for i in need: i.add_marker("gpu")
    if need: pretend_gpu.install()


@pytest.fixture
def gpu():
    "The name of a GPU: a real one, else one that is pretended (see tests/pretend_gpu)."
    if why := pretend_gpu.install(): pytest.skip(f"needs a GPU; {why}")
    with pretend_gpu.present(): yield "cuda"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "Connections to anywhere but this machine fail at once."
    real = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError(f"a test tried to reach {address}")
        return real(self, address)
    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    "Cells and compressed sets of a test are nobody else's."
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "store" / "cells"))


@pytest.fixture
def rdd(tmp_path, monkeypatch, capsys):
    """`rdd('show', 'x')` does what the shell does with these words in an empty folder, in this process; its exit code
    and what it told."""
    from rdd_lib import cli
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)       # what `main` changes is put back

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["rdd", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left: cli.main()
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=left.value.code or 0, stdout=out, stderr=err)
    return run


@pytest.fixture
def page(tmp_path):
    """`page("mcs/fig2", "seeds=1")` is `rdd reproduce mcs/fig2 --set seeds=1` in this process: it spares a kernel,
    which takes longer to start than most pages take at these sizes. The folder of tables and pictures.

    With `rehearse=True` a rehearsal, of another profile with `profile="paper"`."""
    from execnb.shell import CaptureShell
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook
    from rdd_lib import cli
    from rdd_lib.reproduce import runner
    from rdd_lib.reproduce.orders import Orders
    from rdd_lib.reproduce.rehearsal import aside

    def run(name, *settings, profile="smoke", rehearse=False):
        item, = runner.chosen(name)
        folder = tmp_path / "figures" / ("rehearsal" if rehearse else profile) / item.path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        with Orders(rehearse=rehearse).given(), aside():
            play(item, runner.parameters_for(item, profile, cli.parse_settings(settings), folder, True))
        return folder

    def play(item, parameters):
        whole = load_notebook_node(str(item.path))
        nb = parameterize_notebook(whole, parameters, kernel_name="python3", language="python")
        main, shell = sys.modules["__main__"], CaptureShell(mpl_format="png")
        shell.display_formatter.active_types = ["text/plain"]                # pictures are saved, not shown
        try:
            for cell in nb.cells:
                if cell.cell_type == "code": shell.run(cell.source)
                if shell.exc: raise shell.exc
        finally: sys.modules["__main__"] = main                              # the shell puts its own there
    return run


@contextmanager
def served(folder):
    "The address of a folder that is served on this machine, for the time of the block."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    "Playwright's own chromium, or one of this machine; a module's, for while it is open no event loop can start."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        ours = [playwright.chromium.executable_path,
                *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
        there = next((path for path in ours if path and Path(path).exists()), None)
        if there is None: pytest.skip("no browser: playwright install chromium, or chromium or Chrome on the PATH")
        chromium = playwright.chromium.launch(executable_path=there, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def many(n):
    "Seeds for a test that draws its own instance: n of them in `make test-all`, at most 15 in `make test`."
    return range(n if FULL else min(n, 15))


def needs(name):
    "Skips a test where the full data set is not at hand."
    there = all((kept("data") / name / f"{split}.npz").exists() for split in ("train", "test"))
    place = "$RDD_DATA" if os.environ.get("RDD_DATA") else "the cache"
    why = f"{name} is not in {place}; set RDD_DATA to a folder with {name}/train.npz and test.npz"
    return pytest.mark.skipif(not there, reason=why)


def fit(model, x, y, epochs, attack=None):
    g, opt = generator_of(0, "order"), torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=g).split(100):
            xb = x[i] if attack is None else attack(model, x[i], y[i], g)
            opt.zero_grad()
            F.cross_entropy(model(xb), y[i]).backward()
            opt.step()
    return model.eval()


@pytest.fixture(scope="session")
def nets():
    train = load("mnist5k", "train")
    x, y = train.images(), train.y
    return {"usual": fit(build("mlp", train), x, y, 5),
            "hardened": fit(build("mlp", train), x, y, 4, PGD(Linf(.1), 5, .03)),
            "conv": fit(build("convnet", train, width=8), x, y, 2)}


@pytest.fixture
def awkward():
    """A network with what an attack could disturb: batch norm, one of them frozen, dropout, a parameter that is not
    trained. In training mode."""
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.5), nn.Flatten(),
                            nn.Linear(4 * 6 * 6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).train()
    net[1].eval()
    net[7].bias.requires_grad_(False)
    g = generator_of(0)
    return net, torch.rand(24, 1, 8, 8, generator=g), torch.randint(3, (24,), generator=g)


class Stopped(list):
    "A log that interrupts the run with its `last` entry."
    def __init__(self, last): self.last = last
    def append(self, loss):
        super().append(loss)
        if len(self) == self.last: raise KeyboardInterrupt
