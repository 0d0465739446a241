"Everything about the package is said once, in settings.ini; this hands it to hatchling."
import re
from configparser import ConfigParser
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

STATUS = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}


def absolute(readme: str, repo: str, branch: str) -> str:
    "Pictures and links of the README, which are relative to the repository, with whole addresses."
    raw = repo.replace("https://github.com", "https://raw.githubusercontent.com")
    readme = re.sub(r"(!\[[^]]*\]\()(?!\w+:)", rf"\1{raw}/{branch}/", readme)
    return re.sub(r"(\]\()(?!\w+:|#)", rf"\1{repo}/blob/{branch}/", readme)


def extras(cfg) -> dict[str, list[str]]:
    "extra -> requirements: `<extra>_requirements` in settings.ini; `all` is what can be installed side by side."
    ends = "_requirements"
    found = {key.removesuffix(ends): cfg[key].split() for key in cfg if key.endswith(ends)}
    beside = [found[name] for name in cfg["all_extras"].split()]
    return found | {"all": sorted(sum(beside, []))}


class FromSettings(MetadataHookInterface):
    def update(self, metadata):
        root = Path(self.root)
        ini = ConfigParser(delimiters=["="])
        ini.read(root / "settings.ini", encoding="utf-8")
        cfg = ini["DEFAULT"]
        repo, site = cfg["git_url"], cfg["doc_host"] + cfg["doc_baseurl"]
        readme = (root / "README.md").read_text(encoding="utf-8")
        metadata.update({
            "version": cfg["version"],
            "description": cfg["description"],
            "readme": {"content-type": "text/markdown", "text": absolute(readme, repo, cfg["branch"])},
            "license": "Apache-2.0",
            "license-files": ["LICENSE"],
            "authors": [{"name": cfg["author"], "email": cfg["author_email"]}],
            "keywords": cfg["keywords"].split(),
            "requires-python": f">={cfg['min_python']}",
            "classifiers": [
                f"Development Status :: {STATUS[cfg['status']]}",
                f"Intended Audience :: {cfg['audience']}",
                *(f"Programming Language :: Python :: {version}" for version in ("3", *cfg["pythons"].split())),
                "Framework :: Jupyter",
                "Topic :: Scientific/Engineering :: Artificial Intelligence",
                "Typing :: Typed"],
            "urls": {"Documentation": f"{site}/", "Source": repo, "Issues": f"{repo}/issues",
                     "Changelog": f"{repo}/blob/{cfg['branch']}/CHANGELOG.md"},
            "dependencies": cfg["requirements"].split(),
            "optional-dependencies": extras(cfg),
            "scripts": dict(line.split("=", 1) for line in cfg["console_scripts"].split()),
        })
