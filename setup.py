"""Builds the compiled library with CMake and Ninja; without a C++ compiler, installs pure Python and says so.

Environment: SACCADE_CUDA=AUTO|ON|OFF, SACCADE_CUDA_ARCHS="80-real;89-real;90a-real", MAX_JOBS.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
import backend

ROOT = Path(__file__).parent


def torch_dir() -> Path:
    """The torch package, found by path: pip hides an installed torch from `import` in an isolated build, and only its
    headers and libraries are needed, which every torch >= 2.10 can stand in for."""
    torch = backend.find_torch()
    if torch is None:
        sys.exit("saccade: torch >= 2.10 is needed to build; install it first (pip install torch), then saccade")
    return torch


def run(command: list[object]) -> None:
    """Run a build step; its own output tells what is wrong, so no traceback is added."""
    if subprocess.run([*map(str, command)]).returncode != 0:
        sys.exit(f"saccade: the build failed in `{' '.join(map(str, command[:3]))} ...`; the messages above say why")


class CMakeBuild(build_ext):
    """Runs CMake; the outcome is `_C.so`, or `_no_binary.txt` with the reason."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        (target / "_no_binary.txt").unlink(missing_ok=True)
        cuda = os.environ.get("SACCADE_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            sys.exit(f"saccade: SACCADE_CUDA: expected AUTO, ON or OFF, got {cuda}")
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            if cuda == "ON":
                sys.exit("saccade: SACCADE_CUDA=ON, but there is no C++ compiler")
            (target / "_no_binary.txt").write_text("no C++ compiler was found when saccade was installed\n")
            (target / "_C.so").unlink(missing_ok=True)
            self.warn(
                "no C++ compiler: saccade installs as pure Python (reference and Triton kernels, no CPU or CUDA kernels)"
            )
            return
        build = ROOT / "build" / "cmake"
        options = {"SACCADE_CUDA": cuda, "TORCH_DIR": torch_dir(), "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target}
        if archs := os.environ.get("SACCADE_CUDA_ARCHS"):
            options["SACCADE_CUDA_ARCHS"] = archs
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
        run(configure)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run(["cmake", "--build", build, "--parallel", jobs])
        cache = (build / "CMakeCache.txt").read_text()
        if cuda == "OFF" or not re.search(r"^CMAKE_CUDA_COMPILER:\w+=/", cache, re.MULTILINE):
            self.warn(
                "saccade was built without CUDA kernels (no nvcc, or SACCADE_CUDA=OFF): CPU and Triton kernels remain"
            )

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python symbols inside, so no Python tag


class AnyPythonWheel(bdist_wheel):
    """The library serves every Python 3: tag the wheel py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages("python"), "saccade._triton"],
    package_dir={"": "python", "saccade._triton": "kernels/triton"},
    package_data={"saccade": ["_schemas.inc", "py.typed"]},
    ext_modules=[Extension("saccade._C", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
