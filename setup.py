"""Builds the C++ and CUDA core with CMake. pyproject.toml says what the package is.

Environment: DDMD_NATIVE=ON|OFF (OFF: no compiler is needed; plain torch and Triton serve every op),
DDMD_CUDA=AUTO|ON|OFF, TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def setting(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """An environment variable's value, upper case; ends the build where it is none of the allowed ones."""
    value = os.environ.get(name, default).upper()
    if value not in allowed:
        sys.exit(f"{name} is {value}; allowed are {', '.join(allowed)}")
    return value


def cuda_architectures() -> list[str]:
    """CMake's CUDA architectures for TORCH_CUDA_ARCH_LIST."""
    entries = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(",", ";").replace(" ", ";").split(";")
    architectures = []
    for entry in filter(None, entries):
        number = entry.removesuffix("+PTX").replace(".", "")
        architectures.append(number if entry.endswith("+PTX") else f"{number}-real")
    return architectures


class CMakeBuild(build_ext):
    """One CMake project for the one extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve() / "cmake"
        # pip builds in an environment that is gone afterwards. What CMake remembers of it (ninja, pybind11)
        # must not outlive it; objects are kept.
        shutil.rmtree(folder / "CMakeFiles" / "pkgRedirects", ignore_errors=True)
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        options = [
            "-DDDMD_PYTHON=ON",
            f"-DDDMD_CUDA={setting('DDMD_CUDA', 'AUTO', ('AUTO', 'ON', 'OFF'))}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        if cuda_architectures():
            options.append(f"-DDDMD_CUDA_ARCHITECTURES={';'.join(cuda_architectures())}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        source = Path(__file__).resolve().parent
        for command in (
            ["cmake", "-G", "Ninja", str(source), *options],
            ["cmake", "--build", ".", "--target", "_C", "-j", jobs],
        ):
            try:
                subprocess.run(command, cwd=folder, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                sys.exit(
                    f"the C++ core could not be built ({error}); install a C++17 compiler, or build without "
                    "it: DDMD_NATIVE=OFF pip install ."
                )


native = setting("DDMD_NATIVE", "ON", ("ON", "OFF")) == "ON"
setup(ext_modules=[Extension("ddmd._C", sources=[])] if native else [], cmdclass={"build_ext": CMakeBuild})
