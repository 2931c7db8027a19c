"""Builds deinfer._C by driving CMake; everything else is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs the `cpu` preset; editable installs share its tree with the C++ tests."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension into its place in the package."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if self.editable_mode or self.inplace:
            build, output, options = ROOT / "build" / "cpu", ROOT / "python" / "deinfer", []
        else:
            build, output = Path(self.build_temp).resolve(), target.parent
            options = ["-DDEINFER_TESTS=OFF", "-DDEINFER_BENCH=OFF", "-DDEINFER_WERROR=OFF"]
        options += [
            f"-DDEINFER_PYTHON_OUTPUT_DIR={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        subprocess.run(["cmake", "--preset", "cpu", "-B", build, *options], cwd=ROOT, check=True)
        subprocess.run(["cmake", "--build", build, "--target", "_C"], cwd=ROOT, check=True)
        if output != target.parent:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(output / target.name, target)


setup(
    ext_modules=[Extension("deinfer._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
