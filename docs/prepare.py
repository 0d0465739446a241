"""Writes the sources of the site: `prepare.py FOLDER` makes a page of every notebook and every module.

Notebooks are shown as they are stored, nothing is run. What only nbdev reads is left out, code of the library is
folded, links are turned to pages of the site or to the repository on GitHub."""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote
import rdd_lib
from rdd_lib.sharing.leaderboard import leaderboard
from site_map import (ON_COLAB, ON_GITHUB, PAPERS, ROOT, SETTINGS, WINGS, Links, constants, folder_of, pages, public,
                      wing_of)

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "extensions"))
from docments import as_rst  # noqa: E402

LONGEST = 60                                   # characters of a constant's value, where it is shown
COLAB = "https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/{path}"
FOLDED = {"parameters": "Parameters of this page", "injected-parameters": "Parameters of this run",
          "imports": "Imports", "export": "Code of the library"}
ABOUT_BOARD = ("What methods of the library reach on 4,000 real digits (mnist5k), at 1 and 10 images a class: two "
               "students each, a small MLP that trains for 1,000 steps, judged by 300 test images. So few images "
               "tell only large differences apart. docs/leaderboard/make.py made the rows; DM had far fewer "
               "iterations than in its paper.")
STORIES = "Questions that go across the library, asked and answered in one go."


class Folder:
    "Where the sources are written."
    def __init__(self, path): self.path = Path(path)

    def put(self, name, data):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


# Notebooks

def only_imports(source):
    lines = [line for line in source.splitlines() if line.strip()]
    return bool(lines) and all(re.match(r"(from|import) |    ", line) for line in lines)


def code_cell(cell):
    "A cell of code without nbdev's directives and with what hides or folds it; None: nothing to show."
    source = "".join(cell["source"])
    directives = set(re.findall(r"^#\| *(\w+)", source, re.M))
    body = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
    if directives & {"default_exp", "hide"} or not body.strip() and not cell["outputs"]: return None
    tags, told = cell["metadata"].get("tags", []), {}
    if "export" in directives: tags = [*tags, "export"]
    elif only_imports(body): tags = [*tags, "imports"]
    prompt = next((FOLDED[tag] for tag in tags if tag in FOLDED), "")
    if prompt: told = {"tags": ["hide-input"], "mystnb": {f"code_prompt_{way}": prompt for way in ("show", "hide")}}
    if re.search(r"^#\| *echo: *false", source, re.M): told = {"tags": ["remove-input"]}
    return cell | {"source": body, "metadata": told}


def markdown(text): return {"cell_type": "markdown", "metadata": {}, "source": text}


def ways(page, links):
    "The line beneath a promise: what ran, the module, where to run it."
    told = []
    if page.profile:
        told.append(f"Executed in profile `{page.profile}` ([the record]({ON_GITHUB.format('blob', page.shown)}))")
    elif page.source.startswith("nbs/papers/"): told.append("Not run yet: this is the page before its run")
    if page.module and public(page.module):
        told.append(f"Module [`{page.module}`]({links.to_doc(f'api/{page.module}', page.doc)})")
    if page.source in ON_COLAB:
        place = {name: SETTINGS[name] for name in ("user", "repo", "branch")}
        told.append(f"[Open in Colab]({COLAB.format(path=quote(page.source), **place)})")
    return "{.ways}\n" + " · ".join(told) if told else ""


def head(text, page, links):
    "Title and promise, what can be done with the page, and a picture of the result: then the rest of the first cell."
    opening, rest = re.match(r"(# [^\n]+\n+> [^\n]+\n*)(.*)", text, re.S).groups()
    if page.doc == "learn/start": opening = opening.replace("# rdd_lib", "# Getting started", 1)
    parts = [opening.strip(), ways(page, links)]
    if page.pictures:
        parts.append(f"![{page.opening[0]}]({links.to_picture(page.pictures[0], page.doc)})")
    return [markdown(part) for part in (*parts, rest.strip()) if part]


