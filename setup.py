"""Builds deinfer._C by driving CMake; everything else is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs the `cpu` preset; in-place builds share its tree with the C++ tests."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension into its place in the package."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = [f"-DDEINFER_PYTHON_OUTPUT_DIR={output}", f"-DPython_EXECUTABLE={sys.executable}"]
        if self.inplace:
            build = ROOT / "build" / "cpu"
        else:
            build = Path(self.build_temp).resolve()
            options += ["-DDEINFER_TESTS=OFF", "-DDEINFER_WERROR=OFF"]
        subprocess.run(["cmake", "--preset", "cpu", "-B", build, *options], cwd=ROOT, check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C"], cwd=ROOT, check=True)


setup(
    ext_modules=[Extension("deinfer._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
