"""Triton functions of kernels, and which precision, how many processors and which tile a device asks for.

Triton is imported when a program first runs. It keeps its compiled code on disk itself (`TRITON_CACHE_DIR`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import linecache
import threading
from functools import lru_cache
from typing import Any

import torch

from pullback.kernels.codegen import triton as codegen
from pullback.kernels.codegen.triton import Kernel
from pullback.kernels.ir.reductions import REDUCTIONS

POINTERS = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}

_lock = threading.Lock()
_functions: dict[Kernel, Any] = {}


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def function(kernel: Kernel) -> Any:
    """The kernel as a Triton function, made once."""
    with _lock:
        made = _functions.get(kernel)
        if made is None:
            made = _functions[kernel] = _function(kernel)
        return made


def _function(kernel: Kernel) -> Any:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    text = codegen.render(kernel)
    name = f"<pullback triton {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)  # Triton reads the source of functions
    space: dict[str, Any] = {"triton": triton, "tl": tl, "libdevice": libdevice, "__name__": __name__}
    exec(compile(text, name, "exec", dont_inherit=True), space)
    numbers = [k for k, t in codegen.arguments(kernel).items() if t != "*"]
    return triton.jit(do_not_specialize=numbers)(space["kernel"])


def work_type(kernel: Kernel) -> torch.dtype:
    """What parts leave in memory."""
    return torch.float64 if kernel.elem == "float64" or kernel.sink.total else torch.float32


def compiled(kernel: Kernel, target: Any) -> Any:
    """The kernel compiled for a `GPUTarget`, which need not be at hand; Triton's object.

    Pointers are taken to be multiples of 16, as torch allocates them.
    """
    import triton
    from triton.compiler import ASTSource

    dtype = getattr(torch, kernel.data)
    out = torch.int64 if REDUCTIONS[kernel.program.kind].integer else dtype
    types = {"out": POINTERS[out], "work": POINTERS[work_type(kernel)]}
    types |= dict.fromkeys(("blocks", "spans", "numbers"), "i64")
    signature = {
        k: f"*{types.get(k, POINTERS[dtype])}" if t == "*" else t for k, t in codegen.arguments(kernel).items()
    }
    aligned = {(k,): [["tt.divisibility", 16]] for k, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(function(kernel), signature, attrs=aligned)
    tile = kernel.tile
    return triton.compile(source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages})


def precision(data: str) -> str:
    """How float32 numbers are multiplied in products of matrices.

    "tf32x3", whose error is that of float32, unless torch is told otherwise for its own products:
    `torch.backends.cuda.matmul.fp32_precision = "tf32"` (or `allow_tf32 = True`, or
    `torch.set_float32_matmul_precision("high")`) asks for tf32, with 11 significant bits; "ieee" for no tensor cores.
    AMD's matrix units take float32 as it is.
    """
    if data != "float32":
        return "ieee"
    asked = torch.backends.cuda.matmul.fp32_precision
    if torch.version.hip is not None:
        return "ieee"
    return asked if asked in ("tf32", "ieee") else "tf32x3"


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; asking does not wait for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """The name under which choices for a device are kept."""
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return getattr(found, "gcnArchName", "") or f"{found.name} sm_{found.major}{found.minor}"


@lru_cache(maxsize=64)
def family(device: torch.device) -> str:
    """The line of the table of tiles that a device reads."""
    if torch.version.hip is not None:
        return "gfx"
    old = device.type == "cuda" and torch.cuda.get_device_properties(device).major < 9
    return "sm_80" if old else "sm_90"
