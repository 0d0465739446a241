"""The leaderboard: ranks with ties, references without one, rows that mean harm, and the page in a browser.

`make test` reads the page; the browser belongs to `make test-all`."""
import base64
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from conftest import FULL, served
from rdd_lib.addresses import sha256_of
from rdd_lib.core import BadArgument, BrokenFile, MissingData
from rdd_lib.sharing.leaderboard import COLUMNS, leaderboard
from rdd_lib.sharing.ranks import ranked
from rdd_lib.sharing.rows import FORMAT, read_row, share, write_row

full = pytest.mark.skipif(not FULL, reason="opens the page in a browser; RDD_TESTS=full")


def row(alive=50, method="Herding", ipc=2, train="Standard", eps=.1, data="digits", fingerprint="f", **more):
    "100 test images, one student; so many survive."
    made = dict(sha256="a" * 64, file="few.safetensors", method={"is": method}, source={"images": 1000}, classes=10,
                images=10 * ipc, bytes=7840 * ipc)
    judged = dict(name=data, split="test", fingerprint=fingerprint, images=100)
    return {"format": FORMAT, "set": made, "asked": {}, "student": {"is": "Net", "name": "mlp"}, "device": "cpu",
            "training": {"is": "Trainer", "objective": {"is": train}}, "threat": {"norm": "Linf", "eps": eps},
            "attack": {"is": "PGD", "steps": 20}, "data": judged, "seeds": [0], "versions": {},
            "std": share([np.arange(100) < 80]), "rob": share([np.arange(100) < alive])} | more


def put(folder, name, row, table=False):
    "A row as a file, with its table of images or without."
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if table:
        alive = round(100 * row["rob"]["mean"])
        images = pd.DataFrame(dict(image=range(100), student=0, survived=[n < alive for n in range(100)]))
        images.to_csv(path.with_suffix(".csv"), index=False)
        told = {"file": f"{path.stem}.csv", "sha256": sha256_of(path.with_suffix(".csv"))}
        row = row | {"per_image": told}
    return write_row(row, path)


