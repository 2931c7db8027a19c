"""Registers, spills and shared memory of the CUDA kernels, as the assembler reports them.

`compile` stands before nvcc in the build (CMAKE_CUDA_COMPILER_LAUNCHER) and keeps what ptxas says
beside the object. `report` gathers that into a JSON file and fails where a kernel spills registers,
which would cost it a multiple of its time.

    python bench/ptxas.py compile nvcc ... -o linear.cu.o
    python bench/ptxas.py report build/cuda bench/results/cuda-ptxas.json
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

Kernels = dict[str, dict[str, dict[str, int]]]  # architecture -> kernel -> what it uses

SUFFIX = ".ptxas"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
NAME = re.compile(r"\d([a-z_]+_kernel)(I(?:L[a-z]\d+E)+E)?")


def kernel_name(mangled: str) -> str:
    """`linear_few_kernel<4>` of a kernel's symbol; the symbol where it looks otherwise."""
    found = NAME.search(mangled)
    if not found:
        return mangled
    values = re.findall(r"L[a-z](\d+)E", found[2] or "")
    return found[1] + (f"<{', '.join(values)}>" if values else "")


def parse(log: str) -> Kernels:
    """Reads what `nvcc -Xptxas -v` says of the kernels of one file.

    Args:
        log: Its error output.

    Returns:
        Bytes and registers of every kernel, by architecture.
    """
    kernels: Kernels = {}
    uses: dict[str, int] = {}
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            uses = kernels.setdefault(entry[2], {}).setdefault(kernel_name(entry[1]), {})
        elif stack := STACK.search(line):
            names = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
            uses.update(zip(names, map(int, stack.groups()), strict=True))
        elif registers := REGISTERS.search(line):
            shared = SHARED.search(line)
            uses["registers"] = int(registers[1])
            uses["shared_bytes"] = int(shared[1]) if shared else 0
    return kernels


def gather(logs: list[str]) -> Kernels:
    """The kernels of several files, sorted."""
    together: Kernels = {}
    for log in logs:
        for arch, kernels in parse(log).items():
            together.setdefault(arch, {}).update(kernels)
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(together.items())}


def spilling(kernels: Kernels) -> list[str]:
    """Names the kernels that keep registers in memory."""
    return [
        f"{name} ({arch}) spills {uses['spill_store_bytes']} bytes"
        for arch, all_uses in kernels.items()
        for name, uses in all_uses.items()
        if uses["spill_store_bytes"] + uses["spill_load_bytes"] > 0
    ]


def compile_file(command: list[str]) -> int:
    """Runs the compiler; ptxas' lines go to a file beside the object, others are passed on."""
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    chatter = re.compile(r"^(ptxas info|\s+\d+ bytes (stack frame|gmem))")
    lines = run.stderr.splitlines(keepends=True)
    sys.stderr.write("".join(line for line in lines if not chatter.match(line)))
    if run.returncode == 0 and "-o" in command and ENTRY.search(run.stderr):
        Path(command[command.index("-o") + 1] + SUFFIX).write_text(run.stderr)
    return run.returncode


def report(build: Path, out: Path) -> int:
    """Writes the report of a build folder; 1 where a kernel spills or there is none."""
    kernels = gather([path.read_text() for path in sorted(build.rglob("*" + SUFFIX))])
    if not kernels:
        print(f"{build}: no CUDA kernels have been compiled there", file=sys.stderr)
        return 1
    out.write_text(json.dumps(kernels, indent=2) + "\n")
    for line in spilling(kernels):
        print(line, file=sys.stderr)
    most = max(uses["registers"] for all_uses in kernels.values() for uses in all_uses.values())
    count = sum(map(len, kernels.values()))
    print(f"{count} kernels for {', '.join(kernels)}: at most {most} registers; {out}")
    return 1 if spilling(kernels) else 0


def main(arguments: list[str]) -> int:
    """Runs the command that the first argument names."""
    if arguments[:1] == ["compile"]:
        return compile_file(arguments[1:])
    if arguments[:1] == ["report"] and len(arguments) == 3:
        return report(Path(arguments[1]), Path(arguments[2]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
