"""What pyproject.toml cannot say: the recipes go into the package, and PyPI's page gets absolute links."""

import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").glob("*/*.yaml"))


class BuildWithRecipes(build_py):
    """Copy `recipes/` to `trl_vpo/recipes`. An editable install finds them at the top of the checkout."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        shutil.rmtree(self._target(Path("recipes")), ignore_errors=True)  # of an earlier build
        for path in RECIPES:
            self.mkpath(str(self._target(path).parent))
            self.copy_file(str(ROOT / path), str(self._target(path)))

    def _target(self, path):
        return Path(self.build_lib, "trl_vpo", path)

    def get_source_files(self):  # of the sdist
        return [*super().get_source_files(), *map(str, RECIPES)]

    def get_outputs(self, include_bytecode=True):
        recipes = [] if self.editable_mode else [str(self._target(path)) for path in RECIPES]
        return [*super().get_outputs(include_bytecode), *recipes]


def readme():
    """Return README.md with its relative links and pictures as those of this version's tag."""
    repository = PROJECT["urls"]["Repository"]
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def absolute(link):
        page = f"{raw}/v{PROJECT['version']}" if link[1] else f"{repository}/blob/v{PROJECT['version']}"
        return f"{link[1]}[{link[2]}]({page}/{link[3]})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)", absolute, text)


setup(
    cmdclass={"build_py": BuildWithRecipes}, long_description=readme(), long_description_content_type="text/markdown"
)
