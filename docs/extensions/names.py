"""`names` in notebooks and docstrings lead to the reference, where only one thing is called so."""
import re
from collections import defaultdict
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode

# Words of the text and of the shell that are functions as well.
WORDS = {"main", "number", "check"}


def ends(name, kind):
    "What may stand for a full name: `attacks.pgd.PGD`, `pgd.PGD`, `PGD`; a method with its class, a module with a dot."
    parts = name.removeprefix("rdd_lib.").split(".")
    least = {"method": 2, "property": 2, "attribute": 2, "module": 2}.get(kind, 1)
    for n in range(least, len(parts) + 1): yield ".".join(parts[-n:])
    yield name


def known(objects):
    "Every end of a name that belongs to one object only."
    found = defaultdict(set)
    for name, entry in objects.items():
        for end in ends(name, entry.objtype): found[end].add(name)
    return {end: min(names) for end, names in found.items() if len(names) == 1 and end not in WORDS}


class Names(SphinxPostTransform):
    default_priority = 5

    def run(self, **kwargs):
        domain = self.env.domains.python_domain
        names, here = known(domain.objects), self.env.docname
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, (nodes.reference, nodes.title)) or literal.get("classes"): continue
            full = names.get(re.sub(r"\(.*\)$", "", literal.astext()).removeprefix("rdd."))
            if not full: continue
            entry = domain.objects[full]
            link = make_refnode(self.app.builder, here, entry.docname, entry.node_id, literal.deepcopy(), full)
            literal.replace_self(link)


def setup(app):
    app.add_post_transform(Names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
