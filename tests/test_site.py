"""The site: every notebook has its page, every link leads somewhere, and a browser finds it readable.

`make test` looks at the prepared sources; the build and the browser belong to `make test-all`."""
import fcntl
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
import pytest
from conftest import FULL, served

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import prepare  # noqa: E402
import site_map  # noqa: E402
from extensions.formulas import drawn  # noqa: E402

full = pytest.mark.skipif(not FULL, reason="builds the site; RDD_TESTS=full")
# One page of each kind.
KINDS = ("index.html", "learn/index.html", "learn/own.html", "learn/clusters.html", "learn/attacks/23_pgd.html",
         "papers/mcs/table1.html", "papers/mcs/index.html", "api/covering.k_center.html", "results.html",
         "contributing.html")


# The sources

@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return folder, *prepare.prepare(folder)


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_every_notebook_is_a_page_of_its_own(prepared):
    folder, pages, _ = prepared
    found = [p for p in (ROOT / "nbs").rglob("[!.]*.ipynb") if not p.parent.name.startswith(".")]
    assert {page.source for page in pages} == {p.relative_to(ROOT).as_posix() for p in found}
    docs = [page.doc for page in pages]
    assert len(set(docs)) == len(docs)
    assert all((folder / f"{doc}.ipynb").exists() for doc in docs)
    listed = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("index.md")).split()
    assert not [doc for doc in docs if "/" in doc and Path(doc).name not in listed], "in no sidebar"


