"""The fused multiply-adds that this machine does in a second: independent chains in registers, on several threads."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time

import llvmlite.binding as llvm
import numpy as np

_CHAINS = 12  # latency (4 or 5 cycles) times ports (2), and some


def _text(lanes: int) -> str:
    """x_k <- x_k a + c, n times, in _CHAINS vectors."""
    kind, ptr = f"<{lanes} x float>", "ptr %p, align 4"
    chains = range(_CHAINS)
    fma = f"@llvm.fma.v{lanes}f32"
    lines = [
        f"declare {kind} {fma}({kind}, {kind}, {kind})",
        "define void @chains(ptr %p, i64 %n) {",
        "entry:",
        f"  %a = load {kind}, {ptr}",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [0, %entry], [%next, %loop]",
        *(f"  %x{k} = phi {kind} [%a, %entry], [%y{k}, %loop]" for k in chains),
        *(f"  %y{k} = call {kind} {fma}({kind} %x{k}, {kind} %a, {kind} %a)" for k in chains),
        "  %next = add i64 %i, 1",
        "  %more = icmp ult i64 %next, %n",
        "  br i1 %more, label %loop, label %done",
        "done:",
        *(f"  %s{k} = fadd {kind} {f'%s{k - 1}' if k > 1 else '%y0'}, %y{k}" for k in chains if k),
        f"  store {kind} %s{_CHAINS - 1}, {ptr}",
        "  ret void",
        "}",
    ]
    return "\n".join(lines)


class Peak:
    """Measures again at each `measure`, so that it can be spread over a benchmark; `best` is the largest so far, and
    the share of the median in it, `steady`, tells how quiet the machine was.

    Args:
        threads: how many run at once.
        n: iterations of one measurement, about 10 ms.
    """

    def __init__(self, threads: int, n: int = 3_000_000) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        features = llvm.get_host_cpu_features()
        self.lanes = 16 if features.get("avx512f") else 8
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=features.flatten() + ",-prefer-256-bit", opt=3
        )
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(_text(self.lanes)), machine)
        self._engine.finalize_object()
        address = self._engine.get_function_address("chains")
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(address)
        self.threads, self.n, self._rates = threads, n, list[float]()

    def measure(self) -> float:
        """Multiply-adds of single numbers in a second, by all threads together (two flops each)."""
        buffers = [np.zeros(self.lanes, np.float32) for _ in range(self.threads)]
        workers = [threading.Thread(target=self._run, args=(b.ctypes.data, self.n)) for b in buffers]
        start = time.perf_counter()
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        rate = self.threads * self.n * _CHAINS * self.lanes / (time.perf_counter() - start)
        self._rates.append(rate)
        return rate

    @property
    def best(self) -> float:
        """The largest rate so far."""
        return max(self._rates)

    @property
    def steady(self) -> float:
        """Median by maximum."""
        return statistics.median(self._rates) / self.best
