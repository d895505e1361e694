"""Compiles the C files when Meadow is installed from source. Without a compiler the installation still succeeds.

`MEADOW_BUILD=portable` compiles for the common levels of x86-64, to run on other machines; the default is this processor.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from meadow.native.build import BUILT, build_all, to_build  # noqa: E402


class BuildWithNative(build_py):
    """Puts the libraries next to the C files: in the checkout for an editable install, else in the wheel."""

    def run(self) -> None:
        super().run()
        home = ROOT if self.editable_mode else Path(self.build_lib)
        chosen = to_build(portable=os.environ.get("MEADOW_BUILD") == "portable")
        for reason in build_all(home / "meadow" / "native" / BUILT, chosen):
            print(f"not compiled: {reason}; Meadow uses NumPy and torch instead", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python on this platform: the libraries do not depend on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = False  # otherwise the platform is "any"
        platform = str(super().get_tag()[2])
        self.root_is_pure = True  # so that the wheel holds `meadow/` itself
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel})
