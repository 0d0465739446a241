"""`make lab` in a real browser: what it opens, what it asks, whether sliders move pictures. In `make test-all`, where a
browser is: that of playwright (`playwright install chromium`), or chromium or Chrome of this machine."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen
import pytest
from conftest import FULL

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not FULL, reason="starts JupyterLab and a browser: a minute; in make test-all")
WAIT = 240_000                                      # milliseconds, for what takes some seconds
IMAGE = ".widget-interact .widget-output img"       # what a slider draws


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until_there(url, server, seconds=120):
    for _ in range(seconds):
        assert server.poll() is None, "make lab has ended"
        try: return urlopen(url, timeout=5).close()
        except OSError: time.sleep(1)
    raise AssertionError(f"nothing at {url} after {seconds} s")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    "What the lab needs of the checkout: a browser may save, so not the checkout itself."
    copy = tmp_path_factory.mktemp("lab") / "checkout"
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", ".last_checked", "cpu")
    for name in (".jupyter", "nbs", "figures"): shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("Makefile", "settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def lab(checkout):
    "`make lab` as it is typed, with its options, in a home of its own; address and token."
    port, home = free_port(), checkout.parent / "home"
    home.mkdir()
    options = f"--no-browser --ip 127.0.0.1 --port {port} --ServerApp.port_retries=0 --IdentityProvider.token=secret"
    command = ["make", "--old-file", ".venv/ready", f"BIN={Path(sys.executable).parent}", f"LAB={options}", "lab"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "TQDM", "MAKE"))}
    env |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(home / "ipython")}
    with open(checkout.parent / "log", "wb") as log:
        server = subprocess.Popen(command, cwd=checkout, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until_there(f"http://127.0.0.1:{port}/api", server)
        yield f"http://127.0.0.1:{port}/lab{{}}?token=secret&reset"
    finally: ended(server)


def ended(server, seconds=60):
    "make and the lab that it started; the lab takes its kernels with it."
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(seconds)
    for _ in range(seconds):
        try: os.killpg(server.pid, 0)
        except ProcessLookupError: return
        time.sleep(1)
    os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture
def tab(browser):
    "A page of a browser; `tab.told` are its errors."
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(WAIT)
    page.told = []
    page.on("console", lambda m: page.told.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.told.append(str(error)))
    yield page
    page.close()


def opened(tab, address):
    tab.goto(address)
    tab.wait_for_selector(".jp-Notebook .jp-MarkdownOutput h1")
    tab.wait_for_selector("[data-status=idle]")       # its kernel


def asks(tab):
    "Dialogs and notes that lie over the page."
    return [found.inner_text() for found in tab.query_selector_all(".jp-Dialog, .Toastify__toast")]


def saved(tab, path):
    before = path.stat().st_mtime_ns
    tab.click(".jp-Notebook .jp-MarkdownOutput h1")
    tab.keyboard.press("Control+s")
    for _ in range(60):
        tab.wait_for_timeout(500)
        if path.stat().st_mtime_ns > before: return path.read_text(encoding="utf-8")
    raise AssertionError(f"{path.name} was not saved")


def test_it_opens_the_index_and_asks_nothing(tab, lab, checkout):
    opened(tab, lab.format("/tree/nbs/index.ipynb"))
    assert tab.locator(".jp-Notebook .jp-MarkdownOutput h1").first.inner_text().startswith("rdd_lib")
    assert tab.locator(".jp-Notebook img").first.evaluate("image => image.naturalWidth") > 100, "its picture is lost"
    tab.wait_for_timeout(5000)                       # the question about news comes late
    assert not asks(tab) and not tab.told
    assert saved(tab, checkout / "nbs/index.ipynb") == (ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")


def test_a_slider_changes_its_picture(tab, lab):
    opened(tab, lab.format("/tree/nbs/stories/explore.ipynb"))
    tab.click("text=Run >> nth=0")
    tab.click(".lm-Menu >> text=Run All Cells")
    tab.wait_for_function(f"document.querySelectorAll('{IMAGE}').length == 3")
    knobs = [label.text_content() for label in tab.query_selector_all(".widget-interact .widget-label")]
    assert knobs == ["k", "shape", "eps", "digit", "network", "lam", "digit"]
    before = tab.locator(IMAGE).first.get_attribute("src")
    tab.locator(".widget-interact [role=slider]").first.press("ArrowRight")
    tab.wait_for_function(f"src => ![undefined, src].includes(document.querySelector('{IMAGE}')?.src)", arg=before)
    assert not asks(tab) and not tab.told
