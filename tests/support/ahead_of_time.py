"""Triton kernels compiled for GPUs that need not be there. Scripts import this first: it turns the interpreter off."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPTIONS = ("num_warps", "num_stages")
SHARED_MEMORY = {"sm_75": 64, "sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of a program


def compile(
    name: str, kernel: triton.JITFunction, signature: Mapping[str, str], constants: Mapping[str, object]
) -> str:
    """Compile a kernel for an architecture, such as "sm_90" or "gfx942".

    Args:
        signature: the types of its arguments. Pointers and integers are multiples of 16.
        constants: the values of the others, and the options.

    Returns:
        Its assembly.

    Raises:
        AssertionError: it spills registers, needs more shared memory than there is, or would overflow an offset into a
            matrix at 2**31.
    """
    on_amd = name.startswith("gfx")
    target = GPUTarget("hip", name, 64) if on_amd else GPUTarget("cuda", int(name[3:]), 32)
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(full.values()) if t == "i32" or t[0] == "*"}
    source = ASTSource(
        kernel,
        full,
        {(i,): constants.get(k) for i, k in enumerate(kernel.arg_names) if full[k] == "constexpr"},
        divisible,
    )
    options = {option: constants[option] for option in OPTIONS if option in constants}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["hsaco" if on_amd else "cubin"]
    assembly: str = compiled.asm["amdgcn" if on_amd else "ptx"]
    spilled = spills_on_amd(assembly) if on_amd else stack(compiled.asm["cubin"])
    assert spilled == 0, f"{kernel.__name__} for {name} spills {spilled}: {dict(constants)}"
    assert compiled.metadata.shared <= SHARED_MEMORY[name] * 1024, f"{kernel.__name__} for {name}: {dict(constants)}"
    assert not short_offsets(compiled.asm["ttir"]), f"{kernel.__name__}: {short_offsets(compiled.asm['ttir'])}"
    return assembly


def stack(cubin: bytes) -> int:
    """Return the bytes of memory that a kernel keeps registers in."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", said)))


def spills_on_amd(assembly: str) -> int:
    """Return the number of registers that a kernel spills."""
    return sum(map(int, re.findall(r"\.[sv]gpr_spill_count: +(\d+)", assembly)))


def short_offsets(ttir: str) -> list[str]:
    """Return the additions of 32-bit offsets to pointers into matrices, but for constants and offsets within a row."""
    added = re.findall(r"tt\.addptr (%\w+), (%\w+) : tensor<\d+x\d+x!tt.ptr<\w+>>, tensor<\d+x\d+xi32>", ttir)
    within_rows = re.findall(r"(%\w+) = tt\.broadcast %\w+ : tensor<1x\d+xi32>", ttir)
    return [offset for _, offset in added if offset not in within_rows and not offset.startswith("%cst")]


def wide_accesses(assembly: str) -> tuple[int, int]:
    """Return the number of instructions that load 16 bytes of global memory for each thread, and that store as many."""
    loads = r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\.shared\.global.*0x10,|_load_dwordx4"
    stores = r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64|_store_dwordx4"
    return len(re.findall(loads, assembly)), len(re.findall(stores, assembly))
