"""Compiles every Triton kernel in every configuration for one architecture and prints what was found as JSON.

usage: python triton_compiler.py 90
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mtl_kernels.triton_kernels import combine, gram, min_norm, pcgrad, problem, state

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    **dict.fromkeys(("pointers", "segments", "chunks", "slots", "rng"), "*i64"),
    **dict.fromkeys(("partials", "gram", "grams", "weights", "certificates", "scratch", "keeps", "gains"), "*fp64"),
    **dict.fromkeys(("num_tasks", "num_params", "active_stride", "max_iters", "trim", "num_states"), "i32"),
    "active": "*u8",
    "tolerance": "i64",
    "epsilon_bits": "i64",
}
TASKS = (2, 8, 16, 32, 64, 128)
_FEW = (8, 32, 128)


def kernels(arch: int) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Kind, function, constants and options of every kernel, each once; those of every size for sm_90 alone."""
    for num_tasks in TASKS if arch == 90 else _FEW:
        for code in range(4):
            shape = gram.configuration(num_tasks, code, arch >= 100)
            yield "gram", gram._partials_kernel, gram.constants(shape, code), gram.options(shape)
        yield "sums", gram._sums_kernel, gram.sum_constants(shape), {"num_warps": gram.SUM_WARPS}
    for num_tasks in (2, 4, 8) if arch == 90 else (8,):
        columns = combine.configuration(num_tasks)
        for code in range(4):
            for epilogue in ((code, False), ((code + 1) % 4, True)):
                constants = combine.constants(columns, code, *epilogue)
                yield "combine", combine._combine_kernel, constants, {"num_warps": columns.warps}
    for operation, num_tasks in ((combine.LEAKY_GRADDROP.value, 8), (combine.TRIMMED_MEAN.value, 17)):
        columns = combine.configuration(num_tasks, operation)
        for code in (0, 2):
            constants = combine.constants(columns, code, operation=operation)
            yield "columns", combine._combine_kernel, constants, {"num_warps": columns.warps}
    for row_code, code in ((0, 0), (2, 0)):
        for operation in range(2):
            yield "state", state._state_kernel, state.constants(row_code, code, operation), {"num_warps": state.WARPS}
    for num_tasks in (8, 32, 128):
        tasks, rows, warps = problem.configuration(num_tasks)
        constants = {"TASKS": tasks, "ROWS": rows, "HAS_ACTIVE": True}
        yield "pcgrad", pcgrad._pcgrad_kernel, {**constants, "RANDOM": True, "MEAN": True}, {"num_warps": warps}
        for frank_wolfe in (False, True):
            all_constants = {**constants, "FRANK_WOLFE": frank_wolfe}
            yield "min_norm", min_norm._min_norm_kernel, all_constants, {"num_warps": warps}


def _bytes_a_thread(constants: dict[str, Any], warps: int) -> int:
    """What a thread loads of one tile of rows."""
    elements = constants.get("TASKS", 1) * constants.get("SPLIT", 1) * constants.get("BLOCK", 0)
    return int(elements * constants.get("ITEMSIZE", 0) // (32 * warps))


def inspect(kind: str, function: Any, constants: dict[str, Any], options: dict[str, int], arch: int) -> dict[str, Any]:
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    cubin = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = subprocess.run(
            [CUOBJDUMP, "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "kind": kind,
        "constants": constants,
        "bytes_a_thread": _bytes_a_thread(constants, options["num_warps"]),
        "cubin": len(cubin),
        "registers": int(re.findall(r"\bREG:(\d+)", code)[0]),
        "spilled": int(re.findall(r"\bSTACK:(\d+)", code)[0]),
        "wide_loads": len(re.findall(r"\bLDG(?:STS)?\.E\S*\.128", code)),
        "wide_stores": len(re.findall(r"\bSTG\.E\S*\.128", code)),
    }


if __name__ == "__main__":
    arch = int(sys.argv[1])
    print(json.dumps([inspect(*kernel, arch) for kernel in kernels(arch)]))
