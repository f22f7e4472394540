"""LLVM text -> machine code in this process, once for each Plan; object code is kept on disk.

A disk entry is named by the hash of everything that it depends on (text, CPU, features, versions) and carries a
checksum: a truncated or foreign file is compiled again. It is written under a temporary name and renamed, so that
processes may race.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pullback.kernels.codegen.llvm import Module, generate
from pullback.kernels.plan.schedule import Plan, Target

_MAGIC = b"pullback-object-1\n"
KEPT_KERNELS = 2048  # compiled plans kept in memory
_lock = threading.RLock()
_kernels: dict[Plan, Kernel] = {}
override: list[Target] = []  # targets asked for by `use_target`

# Targets that tests ask for by name; "x86-64" is what every 64-bit x86 has.
TARGETS = {
    "x86-64": Target("x86-64", "", 16, 16, False, False),
    "haswell": Target("haswell", "", 32, 16, True, False),
    "skylake-avx512": Target("skylake-avx512", "-prefer-256-bit", 64, 32, True, True),
}


@dataclass(frozen=True)
class Kernel:
    """Compiled functions of a plan.

    Args:
        worker: (arguments, scratch) -> None, releases the GIL.
        merge: (arguments) -> None, or None.
        module: text and memory needs.
        tracker: keeps the code loaded.
    """

    worker: Any
    merge: Any
    module: Module
    tracker: Any


def _reset() -> None:
    """Another thread may have held the lock when the process was forked."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)


@lru_cache(maxsize=1)
def _llvm() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    return llvm


@lru_cache(maxsize=1)
def host() -> Target:
    """The CPU that this process runs on."""
    llvm = _llvm()
    features = llvm.get_host_cpu_features()
    cpu = llvm.get_host_cpu_name()
    if platform.machine().lower() in ("arm64", "aarch64"):
        return Target(cpu, features.flatten(), 16, 32, True, False)
    text = features.flatten()
    if all(features.get(f) for f in ("avx512f", "avx512dq", "avx512bw", "avx512vl")):
        return Target(cpu, text + ",-prefer-256-bit", 64, 32, True, True)
    if features.get("avx2") and features.get("fma"):
        return Target(cpu, text, 32, 16, True, False)
    return Target(cpu, text, 16, 16, False, False)


def current() -> Target:
    """The CPU to generate for: the host unless `use_target` says otherwise."""
    return override[-1] if override else host()


def runs_here(name: str) -> bool:
    """Whether this CPU has all that a target of TARGETS has."""
    target, here = TARGETS[name], host()
    same = platform.machine().lower() in ("x86_64", "amd64")
    return same and target.width <= here.width and (here.fma or not target.fma)


@contextlib.contextmanager
def use_target(name: str) -> Iterator[None]:
    """Generate for another CPU, which this one must be able to run; for tests, in all threads."""
    override.append(TARGETS[name])
    try:
        yield
    finally:
        override.pop()


@lru_cache(maxsize=8)
def _machine(target: Target) -> Any:
    llvm = _llvm()
    triple = llvm.Target.from_triple(llvm.get_process_triple())
    reloc = "default" if sys.platform == "win32" else "pic"
    return triple.create_target_machine(
        cpu=target.cpu, features=target.features, opt=2, reloc=reloc, codemodel="default"
    )


@lru_cache(maxsize=1)
def _jit() -> Any:
    # The older linker places code and constants apart and aborts the process where they come to lie 2 GB apart.
    return _llvm().create_lljit_compiler(use_jit_link=True)


def kernel(plan: Plan) -> Kernel:
    """The compiled plan, from memory, disk or the compiler."""
    found = _kernels.get(plan)
    if found is None:
        with _lock:
            found = _kernels.get(plan)
            if found is None:
                if len(_kernels) >= KEPT_KERNELS:  # the oldest; calls that are prepared keep theirs
                    _kernels.pop(next(iter(_kernels)))
                found = _kernels[plan] = _build(plan)
    return found


def _build(plan: Plan) -> Kernel:
    module = generate(plan)
    llvm = _llvm()
    name = _key(module.text, plan.target)
    code = _read(name)
    if code is None:
        code = _machine(plan.target).emit_object(optimised(module.text, plan.target))
        _write(name, code)
    library = f"pullback-{next(_numbers)}"
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process().export_symbol("worker")
    if module.merges:
        builder.export_symbol("merge")
    tracker = builder.link(_jit(), library)
    worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(tracker["worker"])
    merge = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(tracker["merge"]) if module.merges else None
    return Kernel(worker, merge, module, tracker)


_numbers = itertools.count()


def optimised(text: str, target: Target) -> Any:
    """The module after the few passes that this straight code needs."""
    llvm = _llvm()
    module = llvm.parse_assembly(text)
    machine = _machine(target)
    module.triple, module.data_layout = llvm.get_process_triple(), str(machine.target_data)
    passes = llvm.create_new_function_pass_manager()
    passes.add_sroa_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    for function in module.functions:
        if not function.is_declaration:
            passes.run(function, builder)
    return module


def assembly(plan: Plan) -> str:
    """The assembly of a plan."""
    return str(_machine(plan.target).emit_assembly(optimised(generate(plan).text, plan.target)))


# Disk --------------------------------------------------------------------------------------------------------------


ENTRIES = 4096  # of the cache on disk, 10 to 50 KB each


def cache_folder() -> Path:
    """PULLBACK_CACHE, or a folder of the user's cache."""
    if folder := os.environ.get("PULLBACK_CACHE"):
        return Path(folder)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "pullback"


def _key(text: str, target: Target) -> str:
    import llvmlite

    versions = (llvmlite.__version__, _llvm().llvm_version_info, _llvm().get_process_triple())
    return hashlib.sha256(repr((text, target, versions)).encode()).hexdigest()


def _read(name: str) -> bytes | None:
    try:
        data = (cache_folder() / f"{name}.o").read_bytes()
    except (OSError, RuntimeError):  # no such file, no right to read, no home
        return None
    start = len(_MAGIC) + 32
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(data[start:]).digest() != data[len(_MAGIC) : start]:
        return None
    return data[start:]


def _write(name: str, code: bytes) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(code).digest() + code)
            Path(temporary).replace(folder / f"{name}.o")
        except OSError:
            Path(temporary).unlink(missing_ok=True)
        if name.startswith("00"):  # names are hashes: one write in 256
            _prune(folder)


def _prune(folder: Path) -> None:
    """Remove the oldest entries beyond ENTRIES."""
    entries = [(p.stat().st_mtime, p) for p in folder.glob("*.o")]
    for _, path in sorted(entries)[:-ENTRIES]:
        path.unlink(missing_ok=True)