class Reader(HTMLParser):
    "Rows of the tables as dicts, links, all tags and attributes."
    def __init__(self, path):
        super().__init__()
        self.rows, self.links, self.tags, self.attributes, self.texts, self.cell = [], [], [], [], [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "a": self.links.append(attrs["href"])
        if tag == "tr" and "data-order" in attrs: self.rows.append({"class": attrs["class"]})
        elif tag == "tr": self.rows.append(None)
        if tag in ("td", "th") and self.rows and self.rows[-1] is not None:
            self.cell = COLUMNS[len(self.rows[-1]) - 1][0]
            self.rows[-1][self.cell] = ""
        elif tag == "div": self.cell = None

    def handle_endtag(self, tag):
        if tag in ("td", "th"): self.cell = None

    def handle_data(self, data):
        self.texts.append(data)
        if self.cell: self.rows[-1][self.cell] += data + " "

    def told(self, *names):
        "Of each row what stands in some columns, without what stands beneath it."
        return [tuple(r[name].split()[0] for name in names) for r in self.rows if r]


def page(tmp_path, **settings): return Reader(leaderboard(tmp_path / "rows", tmp_path / "site", **settings))


# Ranks

@pytest.mark.parametrize("alive, ranks", [
    ((90, 50, 10), (1, 2, 3)),                       # intervals apart
    ((55, 50, 45), (1, 1, 1)),                       # all overlap
    ((70, 60, 50), (1, 1, 2)),                       # a chain: the first and the last are apart
    ((90, 88, 50, 48, 10), (1, 1, 3, 3, 5)),
    ((50,), (1,)), ((50, 50), (1, 1)), ((0, 0, 0), (1, 1, 1)), ((100, 100, 0), (1, 1, 3))])
def test_ranks_by_intervals(alive, ranks):
    rows = [row(n) for n in alive]
    assert tuple(place.rank for place in ranked(rows, [None] * len(rows))) == ranks
    turned = ranked(rows[::-1], [None] * len(rows))
    assert tuple(place.rank for place in turned)[::-1] == ranks


def test_a_paired_test_decides_where_intervals_overlap(tmp_path):
    for name, alive in (("a", 60), ("b", 50), ("c", 49)): put(tmp_path / "rows", name, row(alive, name.upper()), True)
    assert page(tmp_path).told("rank", "method") == [("1", "A"), ("2", "B"), ("2", "C")]
    put(tmp_path / "rows", "b", row(50, "B", fingerprint="other"), True)      # other images: left to the intervals
    assert page(tmp_path).told("rank", "method") == [("1", "A"), ("1", "B"), ("2", "C")]


def test_a_table_that_is_not_there_or_not_the_rows_own(tmp_path):
    rows = tmp_path / "rows"
    for name, alive in (("a", 60), ("b", 50)): put(rows, name, row(alive, name.upper()), True)
    (rows / "b.csv").rename(tmp_path / "b.csv")
    assert page(tmp_path).told("rank", "method") == [("1", "A"), ("1", "B")]
    shutil.copy(rows / "a.csv", rows / "b.csv")
    with pytest.raises(BrokenFile, match="b.json' names 'b.csv' with sha256 "): page(tmp_path)
    told = read_row(rows / "b.json") | {"per_image": {"file": "b.csv", "sha256": sha256_of(rows / "b.csv")}}
    write_row(told, rows / "b.json")
    with pytest.raises(BrokenFile, match="b.csv' tells other robust accuracies than its row"): page(tmp_path)


def test_ranks_stay_within_what_can_be_compared(tmp_path):
    kinds = [dict(), dict(train="Adversarial"), dict(eps=.2), dict(ipc=3), dict(data="clothes"),
             dict(attack={"is": "AutoAttack", "attacks": ["pgd", "square"]}),
             dict(student={"is": "Net", "name": "lenet"})]
    for n, kind in enumerate(kinds):
        put(tmp_path / "rows", f"{n}-a", row(90, "A", **kind))
        put(tmp_path / "rows", f"{n}-b", row(10, "B", **kind))
    told = page(tmp_path)
    assert sorted(told.told("rank", "method")) == [("1", "A")] * 7 + [("2", "B")] * 7
    assert told.tags.count("section") == 4 and told.tags.count("tr") == 14 + 4 + 7    # heads of tables, headings


def test_references_are_shown_where_they_belong_and_never_ranked(tmp_path):
    rows = tmp_path / "rows"
    for ipc in (2, 3):
        for method, alive in (("A", 90), ("Random", 50), ("B", 10)):
            put(rows, f"{method}{ipc}", row(alive, method, ipc))
    whole = row(95, None, 100)
    put(rows, "whole", whole)
    told = page(tmp_path)
    lines = [("–", "all"), ("1", "A"), ("–", "Random"), ("2", "B")]
    assert told.told("rank", "method") == lines * 2 and told.tags.count("section") == 2
    assert [r["class"] for r in told.rows if r] == ["reference", "", "reference", ""] * 2
    put(rows, "whole", whole | {"set": whole["set"] | {"method": {"is": "full"}, "images": 20}})
    assert page(tmp_path).told("rank", "method") == lines * 2


def test_doubts_proofs_and_who_made_a_row(tmp_path):
    proven = share([np.arange(100) < 7])
    put(tmp_path / "rows", "a", row(90, "A", doubts=["zero_gradients"], by="Ada"))
    put(tmp_path / "rows", "b", row(50, "B", doubts=[], proven=proven))
    put(tmp_path / "rows", "c", row(10, "C"))
    a, b, c = (r for r in page(tmp_path).rows if r)
    assert (a["class"], a["doubts"].strip(), b["doubts"].strip(), c["doubts"].strip()) == (
        "doubtful", "zero_gradients", "none found", "none looked for")
    assert a["rank"].strip() == "1" and "by Ada" in a["method"]
    assert b["proven %"].split()[:3] == ["7.0", "[3.4,", "13.7]"] and c["proven %"].strip() == "–"
    assert c["robust %"].split()[0] == "10.0" and c["bytes"].strip() == "15.7 kB"


def test_different_settings_of_one_method_have_different_names(tmp_path):
    for steps in (3, 5):
        told = row(50, "DM")
        told["set"] = told["set"] | {"method": {"is": "DM", "steps": steps, "net": {"is": "Net", "name": "mlp"}}}
        put(tmp_path / "rows", str(steps), told)
    assert sorted(r["method"].strip() for r in page(tmp_path).rows if r) == ["DM, steps=3", "DM, steps=5"]


# Harm

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"' onmouseover=\"alert(1) {{title}} &amp;"


def test_whatever_a_row_says_is_text(tmp_path):
    told = row(50, EVIL, data=EVIL, by=EVIL, device=EVIL, doubts=[EVIL], paper={EVIL: "javascript:alert(1)"},
               student={"name": EVIL}, attack={"is": EVIL, "attacks": [EVIL]}, versions={EVIL: EVIL})
    told["threat"] = {"norm": EVIL, "eps": .1}
    told["training"] = {"objective": {"is": EVIL}}
    told["set"] = told["set"] | {"file": "javascript:alert(1)", "alias": EVIL}
    put(tmp_path / "rows", "a", told)
    made = page(tmp_path, title=EVIL, about=EVIL, home=(EVIL, EVIL))
    assert made.tags.count("script") == 1 and "img" not in made.tags
    assert not [name for name in made.attributes if name.startswith("on")]
    assert not [link for link in made.links if not link.startswith(("rows", "</script>"))]
    assert made.texts.count(EVIL) >= 10                              # it is all there, as text


def test_the_page_runs_its_own_program_only_and_asks_nothing_of_anyone(tmp_path):
    put(tmp_path / "rows", "a", row())
    text = leaderboard(tmp_path / "rows", tmp_path / "site").read_text(encoding="utf-8")
    script, = re.findall("<script>(.*?)</script>", text, re.S)
    seal = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy, = re.findall('Content-Security-Policy" content="(.*?)"', text)
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{seal}';" in policy
    assert not re.findall(r"""(?:src|@import|url\()\s*=?["'\s]*(?:https?:)?//""", text)


@pytest.mark.parametrize("address, link", [
    ("https://a.org/few.safetensors", "https://a.org/few.safetensors"), ("//a.org/few", None), ("/etc/passwd", None),
    ("hf://me/digits@v1/few.safetensors", "https://huggingface.co/datasets/me/digits/blob/v1/few.safetensors"),
    ("../few.safetensors", None), ("vbscript:x", None), ("few\0.safetensors", None), ("gone.safetensors", None)])
def test_addresses_of_sets(tmp_path, address, link):
    (tmp_path / "few.safetensors").write_text("outside the folder of rows")
    told = row()
    put(tmp_path / "rows", "a", told | {"set": told["set"] | {"file": address}})
    made = page(tmp_path)
    assert sorted({*made.links} - {"rows.json", "rows/a.json"}) == [link] * bool(link)


def test_a_set_that_lies_beside_its_row_comes_along_if_it_is_that_set(tmp_path):
    rows, told = tmp_path / "rows", row()
    put(rows, "mine/results/a", told | {"set": told["set"] | {"file": "../a set.safetensors"}})
    (rows / "mine" / "card.json").write_text("{}")                   # a published folder: rows are in results/
    (rows / "mine" / "a set.safetensors").write_text("a set")
    with pytest.raises(BrokenFile, match="a.json' names '../a set.safetensors' with sha256 aaaa"): page(tmp_path)
    sha256 = sha256_of(rows / "mine" / "a set.safetensors")
    put(rows, "mine/results/a", told | {"set": told["set"] | {"file": "../a set.safetensors", "sha256": sha256}})
    assert "rows/mine/a%20set.safetensors" in page(tmp_path).links
    assert (tmp_path / "site/rows/mine/a set.safetensors").read_text() == "a set"
    assert not (tmp_path / "site/rows/mine/card.json").exists()


def test_settings_of_any_shape_are_shown(tmp_path):
    odd = row(training={"objective": "plain"}, student={}, attack={"attacks": "all", "is": None}, paper={"of": [1, {}]})
    odd["set"] = odd["set"] | {"method": {"is": ["a", 1], "of": {"is": {}}}, "source": {}}
    put(tmp_path / "rows", "a", odd)
    assert page(tmp_path).told("rank", "student", "training", "attack") == [("1", "student", "plain", "None")]


# Folders

def test_what_is_no_row_is_refused_by_name_and_nothing_is_written(tmp_path):
    put(tmp_path / "rows", "a", row())
    for text, why in (("{", "it is not JSON"), ("[]", "is not of type 'object'"), ("{}", "is a required property"),
                      (json.dumps(row() | {"rob": row()["rob"] | {"mean": 2}}), "greater than the maximum"),
                      (json.dumps(row(eps=float("nan"))), "NaN or infinity")):
        (tmp_path / "rows" / "odd.json").write_text(text)
        with pytest.raises(BrokenFile, match=f"odd.json' is no row.*{why}"): page(tmp_path)
    assert not (tmp_path / "site").exists()


def test_folders_without_rows(tmp_path):
    with pytest.raises(MissingData, match="there is no folder"): page(tmp_path)
    (tmp_path / "rows").mkdir()
    with pytest.raises(MissingData, match="there are no rows in"): page(tmp_path)
    with pytest.raises(BadArgument, match="out must be another folder"): leaderboard(tmp_path, tmp_path)


def test_same_rows_same_bytes_in_whatever_order_they_are_found(tmp_path, monkeypatch):
    for n in range(12): put(tmp_path / "rows", f"{n % 3}/{n}", row(5 * n, f"M{n % 5}", ipc=1 + n % 2), n % 4 == 0)
    sites = [leaderboard(tmp_path / "rows", tmp_path / "one").parent]
    real = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed([*real(self, pattern)]))
    sites.append(leaderboard(tmp_path / "rows", tmp_path / "two").parent)
    first, second = ({p.relative_to(s): p.read_bytes() for p in sorted(s.glob("**/*")) if p.is_file()} for s in sites)
    assert first == second and len(first) == 2 + 12 + 3


