"""Compiles the C files when Meadow is installed from source. An installation never fails for want of a compiler.

`MEADOW_BUILD=portable`: for the levels of x86-64 that many processors have, for what runs on another machine than it is
built on. Else for this processor.
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
    """Leaves the libraries beside the C files: in the checkout if it is installed editable, else in the wheel."""

    def run(self) -> None:
        super().run()
        home = ROOT if self.editable_mode else Path(self.build_lib)
        chosen = to_build(portable=os.environ.get("MEADOW_BUILD") == "portable")
        for reason in build_all(home / "meadow" / "native" / BUILT, chosen):
            print(f"not compiled: {reason}; NumPy and torch do its work", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """A wheel for any Python of this platform: the libraries know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = False  # else the platform is "any"
        platform = str(super().get_tag()[2])
        self.root_is_pure = True  # so that the wheel holds `meadow/` itself
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel})
