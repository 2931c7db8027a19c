"""Builds deinfer._C and libdeinfer by driving CMake; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def run(*command: object) -> None:
    """Run a command in the source tree; it must succeed."""
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


class CMakeBuild(build_ext):
    """Runs the `cpu` preset.

    Editable installs share its tree with the C++ tests and find the library there. A wheel brings
    the library, its headers and its CMake files, for C++ hosts, beside the module. Where the
    building Python has torch, both bring torch's custom ops (`deinfer.torch_ops`).
    DEINFER_BUILD_DIR names a configured tree whose objects a wheel is to be made of.
    """

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension into its place in the package."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        package = target.parent
        python = f"-DPython_EXECUTABLE={sys.executable}"
        if self.editable_mode or self.inplace:
            build = ROOT / "build" / "cpu"
            source = ROOT / "python" / "deinfer"
            output = f"-DDEINFER_PYTHON_OUTPUT_DIR={source}"
            run("cmake", "--preset", "cpu", "-B", build, output, python)
            run("cmake", "--build", build, "--target", "deinfer_python")
            if package != source:  # where setuptools looks for what it has asked for
                package.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / target.name, target)
            return
        if reused := os.environ.get("DEINFER_BUILD_DIR"):
            build = Path(reused).resolve()
        else:
            build = Path(self.build_temp).resolve()
            options = [f"-DDEINFER_{name}=OFF" for name in ("TESTS", "BENCH", "WERROR")]
            output = f"-DDEINFER_PYTHON_OUTPUT_DIR={build / 'python'}"
            run("cmake", "--preset", "cpu", "-B", build, output, python, *options)
        run("cmake", "--build", build, "--target", "deinfer_python", "deinfer")
        for component in ("deinfer", "python"):
            run("cmake", "--install", build, "--component", component, "--prefix", package)


setup(
    ext_modules=[Extension("deinfer._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
