"""Builds the C++ and CUDA core with CMake. What the package is stands in pyproject.toml.

Environment: DDMD_CUDA=AUTO|ON|OFF, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), MAX_JOBS.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def architectures() -> list[str]:
    """CMake's CUDA architectures for TORCH_CUDA_ARCH_LIST."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";")
    found = []
    for entry in filter(None, listed.split(";")):
        number = entry.removesuffix("+PTX").replace(".", "")
        found.append(number if entry.endswith("+PTX") else f"{number}-real")
    return found


class CMakeBuild(build_ext):
    """One CMake project for the one extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        folder.mkdir(parents=True, exist_ok=True)
        options = [
            "-DDDMD_PYTHON=ON",
            f"-DDDMD_CUDA={os.environ.get('DDMD_CUDA', 'AUTO')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        if architectures():
            options.append(f"-DDDMD_CUDA_ARCHITECTURES={';'.join(architectures())}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        source = Path(__file__).resolve().parent
        subprocess.run(["cmake", "-G", "Ninja", str(source), *options], cwd=folder, check=True)
        subprocess.run(["cmake", "--build", ".", "--target", "_C", "-j", jobs], cwd=folder, check=True)


setup(ext_modules=[Extension("ddmd._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
