"The site: `make docs` prepares its sources (prepare.py) and builds it. Name, version and address: settings.ini."
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS / "extensions"), str(DOCS.parent)]
from site_map import SETTINGS, pages  # noqa: E402

project = SETTINGS["title"]
author = SETTINGS["author"]
copyright = SETTINGS["copyright"]
version = release = SETTINGS["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton", "sphinx_design",
              "docments", "names", "formulas"]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "deflist", "dollarmath", "linkify"]
myst_heading_anchors = 4
myst_linkify_fuzzy_links = False
suppress_warnings = ["myst.header"]           # a notebook may go from # to ###
html_math_renderer = "drawn"                  # see extensions/formulas.py

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"special-members": "__call__"}
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = project
html_baseurl = f"{SETTINGS['doc_host']}{SETTINGS['doc_baseurl']}/"
html_static_path = [str(DOCS / "static")]
html_css_files = ["site.css"]
html_favicon = str(DOCS / "static" / "favicon.svg")
html_sidebars = {"**": ["sidebar-nav-bs"]} | dict.fromkeys(("results", "benchmarks", "contributing", "changelog"), [])
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "navigation_depth": 3,
    "show_toc_level": 2,
    "header_links_before_dropdown": 5,
    "navigation_with_keys": True,
    "use_edit_page_button": True,
    "secondary_sidebar_items": ["page-toc", "edit-this-page"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "icon_links": [{"name": "GitHub", "url": SETTINGS["git_url"], "icon": "fa-brands fa-github"}],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark"}
# What can be edited is the notebook in nbs/, never the prepared page.
_edited = {f"{page.doc}.ipynb": page.source for page in pages()}
_edited |= {f"api/{page.module}.rst": page.source for page in pages() if page.module}
_edited |= {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "index.md": "docs/index.md"}
_edited |= {f"learn/{name}.md": f"docs/{name}.md" for name in ("own", "clusters")}
_edited |= {f"{name}/index.md": f"docs/{name}.md" for name in ("learn", "papers", "api")}
html_context = {"edited": _edited, "default_mode": "auto", "edit_page_provider_name": "GitHub",
                "edit_page_url_template": SETTINGS["git_url"] + "/edit/" + SETTINGS["branch"]
                + "/{{ edited.get(file_name, 'docs/site_map.py') }}"}


def link_to_board(app, name, template, context, doctree):
    "The leaderboard in the header, as it is reached from this page; Sphinx does not know it as a page."
    context["theme_external_links"] = [{"name": "Leaderboard", "url": context["pathto"]("leaderboard/index.html", 1)}]


def setup(app):
    "What prepare.py put there stands on the site as it is: the leaderboard."
    app.config.html_extra_path = [str(Path(app.srcdir) / "extra")]
    app.connect("html-page-context", link_to_board)
