"""Compiles Triton kernels for GPUs that are not there (ptxas comes with triton)."""

import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)
INTEGERS = {
    "tokens",
    "limit",
    "groups",
    "fan_in",
    "per_split",
    "split_size",
    "first",
    "row",
    "inputs",
    "padded",
    "neurons",
}


def compile_for(kernel, types, constants, target, warps=4, unit=(), aligned=True, floats=()):
    """The compiled kernel. `types`: of its pointers, in order; strides named in `unit` are 1, arguments named in
    `floats` float32, other integers any multiple of 16 (or any number, where not `aligned`)."""
    names = kernel.arg_names
    signature, attributes = {}, {}
    constants = constants | dict.fromkeys(unit, 1)
    pointers = iter(types)
    for i, name in enumerate(names):
        if name.endswith("_ptr"):
            kind = next(pointers)
            if kind is None:
                signature[name], constants[name] = "constexpr", None
                continue
            signature[name] = f"*{kind}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in constants:
            signature[name] = "constexpr"
        elif name in floats:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})


def resources(compiled, target):
    """(registers of a thread, bytes spilled, bytes of shared memory)."""
    suffix = "a" if target >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        command = [get_ptxas(target).path, "-v", f"--gpu-name=sm_{target}{suffix}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return int(re.findall(r"Used (\d+) registers", said)[0]), spilled, compiled.metadata.shared
