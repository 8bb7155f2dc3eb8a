"""How the CPU kernels are compiled; ``python -m modelport.kernels.cpu.build`` builds them in place.

``--emulate`` adds a variant for tests that spells sixteen lanes and bf16 dot products in AVX2.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = [
    "module.cpp",
    "pool.cpp",
    "tape.cpp",
    "variant_portable.cpp",
    "variant_avx2.cpp",
    "variant_avx512.cpp",
    "variant_avx512bf16.cpp",
    "variant_emulated.cpp",
]  # fmt: skip
HEADERS = [
    "kernels.h",
    "tape.h",
    "simd.h",
    "rows.inc",
    "draw.inc",
    "logprobs.inc",
    "rope.inc",
    "matrix.inc",
    "linear.inc",
    "attention.inc",
    "moe.inc",
    "lora.inc",
    "ssm.inc",
    "variant.inc",
]  # fmt: skip
COMPILE_ARGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti",
                "-fvisibility=hidden", "-Wno-psabi", "-pthread"]  # fmt: skip
LINK_ARGS = ["-pthread"]


def main(arguments: list[str]) -> int:
    here = Path(__file__).parent
    compiler = sysconfig.get_config_var("CXX") or "c++"
    extra = ["-DMODELPORT_EMULATE"] if "--emulate" in arguments else []
    flags = [*COMPILE_ARGS, *extra, "-fPIC", "-I" + sysconfig.get_path("include")]
    objects = here / "build"
    objects.mkdir(exist_ok=True)
    jobs = []
    for source in SOURCES:
        made = objects / (source + ".o")
        jobs.append((made, subprocess.Popen([*compiler.split(), *flags, "-c", str(here / source), "-o", str(made)])))
    if any(job.wait() for _, job in jobs):
        return 1
    target = here / "_lib.abi3.so"
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link = [*compiler.split(), "-shared", *LINK_ARGS, *undefined, *(str(made) for made, _ in jobs), "-o", str(target)]
    code = subprocess.call(link)
    for made, _ in jobs:
        made.unlink()
    objects.rmdir()
    print(f"built {target}" if not code else "link failed")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
