"""pyproject.toml describes the package. This file adds one thing: a wheel has configs/, as quadriga/configs.

An editable installation does not need it: `quadriga configs` finds those of the checkout.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        for file in () if self.editable_mode else sorted(Path("configs").glob("*/*")):
            target = Path(self.build_lib, "quadriga", file)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
