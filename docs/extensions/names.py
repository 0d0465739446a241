"""`names` in notebooks and docstrings lead to the reference, where only one thing is called so."""
import re
from collections import defaultdict
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.nodes import make_refnode
import rdd_lib


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
    return {end: min(names) for end, names in found.items() if len(names) == 1}


def is_word(text):
    "`kept` or `made` may be a setting or a column as well as a function; `kept(...)`, and what all know, may not."
    return text.isalpha() and text.islower() and text not in rdd_lib.__all__


class Names(SphinxPostTransform):
    default_priority = 5

    def run(self, **kwargs):
        domain = self.env.domains.python_domain
        names, here = known(domain.objects), self.env.docname
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, (nodes.reference, nodes.title)) or literal.get("classes"): continue
            text = literal.astext()
            full = names.get(re.sub(r"\(.*\)$", "", text).removeprefix("rdd."))
            if not full or is_word(text): continue
            entry = domain.objects[full]
            link = make_refnode(self.app.builder, here, entry.docname, entry.node_id, literal.deepcopy(), full)
            literal.replace_self(link)


def setup(app):
    app.add_post_transform(Names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