def notebook(page, links):
    "A notebook as a page of the site."
    base, cells = str(Path(page.shown).parent), []
    for cell in page.cells:
        if cell["cell_type"] == "code": cells.append(code_cell(cell))
        elif cell["cell_type"] == "markdown":
            text = links.in_text("".join(cell["source"]), base, page.doc)
            first = not any(c and c["cell_type"] == "markdown" for c in cells)
            cells += head(text, page, links) if first else [markdown(text)]
    shown = [cell | {"id": f"cell-{n}"} for n, cell in enumerate(filter(None, cells))]
    told = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}
    nb = {"cells": shown, "metadata": told, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(nb, ensure_ascii=False, sort_keys=True)


# Lists of pages

def toctree(entries): return "\n".join([":::{toctree}", ":hidden:", "", *entries, ":::"])


def card(title, doc, text, picture=None):
    lines = [f"::::{{grid-item-card}} {title}", f":link: {doc}", ":link-type: doc"]
    if picture: lines += [f":img-top: {picture}", f":img-alt: {title}"]
    return "\n".join([*lines, "", text, "::::"])


def grid(cards, columns):
    return "\n".join([f":::::{{grid}} {columns}", ":gutter: 3", ":padding: 0", "", *cards, ":::::"])


def listed(found, of, links):
    "Notebooks with their promises, as a list."
    lines = []
    for page in found:
        title, promise = page.opening
        text = links.in_text(promise, str(Path(page.shown).parent), of)
        lines.append(f"[{title}]({links.to_doc(page.doc, of)})\n: {text}\n")
    return "\n".join(lines)


def learn(out, found, links):
    "A page for each wing, and one for all."
    cards, entries = [], ["start", "99_face", "own", "clusters"]
    for wing, blurb in (WINGS | {"stories": STORIES}).items():
        folder = f"learn/{folder_of(wing)}"
        own = [p for p in found if p.doc.startswith(f"{folder}/")]
        out.put(f"{folder}/index.md", "\n\n".join([f"# {wing.capitalize()}", f"> {blurb}",
                                                   listed(own, f"{folder}/index", links),
                                                   toctree(Path(p.doc).name for p in own)]))
        cards.append(card(wing.capitalize(), f"/{folder}/index", blurb))
        entries.append(f"{folder_of(wing)}/index")
    text = (DOCS / "learn.md").read_text(encoding="utf-8")
    out.put("learn/index.md", "\n\n".join([text, grid(cards, "1 2 2 3"), toctree(entries)]))
    guides(out, links)


def guides(out, links):
    "The pages about things of one's own, with the package that it shows, and about clusters."
    for name in ("own", "clusters"):
        text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        out.put(f"learn/{name}.md", links.in_text(text, "docs", f"learn/{name}"))
    for name in ("own_package.py", "pyproject.toml"):
        out.put(f"learn/own_package/{name}", (DOCS / "own_package" / name).read_bytes())


def pictured(title, page, doc, text, of, links):
    "A card with the picture of a page, if it has one."
    picture = links.to_picture(page.pictures[0], of) if page.pictures else None
    return card(title, f"/{doc}", text, picture)


def papers(out, found, links):
    "A page for each paper, with pictures, and one for all."
    lists = []
    for paper, (title, blurb, best) in PAPERS.items():
        doc = f"papers/{paper}/index"
        own = {Path(p.doc).name: p for p in found if p.doc.startswith(f"papers/{paper}/")}
        cards = [pictured(p.opening[0], p, p.doc, p.opening[1], doc, links) for p in own.values()]
        out.put(f"{doc}.md", "\n\n".join([f"# {title}", f"> {blurb}", grid(cards, "1 2 2 2"), toctree(own)]))
        lists.append(pictured(title, own[best], doc, blurb, "papers/index", links))
    text = (DOCS / "papers.md").read_text(encoding="utf-8")
    out.put("papers/index.md", "\n\n".join([text, grid(lists, "1 2 2 2"), toctree(f"{p}/index" for p in PAPERS)]))


# The reference

def constant(name, value, comment):
    lines = [f".. py:data:: {name}"]
    if len(value) <= LONGEST: lines.append(f"   :value: {value}")
    return "\n".join([*lines, "", f"   {as_rst(comment)}", ""])


def module_page(page):
    title = page.module
    told = f"From the notebook :doc:`{page.opening[0].replace('`', '')} </{page.doc}>`."
    text = f"{title}\n{'=' * len(title)}\n\n.. automodule:: rdd_lib.{title}\n   :members:\n\n   {told}\n\n"
    found = [constant(*told) for told in constants(title)]
    if not found: return text
    return text + "\n".join([".. rubric:: Constants", "", f".. py:currentmodule:: rdd_lib.{title}", "", *found])


def face():
    "What `import rdd_lib as rdd` has, by the modules that have it."
    homes = defaultdict(list)
    for name, module in rdd_lib._HOME.items(): homes[module].append(f"{{py:obj}}`{name} <rdd_lib.{module}.{name}>`")
    return "\n".join(f"- [{module}](/api/{module}.rst): {', '.join(names)}" for module, names in homes.items())


def api(out, found, links):
    "A page for each module that shows something, and lists of them."
    modules = [p for p in found if p.module and p.module not in ("__init__", "__main__") and public(p.module)]
    for page in modules: out.put(f"api/{page.module}.rst", module_page(page))
    cards = []
    for wing, blurb in WINGS.items():
        own = [p for p in modules if wing_of(p.source) == wing]
        rows = [f"[`{p.module}`]({p.module}.rst)\n: {p.opening[1]}\n" for p in own]
        out.put(f"api/{folder_of(wing)}.md", "\n\n".join([f"# {wing.capitalize()}", f"> {blurb}", "\n".join(rows),
                                                         toctree(p.module for p in own)]))
        cards.append(card(wing.capitalize(), f"/api/{folder_of(wing)}", blurb))
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    text = text.replace("% wings %", grid(cards, "1 2 2 3")).replace("% face %", face())
    out.put("api/index.md", "\n\n".join([text, toctree(map(folder_of, WINGS))]))


def board(out):
    "The leaderboard, made of the rows in docs/leaderboard; it stands on the site as it is."
    rows = DOCS / "leaderboard" / "rows"
    leaderboard(rows, out.path / "extra" / "leaderboard", "Leaderboard", ABOUT_BOARD, ("../index.html", "← rdd_lib"))


def prepare(folder):
    "Everything. The pages, and what was turned."
    out, found = Folder(folder), pages()
    links = Links(found)
    links.suffix |= {f"api/{page.module}": ".rst" for page in found if page.module}
    for page in found: out.put(f"{page.doc}.ipynb", notebook(page, links))
    learn(out, found, links)
    papers(out, found, links)
    api(out, found, links)
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        out.put(f"{name.lower()}.md", links.in_text(text, ".", name.lower()))
    landing = (DOCS / "index.md").read_text(encoding="utf-8")
    out.put("index.md", links.in_text(landing, "docs", "index"))
    for path in links.pictures: out.put(f"pictures/{path}", (ROOT / path).read_bytes())
    board(out)
    return found, links


if __name__ == "__main__":
    found, links = prepare(sys.argv[1])
    if links.lost: sys.exit("links that lead nowhere:\n  " + "\n  ".join(links.lost))
    print(f"{len(found)} notebooks are pages in {sys.argv[1]}")
