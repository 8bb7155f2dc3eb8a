"""The one part of the build that pyproject.toml cannot say: the compiled CPU kernels, which may fail to compile.

Decision: they are optional. Without a C++ compiler the installation succeeds and the torch implementations serve.
"""

import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("kernels/cpu")
BUILD = runpy.run_path(str(FOLDER / "build.py"))


class ParallelBuild(build_ext):
    """Compiles the sources of an extension side by side; each of them takes long, and they are few."""

    def build_extension(self, ext: Extension) -> None:
        def compiled(source: str) -> list[str]:
            return self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=ext.extra_compile_args, depends=ext.depends
            )

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [name for names in pool.map(compiled, ext.sources) for name in names]
        ext.sources = []
        super().build_extension(ext)  # links


setup(
    ext_modules=[
        Extension(
            "modelport.kernels.cpu._lib",
            sources=[str(FOLDER / name) for name in BUILD["SOURCES"]],
            depends=[str(FOLDER / name) for name in BUILD["HEADERS"]],
            extra_link_args=BUILD["LINK_ARGS"],
            extra_compile_args=[*BUILD["COMPILE_ARGS"], "-g0"],  # Python asks for debug symbols, ten times the code
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
