"""The pages that are made from notebooks: `readme.py` writes them all, `readme.py PAGE` prints one."""
import json
import os
import re
import sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"


def told(notebook, page):
    "A notebook as Markdown, with its links as they are from `page`."
    nb = nbformat.read(NBS / notebook, 4)
    nb.metadata["language_info"] = {"name": "python"}
    nb.cells = [cell for cell in nb.cells if not cell.source.startswith("#| hide")]      # what only tests need
    for cell in nb.cells:
        cell.source = cell.source.removeprefix("#| slow\n")                               # for nbdev_test
        if cell.source.startswith("#| echo: false"):                                      # the table, not its making
            cell.metadata["transient"] = {"remove_source": True}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    return re.sub(r"\]\((?!https?:|#)([^)]*)\)", lambda link: f"]({moved(link[1], page)})", text)


def moved(link, page):
    "A link that starts from nbs/, from the folder of `page`."
    return os.path.relpath(os.path.normpath(Path("nbs") / link), Path(page).parent)


def opening(path):
    "Title and promise of a notebook."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    title, promise = re.match(r"# ([^\n]+)\n+> ([^\n]+)", first).groups()
    return title, promise


def the_map():
    "All notebooks in the order of reading, each with its promise."
    lines = ["# The notebooks", "", "One notebook, one module, and a decade of numbers a wing: the order of reading. "
             "Stories and the pages of papers define no module."]
    paths = [p for p in NBS.rglob("[!.]*.ipynb") if not p.parent.name.startswith(".")]
    folders = {p.parent for p in paths}
    first = {folder: min(p.name for p in paths if p.parent == folder) for folder in folders}
    for folder in sorted(folders, key=lambda f: ("papers" in f.parts, first[f], f.as_posix())):
        name = "the ground, and the doors" if folder == NBS else folder.relative_to(NBS).as_posix()
        lines += ["", f"## {name}", "", "| notebook | |", "|---|---|"]
        for path in sorted((p for p in paths if p.parent == folder), key=lambda p: (p.stem.split("_")[0], p.stem)):
            title, promise = opening(path)
            stop = "" if title[-1] in "?)" else "."
            lines.append(f"| [{path.stem}]({path.relative_to(NBS).as_posix()}) | **{title}{stop}** {promise} |")
    return "\n".join(lines)


PAGES = {"README.md": lambda: told("index.ipynb", "README.md"),
         "benchmarks/README.md": lambda: told("benchmarks.ipynb", "benchmarks/README.md"),
         "nbs/README.md": the_map}


def page(name):
    "The text of one page."
    return "\n".join(line.rstrip() for line in PAGES[name]().splitlines()).strip() + "\n"


if __name__ == "__main__":
    if sys.argv[1:]: sys.stdout.write(page(sys.argv[1]))
    else:
        for name in PAGES: (ROOT / name).write_text(page(name), encoding="utf-8")
