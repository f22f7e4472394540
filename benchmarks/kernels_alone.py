"""What `kernels.py` measures in a process of its own: the first result of a formula, and memory.

    python benchmarks/kernels_alone.py first pullback      seconds to the first result and gradient
    python benchmarks/kernels_alone.py memory pullback     a million columns and a block of rows, then the reverse

Prints one line of JSON.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kernels_cases import GAUSSIAN, gaussian_aliases, points, weights
from torch import Tensor

MODULES = {"pullback": "pullback", "pykeops": "pykeops.torch"}


def first(library: Any) -> dict[str, float]:
    """Seconds from the text of a formula to its value and to its gradient in x, the library imported already."""
    x, y, b = points(0, 1000, 3).clone().requires_grad_(), points(1, 1000, 3), weights(1000)
    torch.autograd.grad((x * 2).sum(), x)  # torch's own first backward
    start = time.perf_counter()
    out = library.Genred(GAUSSIAN, gaussian_aliases(3), reduction_op="Sum", axis=1)(x, y, b)
    forward = time.perf_counter() - start
    torch.autograd.grad(out.sum(), x)
    return {"forward": forward, "both": time.perf_counter() - start}


def status(name: str) -> int:
    """A line of /proc/self/status in bytes, such as VmRSS and VmHWM."""
    line = next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def memory(library: Any, block: int = 20_000) -> dict[str, float]:
    """Peak bytes beyond inputs and outputs for M = N = 1e6, D = 3, in two runs whose sum bounds the whole.

    One block of rows meets all columns, which shows what grows with N (and is timed); all rows meet one block of
    columns, which shows what grows with M. `clear_refs` resets the high-water mark before each run.
    """
    n = 1_000_000
    f = library.Genred(GAUSSIAN, gaussian_aliases(3), reduction_op="Sum", axis=1)
    x, y, b = points(0, n, 3), points(1, n, 3), weights(n)
    found: dict[str, float] = {}

    def forward(x: Tensor, y: Tensor, b: Tensor) -> list[Tensor]:
        return [f(x, y, b)]

    def both(x: Tensor, y: Tensor, b: Tensor) -> list[Tensor]:
        out, g = f(x.requires_grad_(), y, b), torch.ones(len(x), 1)
        return [out, g, *torch.autograd.grad(out, x, g)]

    for task, call in (("forward", forward), ("fwd+grad x", both)):
        call(x[:3000].clone(), y[:3000].clone(), b[:3000].clone())  # compiled, libraries loaded
        for name, rows, columns in (("columns", block, n), ("rows", n, block)):
            args = x[:rows].clone(), y[:columns].clone(), b[:columns].clone()
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what comes
            Path("/proc/self/clear_refs").write_text("5")
            before, start = status("VmRSS"), time.perf_counter()
            results = call(*args)
            if name == "columns":
                found[f"{task} seconds"] = (time.perf_counter() - start) * n / block
            found[f"{task} {name}"] = status("VmHWM") - before - sum(t.nbytes for t in results)
            del results
    return found


def main() -> None:
    task, name, *rest = sys.argv[1:]
    torch.set_num_threads(2)
    library = importlib.import_module(MODULES[name])
    options = {"block": int(rest[0])} if rest else {}
    print("JSON" + json.dumps({"first": first, "memory": memory}[task](library, **options)))


if __name__ == "__main__":
    main()