def test_a_page_within_the_folder_of_rows_or_beside_it_and_the_same_row_twice(tmp_path):
    for name in ("rows/a", "rows/b/a"): put(tmp_path, name, row())
    for out in ("site", "rows/site"):
        for _ in range(2): assert len(Reader(leaderboard(tmp_path / "rows", tmp_path / out)).told("rank")) == 1
    assert json.loads((tmp_path / "site" / "rows.json").read_text()) == [json.loads(json.dumps(row()))]


def test_a_page_is_not_put_among_other_things(tmp_path):
    put(tmp_path, "rows/a", row())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(BadArgument, match="holds other things than a leaderboard"):
        leaderboard(tmp_path / "rows", tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


# In a browser

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Two data sets, two radii, two budgets, two objectives; references, a doubt, a proof."
    folder = tmp_path_factory.mktemp("board")
    methods = (("Herding", 90), ("DM", 88), ("Random", 50), ("DC", 40), ("DistributionMatching", 10))
    for ipc in (1, 10):
        for train in ("Standard", "Adversarial"):
            for method, alive in methods:
                put(folder / "rows", f"{method}-{ipc}-{train}", row(alive, method, ipc, train))
    put(folder / "rows", "whole", row(95, None, 100))
    put(folder / "rows", "doubt", row(60, "Craig", 10, doubts=["zero_gradients"], proven=share([np.arange(100) < 5])))
    put(folder / "rows", "far", row(5, "DM", 10, eps=.3))
    put(folder / "rows", "clothes", row(5, "<b>DM</b>", 10, data="clothes"))
    return leaderboard(folder / "rows", folder / "site", "Toys").parent


@pytest.fixture(scope="module")
def address(site):
    with served(site) as address: yield address


@pytest.fixture
def visit(browser, address):
    "`visit(**settings)` opens the page; an error, or a request to anywhere else, fails the test."
    opened, wrong = [], []

    def asked(request):
        if not request.url.startswith((address, "data:")): wrong.append(f"asks for {request.url}")

    def go(at="", **settings):
        context = browser.new_context(**({"viewport": {"width": 1400, "height": 900}} | settings))
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", asked)
        page.on("response", lambda r: r.status < 400 or wrong.append(f"{r.status}: {r.url}"))
        page.goto(f"{address}index.html{at}")
        return page
    yield go
    for context in opened: context.close()
    assert not wrong


def keep(page, name):
    "A picture of the page, for whoever names a folder."
    if folder := os.environ.get("RDD_SHOTS"): page.screenshot(path=Path(folder) / f"leaderboard.{name}.png")


def shown(page, *columns):
    "What stands in some columns of the rows that can be seen."
    lines = page.eval_on_selector_all("tbody tr[data-order]", """rows => rows.filter(r => r.checkVisibility())
        .map(r => [...r.cells].map(c => c.innerText.split('\\n')[0].trim()))""")
    names = [name for name, *_ in COLUMNS]
    return [tuple(line[names.index(c)].split(" ")[0] for c in columns) for line in lines]


@full
def test_tabs_choose_data_set_threat_and_budget(visit):
    page = visit()
    def chosen():
        return page.eval_on_selector_all("[role=tab][aria-selected=true]", "tabs => tabs.map(t => t.innerText)")
    assert chosen() == ["clothes", "ℓ∞ 0.1", "10"] and shown(page, "method") == [("<b>DM</b>",)]
    page.get_by_role("tab", name="digits").click()
    assert chosen() == ["digits", "ℓ∞ 0.1", "10"] and len(shown(page, "method")) == 12
    page.get_by_role("tab", name="1", exact=True).click()
    assert chosen() == ["digits", "ℓ∞ 0.1", "1"] and len(shown(page, "method")) == 11
    page.get_by_role("tab", name="ℓ∞ 0.3").click()
    assert chosen() == ["digits", "ℓ∞ 0.3", "10"] and shown(page, "rank", "method") == [("1", "DM")]
    page.keyboard.press("ArrowLeft")                                 # the focus is on the tab that was chosen
    assert chosen()[1] == "ℓ∞ 0.1"
    page.reload()
    assert chosen()[:2] == ["digits", "ℓ∞ 0.1"]                      # the address says which table it is


@full
def test_ranks_are_shown_and_sorting_goes_both_ways_by_keyboard(visit):
    page = visit()
    page.get_by_role("tab", name="digits").click()
    first = shown(page, "rank", "method")
    assert first[:5] == [("1", "Herding"), ("1", "DM"), ("–", "Random"), ("3", "DC"), ("4", "DistributionMatching")]
    assert first[5:7] == [("–", "all"), ("1", "Herding")] and ("3", "Craig") in first
    heading = page.locator("section:visible th", has_text="robust %")
    button = page.get_by_role("button", name="robust %")
    button.focus()
    page.keyboard.press("Enter")
    down = [float(v) for v, in shown(page, "robust %")]
    assert heading.get_attribute("aria-sort") == "descending" and down == sorted(down, reverse=True)
    page.keyboard.press("Space")
    up = [float(v) for v, in shown(page, "robust %")]
    assert heading.get_attribute("aria-sort") == "ascending" and up == down[::-1]
    assert page.locator("section:visible [aria-sort]").count() == 1
    page.get_by_role("button", name="proven %").click()
    assert [v for v, in shown(page, "proven %")] == ["5.0"] + ["–"] * 11          # what is absent comes last
    page.get_by_role("button", name="method").first.click()
    names = [name for name, in shown(page, "method")]
    assert names == sorted(names, key=str.lower)
    page.get_by_role("button", name="rank").click()
    assert shown(page, "rank", "method") == first
    keep(page, "sorted")


@full
def test_filters_leave_the_rows_that_fit(visit):
    page = visit()
    page.get_by_role("tab", name="digits").click()
    page.get_by_label("Filter").fill("herding ADV")
    assert shown(page, "method", "training") == [("Herding", "adversarial")]
    assert page.locator(".filters p").inner_text() == "1 of 12 rows"
    page.get_by_label("Filter").fill("")
    page.get_by_label("Training").select_option("standard")
    assert {v for v, in shown(page, "training")} == {"standard"} and len(shown(page, "rank")) == 7
    assert page.get_by_label("Student").count() == 0 or not page.get_by_label("Student").is_visible()   # one student
    page.get_by_role("button", name="clean %").click()
    assert len(shown(page, "rank")) == 7
    page.get_by_role("tab", name="1", exact=True).click()
    assert {v for v, in shown(page, "training")} == {"standard"}


@full
def test_details_open_and_close(visit):
    page = visit()
    page.get_by_role("tab", name="digits").click()
    page.get_by_role("button", name="DC", exact=True).first.click()
    details = page.locator("[popover]:popover-open")
    assert "behind Herding, DM" in details.inner_text() and "a" * 64 in details.inner_text()
    keep(page, "details")
    page.keyboard.press("Escape")
    assert details.count() == 0


@full
def test_light_dark_and_on_a_phone(visit):
    def ground(page):
        "Brightness of the page, 0 ... 765."
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))
    at = "#/t2-digits-linf-0.1-10"
    light, dark = (visit(at, color_scheme=scheme) for scheme in ("light", "dark"))
    assert ground(dark) < 150 < 700 < ground(light)
    box = light.locator(".scroll:visible")
    assert box.evaluate("box => box.scrollWidth <= box.clientWidth"), "the table is wider than a desk"
    keep(light, "light")
    keep(dark, "dark")
    phone = visit(at, viewport={"width": 390, "height": 844})
    wide, screen = phone.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert wide <= screen == 390
    inside = "names => names.every(n => n.offsetWidth <= n.closest('th').clientWidth)"
    assert phone.eval_on_selector_all("section:not([hidden]) .name", inside), "a name runs out of its column"
    keep(phone, "phone")
    phone.locator("section:visible .name").nth(1).click()
    box = phone.locator("[popover]:popover-open").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    keep(phone, "phone.details")


@full
def test_without_javascript_all_tables_are_there(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("section:visible").count() == 4 and not page.locator(".filters").is_visible()