def test_every_formula_can_be_drawn(prepared):
    told = [c["source"] for path in prepared[0].rglob("*.ipynb") for c in cells(path) if c["cell_type"] == "markdown"]
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", "\n\n".join(told), flags=re.S)
    found = {a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", prose, re.S)}
    assert len(found) > 100
    for formula in found: assert drawn(formula).startswith("<svg"), formula     # or it raises, with the formula


def test_every_link_leads_to_a_file(prepared):
    folder, _, links = prepared
    assert not links.lost
    for path in [*folder.rglob("*.ipynb"), *folder.rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb": text = "\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown")
        prose = re.sub(r"```.*?```|`[^`\n]*`|^    .*?$", "", text, flags=re.S | re.M)
        for link in re.findall(r"\]\((?![a-z]+:|#|/)([^)\s#]+)", prose):
            assert (path.parent / link).exists(), f"{path.relative_to(folder)}: {link}"


def test_links_go_to_pages_and_else_to_the_repository(tmp_path):
    links = site_map.Links(site_map.pages())
    def turned(link, base="nbs/attacks", of="learn/attacks/23_pgd"): return links.turned(link, base, of)
    assert turned("22_walk.ipynb") == "22_walk.ipynb"
    assert turned("../00_core.ipynb#A-title?") == "../ground/00_core.ipynb#a-title"
    assert turned("../figures/smoke/mcs/fig2.ipynb", "nbs", "results") == "papers/mcs/fig2.ipynb"
    assert turned("../papers/mcs") == "../../papers/mcs/index.md"
    assert turned("../../rdd_lib/core.py") == f"{site_map.SETTINGS['git_url']}/blob/main/rdd_lib/core.py"
    assert turned("../figures/smoke/mcs/fig2.png", "nbs", "results") == "pictures/figures/smoke/mcs/fig2.png"
    assert turned("https://arxiv.org") == "https://arxiv.org" and not links.lost
    assert turned("gone.ipynb") and links.lost == ["nbs/attacks: gone.ipynb"]
    assert links.in_text("[`a`](22_walk.ipynb) `[b](c)`", "nbs/attacks", "x") == (
        "[`a`](learn/attacks/22_walk.ipynb) `[b](c)`")


def test_what_a_page_shows_and_what_it_folds(prepared):
    folder, pages, _ = prepared
    table = cells(folder / "papers/mcs/table1.ipynb")
    assert "Executed in profile `cpu`" in table[1]["source"] and table[2]["source"].startswith("![")
    folded = [c for c in table if "hide-input" in c["metadata"].get("tags", ())]
    assert folded[0]["source"].startswith("profile = ") and folded[1]["source"].startswith("# Parameters")
    pgd = cells(folder / "learn/attacks/23_pgd.ipynb")
    assert not [c for c in pgd if c["source"].startswith("#|")]
    assert [c for c in pgd if "class PGD(Walk)" in c["source"] and c["metadata"]["tags"] == ["hide-input"]]
    assert "colab.research.google.com" in pgd[1]["source"]


def test_a_notebook_for_colab_installs_the_library_there_and_only_there():
    wanted = f'pip install -Uqq "rdd_lib[digits,attacks,papers] @ git+{site_map.SETTINGS["git_url"]}"'
    for source in site_map.ON_COLAB:
        _, *after = cells(ROOT / source)[:3]                           # the README has no cell that names a module
        cell = next((c["source"] for c in after if c["cell_type"] == "code"), [""] * 3)
        assert cell[:2] == ["#| hide\n", "#| eval: false\n"] and cell[2].startswith(f"! [ -e /content ] && {wanted}")


def test_the_page_about_ones_own_shows_the_package_that_is_tested(prepared):
    page = prepared[0] / "learn/own.md"
    shown = re.findall(r"^```{literalinclude} (\S+)$", page.read_text(encoding="utf-8"), re.M)
    assert shown == ["own_package/own_package.py", "own_package/pyproject.toml"]
    assert all((page.parent / name).read_bytes() == (DOCS / name).read_bytes() for name in shown)
    for name in ("own", "clusters"):
        assert f"({name}.md)" in (prepared[0] / "learn/index.md").read_text(encoding="utf-8")
        assert f"(learn/{name}.md)" in (prepared[0] / "index.md").read_text(encoding="utf-8")


def test_the_leaderboard_is_made_of_the_rows_in_the_repository(prepared):
    board, rows = prepared[0] / "extra" / "leaderboard", DOCS / "leaderboard" / "rows"
    made = json.loads((board / "rows.json").read_text(encoding="utf-8"))
    assert sorted(made, key=str) == sorted((json.loads(p.read_text()) for p in rows.glob("*.json")), key=str)
    assert (board / "index.html").read_text(encoding="utf-8").count('data-order="') >= len(made) == 22
    assert sum(p.stat().st_size for p in rows.iterdir()) < 300_000


def test_the_order_of_reading_and_the_names_of_modules():
    ground = [Path(p.doc).name for p in site_map.pages() if site_map.wing_of(p.source) == "ground"]
    assert ground.index("03_data") < ground.index("031_folders") < ground.index("04_models")
    assert "PGD" in site_map.public("attacks.pgd")
    told = {name: comment for name, _, comment in site_map.constants("covering.k_center")}
    assert told["LOOKS"].startswith("balls") and told["FIRST"] == told["FINE"]


# The site

def build(out):
    "As `make docs` does."
    prepare.prepare(out / "src")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-c", DOCS, "-d",
               out / "doctrees", out / "src", out / "html"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built once: the first worker of a run builds it, the others wait."
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    out.mkdir(exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "built").exists(): build(out)
        (out / "built").touch()
    return out / "html"


class Reader(HTMLParser):
    "What a page links to, shows, loads, and the anchors it has."
    def __init__(self, page):
        super().__init__()
        self.links, self.loads, self.anchors, self.pictures = [], [], set(), []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name")}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag in ("img", "script", "source") and attrs.get("src"): self.loads.append(attrs["src"])
        if tag == "link" and attrs.get("rel") not in ("canonical", "index", "search", "next", "prev"):
            self.loads.append(attrs.get("href", ""))
        if tag == "img": self.pictures.append(attrs)


def crawl(site):
    "Every link, anchor and file of every page that leads nowhere or elsewhere."
    found = [p for p in sorted(site.rglob("*.html")) if "_static" not in p.parts]     # the theme's own: a template
    pages = {p.relative_to(site).as_posix(): Reader(p) for p in found}
    counted, wrong = 0, []
    for name, page in pages.items():
        for link in page.links + page.loads:
            whole, anchor = urldefrag(urljoin(f"http://site/{name}", link))
            there = unquote(urlsplit(whole).path).lstrip("/")
            counted += 1
            if not whole.startswith("http://site/"):
                if link in page.loads and not link.startswith("data:"): wrong.append(f"{name} loads {link}")
            elif not (site / there).is_file(): wrong.append(f"{name}: {link}")
            elif anchor and there in pages and unquote(anchor) not in pages[there].anchors:
                wrong.append(f"{name}: no anchor {link}")
    return pages, counted, wrong


@full
def test_no_link_anchor_or_picture_is_broken_and_nothing_is_loaded_from_elsewhere(site):
    pages, counted, wrong = crawl(site)
    assert not wrong, f"{len(wrong)} of {counted} links on {len(pages)} pages:\n" + "\n".join(wrong[:50])
    assert len(pages) > 250 and counted > 10_000
    print(f"{len(pages)} pages, {counted} links")


@full
def test_the_reference_has_parameters_and_what_is_returned(site):
    page = (site / "api/covering.k_center.html").read_text(encoding="utf-8")
    assert "number of centres" in page and 'id="rdd_lib.covering.k_center.k_mcs"' in page and "[source]" in page
    outcome = (site / "api/attacks.pgd.html").read_text(encoding="utf-8")
    assert "pixel units; None: eps / 4" in outcome                                     # a field of a dataclass
    told = (site / "learn/attacks/23_pgd.html").read_text(encoding="utf-8")
    assert 'href="../../api/attacks.pgd.html#rdd_lib.attacks.pgd.PGD"' in told        # a name in backticks
    assert f'{site_map.SETTINGS["git_url"]}/edit/main/nbs/attacks/23_pgd.ipynb' in told


@pytest.fixture(scope="module")
def address(site):
    with served(site) as address: yield address


@pytest.fixture
def visit(browser, address):
    "`visit(name, **settings)` opens a page; what goes wrong on any of them fails the test."
    opened, wrong = [], []

    def heard(message):
        if message.type == "error": wrong.append(message.text)

    def asked(route):
        "Nothing is fetched from elsewhere."
        if route.request.url.startswith((address, "data:")): return route.continue_()
        wrong.append(f"asks for {route.request.url}")
        route.abort()

    def go(name, **settings):
        context = browser.new_context(**settings)
        opened.append(context)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("response", lambda r: r.status < 400 or wrong.append(f"{r.status}: {r.url}"))
        page.route("**/*", asked)
        page.goto(address + name)
        return page
    yield go
    for context in opened: context.close()
    assert not wrong


def keep(page, name):
    "A picture of the page, for whoever names a folder."
    if folder := os.environ.get("RDD_SHOTS"):
        page.wait_for_timeout(300)
        page.screenshot(path=Path(folder) / f"{name.replace('/', '.')}.png")


@full
@pytest.mark.parametrize("name", KINDS)
def test_a_page_is_readable_on_a_desk_in_the_dark_and_on_a_phone(visit, name):
    desk = visit(name, viewport={"width": 1400, "height": 900}, color_scheme="light")
    assert desk.locator("h1").count() == 1 and desk.locator(".bd-article").inner_text().strip()
    keep(desk, f"{name}.light")
    keep(visit(name, viewport={"width": 1400, "height": 900}, color_scheme="dark"), f"{name}.dark")
    phone = visit(name, viewport={"width": 390, "height": 844})
    wide, screen = phone.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert wide <= screen
    keep(phone, f"{name}.phone")


@full
def test_the_dark_mode_switches_colours(visit):
    page = visit("learn/attacks/23_pgd.html", color_scheme="light", viewport={"width": 1400, "height": 900})
    def light():
        "Of text and ground, 0 ... 765."
        seen = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        return [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in seen]
    text, ground = light()
    assert text < 300 < 600 < ground
    page.locator("button.theme-switch-button:visible").first.click()
    page.locator("button.theme-change-button[data-mode=dark]:visible").first.click()
    text, ground = light()
    assert ground < 200 < 500 < text


@full
def test_the_leaderboard_is_reached_from_every_page_and_leads_back(visit):
    for name in ("index.html", "papers/mcs/table1.html"):
        page = visit(name, viewport={"width": 1400, "height": 900})
        links = page.eval_on_selector_all(".bd-header a", "links => links.map(a => [a.innerText.trim(), a.href])")
        assert [link for text, link in links if link.endswith("leaderboard/index.html")]
    page.goto(next(link for text, link in links if link.endswith("leaderboard/index.html")))
    assert page.locator("section:visible tbody tr").count() > 10
    keep(page, "leaderboard")
    page.locator("a.home").click()
    page.wait_for_selector(".bd-article h1")


@full
@pytest.mark.parametrize("word, leads_to", [("MinimalCoreset", "api/coresets.covering.html"),
                                            ("curvature", "learn/training/43_curvature.html"),
                                            ("Square attack", "learn/attacks/25_square.html")])
def test_search_finds(visit, word, leads_to):
    page = visit(f"search.html?q={word}", viewport={"width": 1400, "height": 900})
    page.wait_for_selector("#search-results li a", timeout=20_000)
    page.wait_for_function("document.querySelector('#search-results p.search-summary')?.innerText.includes('page')")
    found = page.eval_on_selector_all("#search-results li > a", "links => links.map(a => a.getAttribute('href'))")
    assert any(urldefrag(link)[0].split("?")[0].endswith(leads_to) for link in found[:10]), found[:10]
    keep(page, f"search.{word}")


@full
def test_folded_code_opens_and_pictures_are_there(visit):
    page = visit("papers/mcs/table1.html", viewport={"width": 1400, "height": 900})
    first = page.locator("details.hide").first
    assert not first.locator("pre").is_visible()
    first.locator("summary").click()
    assert first.locator("pre").is_visible()
    page.wait_for_function("[...document.images].every(i => i.loading === 'lazy' || i.complete && i.naturalWidth > 0)")
    picture = page.locator(".bd-article img").first.bounding_box()
    assert picture["y"] < 600, "the figure comes first"
