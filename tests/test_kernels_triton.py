"""Reductions by Triton: in its interpreter against the definition, and compiled for GPUs that need not be at hand.

Triton reads TRITON_INTERPRET when it is imported, so what needs Triton runs in processes of its own: the functions
`check_*` below, by `python test_kernels_triton.py NAME`.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_kernels_llvm import PROGRAMS, S3, close, data, definition, gaussian, sqdist, x_, y_

from pullback.kernels.codegen import eager, triton_sinks, triton_values
from pullback.kernels.codegen import triton as codegen
from pullback.kernels.codegen.triton import Kernel, render
from pullback.kernels.codegen.triton_pieces import pieces, results
from pullback.kernels.codegen.triton_values import DENSE, GAPS
from pullback.kernels.ir.expr import I, J, builders, variable
from pullback.kernels.ir.primitives import PRIMITIVES, op
from pullback.kernels.ir.reductions import OVER_J, Program, pullback
from pullback.kernels.plan.ranges import Ranges
from pullback.kernels.runtime import gpu, gpu_code

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(not (INSTALLED and torch.cuda.is_available()), reason="needs a CUDA device and Triton")
SPECIAL = {"Digamma": 0, "Trigamma": 1, "PolyGamma": 2}  # the order of derivatives of log Gamma, whose torch is inexact


def kernels(p, dtype=torch.float32, sparse=False, precision="tf32x3", phase=""):
    return [
        Kernel(q, k, gpu.DATA[dtype], (DENSE,) * p.n, 0, sparse, precision, phase)
        for q in results(p)
        for k in range(len(pieces(q)))
    ]


def row_program(name, categories=(I, J, I)):
    row = PRIMITIVES[name]
    args = [variable(k, 1, categories[k]) for k in range(row.arity)]
    return Program(
        "Sum", (builders[name](*args, *row.params),), (OVER_J,), tuple((1, categories[k]) for k in range(row.arity))
    )


# Without Triton ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_text(name):
    """A function of Python, of the arguments that are told, that depends on no size."""
    for kernel in (*kernels(PROGRAMS[name]), *kernels(PROGRAMS[name], torch.float64, sparse=True)):
        made = ast.parse(render(kernel)).body[-1]
        assert isinstance(made, ast.FunctionDef)
        assert [a.arg for a in made.args.args] == list(codegen.arguments(kernel))


def test_every_row_has_code():
    assert not {name: why for name in PRIMITIVES if (why := codegen.why_not(row_program(name)))}


def test_why_not(monkeypatch):
    assert "no code for torch.int64" in gpu.why_not(PROGRAMS["sum"], torch.int64)
    assert "K = 65" in gpu.why_not(Program("ArgKMin", (sqdist(x_(), y_()),), (OVER_J,), S3, k=65), torch.float32)
    deep = x_(1)
    for _ in range(300):
        deep = op("Sin", deep)
    assert "chain" in gpu.why_not(Program("Sum", (deep,), (OVER_J,), ((1, I),)), torch.float32)
    monkeypatch.setattr(gpu, "_installed", lambda: False)
    assert gpu.why_not(PROGRAMS["sum"], torch.float32) == "Triton is not installed"
    monkeypatch.setattr(gpu, "_installed", lambda: True)
    assert gpu.why_not(PROGRAMS["sum"], torch.float32) == ""


def test_batch_axes():
    """Axes that every tensor steps through as through one are joined."""
    assert gpu._axes((2, 3), [[12, 4], [0, 0]]) == ([6], [[4], [0]])
    assert gpu._axes((2, 3), [[12, 4], [0, 4]]) == ([2, 3], [[12, 4], [0, 4]])
    assert gpu._axes((2, 1, 3), [[3, 7, 1]]) == ([6], [[1]])


def test_import_needs_no_triton():
    """Triton is imported in functions only (torch._dynamo imports it too, where it is installed)."""
    for module in (gpu, codegen, triton_sinks, triton_values):
        for node in ast.parse(Path(module.__file__).read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            assert not any(str(name).startswith("triton") for name in names)


# With Triton ------------------------------------------------------------------------------------------------------


def run_checks(*names, interpret=True, file=__file__, **variables):
    env = dict(os.environ, TRITON_INTERPRET="1" if interpret else "0", OMP_NUM_THREADS="1", **variables)
    done = subprocess.run([sys.executable, file, *names], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
@needs_triton
def test_interpreter():
    run_checks("check_few")


@needs_triton
@pytest.mark.slow
def test_interpreter_all():
    run_checks("check_rows", "check_special", "check_programs", "check_batch", "check_small", "check_ranges")


@needs_triton
@pytest.mark.slow
def test_compiled():
    run_checks("check_compiled", interpret=False)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_gpu(name):
    for dtype in (torch.float32, torch.float64):
        compare(PROGRAMS[name], (), 70, 130, dtype, "cuda")


def compare(p, batch, m, n, dtype, device="cpu"):
    args = data(p, batch, m, n, dtype)
    got = gpu.run(p, [a.to(device) for a in args], batch, m, n).cpu()
    close(p, got, definition(p, args, batch, m, n), dtype)


def check_few():
    for name in ("sum_vector", "sum_over_i", "logsumexp", "softmax", "prod", "argkmin", "gradients"):
        compare(PROGRAMS[name], (), 7, 33, torch.float64)
    for name in ("sum", "logsumexp", "softmax"):  # several blocks of tiles
        compare(PROGRAMS[name], (), 3, 1100, torch.float64)
    p = PROGRAMS["sum"]
    compare(p, (), 7, 33, torch.float32)
    n_functions = len(gpu_code._functions)
    for m, n in ((1, 1), (16, 64), (33, 65)):  # a new size makes no new code
        compare(p, (), m, n, torch.float32)
    assert len(gpu_code._functions) == n_functions
    assert len(kernels(PROGRAMS["gradients"])) == 3  # over j, over i, over both


def check_programs():
    for name, p in PROGRAMS.items():
        compare(p, (), 7, 33, torch.float32)
        if name.startswith(("second", "long", "gradients", "arg")):  # these take long
            compare(p, (), 17, 19, torch.float64)
        else:  # several tiles either way
            compare(p, (), 70, 65, torch.float64)


def check_rows():
    """Every row of the table at random points and at the edges; functions of libdevice are torch's."""
    edges = [0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 0.5, -0.5, math.inf, -math.inf, math.nan, 100.0, -100.0]
    worst = {torch.float64: 0.0, torch.float32: 0.0}
    for name, row in PRIMITIVES.items():
        if name in SPECIAL:
            continue
        p = row_program(name, (I, I, I))
        points = torch.tensor(list(itertools.product(edges[: 13 if row.arity < 3 else 9], repeat=row.arity)))
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
            for t in (torch.stack([lo + (hi - lo) * torch.rand(9) for lo, hi in row.sample], -1), points):
                args = [t[:, k : k + 1].to(dtype).contiguous() for k in range(row.arity)]
                got, want = (run(p, args, (), len(t), 1) for run in (gpu.run, eager.run))
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)
                error = ((got - want).abs() / (1 + want.abs()))[want.isfinite() & got.isfinite()]
                worst[dtype] = max(worst[dtype], error.max().item())
    print("largest error of a row", worst)


def check_special():
    """Derivatives of log Gamma against mpmath, and at poles."""
    import mpmath

    points = torch.cat([torch.linspace(-30.3, 60, 100).double(), torch.tensor([1e-3, 1e-8, 1e5, 0.5, 1, 2]).double()])
    edges = torch.tensor([0.0, -1.0, -7.0, math.nan, math.inf]).double()
    for n in range(5):
        p = Program("Sum", (op("PolyGamma", variable(0, 1, I), n),), (OVER_J,), ((1, I),))
        for dtype, tolerance in ((torch.float64, 3e-14), (torch.float32, 2e-6)):
            t = points.to(dtype)
            got = gpu.run(p, [t[:, None]], (), len(t), 1)[:, 0]
            want = torch.tensor([float(mpmath.psi(n, mpmath.mpf(v))) for v in t.tolist()], dtype=torch.float64)
            scale = want.abs().clamp(min=1.0 if n == 0 else 0.0)
            small = want.abs() < 1e38
            assert ((got.double() - want).abs() / scale)[small].max() < tolerance, (n, dtype)
            assert torch.equal(got[~small].double().sign(), want[~small].sign())
            pole = math.nan if n == 0 else math.inf * (-1) ** (n + 1)
            wanted = [-math.inf if n == 0 else pole, pole, pole, math.nan, math.inf if n == 0 else 0.0]
            got = gpu.run(p, [edges.to(dtype)[:, None]], (), 5, 1)[:, 0].tolist()
            assert repr(got) == repr(wanted)


def check_batch():
    """Any leading axes, missing or broadcast; any strides."""
    batch, m, n = (2, 3), 9, 21
    for name in ("sum", "sum_both", "sum_parameter", "sum_rolled", "logsumexp", "softmax", "argkmin", "gradients"):
        p = PROGRAMS[name]
        for dtype in (torch.float64, torch.float32):
            leads = ((2, 3),) * 8, ((3,), (2, 1), (), (1, 3)) * 2
            for lead in leads if dtype == torch.float64 else leads[1:]:
                args, wide, strided = [], [], []
                for k, t in enumerate(data(p, batch, m, n, dtype)):
                    t = t[(0,) * (2 - len(lead[k]))]
                    t = t[tuple(slice(0, size) for size in lead[k])]
                    args.append(t)
                    wide.append(t.expand(*batch, *t.shape[len(lead[k]) :]))
                    gaps = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)
                    turned = t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else gaps
                    strided.append(turned if k % 2 else gaps)
                want = definition(p, wide, batch, m, n)
                for given in (args, strided):
                    close(p, gpu.run(p, given, batch, m, n), want, dtype)


def check_small():
    """No rows, no columns, no members; half precision."""
    for name, p in PROGRAMS.items():
        if name != "matrix_vector":  # its torch form knows no empty tensors
            for m, n, batch in ((0, 5, ()), (5, 0, ()), (0, 0, ()), (3, 4, (0,))):
                compare(p, batch, m, n, torch.float32)
    for k, (name, p) in enumerate(PROGRAMS.items()):
        if not name.startswith("second"):
            compare(p, (), 9, 21, (torch.float16, torch.bfloat16)[k % 2])


def check_ranges():
    """Blocks of several tiles, spans that end within a tile, rows in no block, empty spans."""
    m, n = 100, 150
    rows, columns = [(0, 40), (45, 50), (60, 100)], [(0, 30), (30, 100), (120, 150)]
    meet = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    mask = torch.zeros(m, n, dtype=torch.bool)
    for (a, b), own in zip(rows, meet.tolist(), strict=True):
        for (c, d), on in zip(columns, own, strict=True):
            mask[a:b, c:d] = on

    def triple(own, other, meets):
        spans = [[span for span, on in zip(other, k, strict=True) if on] for k in meets]
        ends = torch.tensor([len(s) for s in spans]).cumsum(0)
        return torch.tensor(own), ends, torch.tensor([s for k in spans for s in k])

    ranges = Ranges(*triple(rows, columns, meet.tolist()), *triple(columns, rows, meet.T.tolist()))
    ranges.check(m, n)
    for name in ("sum", "sum_over_i", "sum_both", "logsumexp", "softmax", "prod", "argkmin", "argmax", "gradients"):
        p = PROGRAMS[name]
        args = data(p, (2,), m, n, torch.float64)
        got = gpu.run(p, args, (2,), m, n, ranges)
        close(p, got, eager.run(p, args, (2,), m, n, ranges), torch.float64)


def gauss(d):
    return Program("Sum", (gaussian(d) * variable(2, 1, J),), (OVER_J,), ((d, I), (d, J), (1, J)))


def representative():
    """What must not spill."""
    found = {f"gauss{d}": gauss(d) for d in (3, 8, 16)}
    found |= {f"gradients{d}": pullback(gauss(d), (0, 1, 2))[0] for d in (3, 16)}
    found |= {k: PROGRAMS[k] for k in ("logsumexp", "logsumexp_weight", "softmax", "prod", "argmin")}
    for d in (3, 16):
        signature = ((d, I), (d, J))
        found[f"argkmin10_{d}"] = Program("ArgKMin", (sqdist(x_(d), y_(d)),), (OVER_J,), signature, k=10)
    found["logsumexp16"] = Program("LogSumExp", (sqdist(x_(16), y_(16)),), (OVER_J,), ((16, I), (16, J)))
    return found


def all_rows():
    """Every row that Triton has, in a few formulas."""
    names = list(PRIMITIVES)
    args = [variable(k, 1, c) for k, c in enumerate((I, J, I))]
    terms = [builders[k](*args[: PRIMITIVES[k].arity], *PRIMITIVES[k].params) for k in names]
    return [Program("Sum", (sum(terms[k::4], start=args[0]),), (OVER_J,), ((1, I), (1, J), (1, I))) for k in range(4)]


def check_compiled():
    from triton.backends.compiler import GPUTarget

    old, new, amd = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
    for target, dtype in itertools.product((old, new, amd), (torch.float32, torch.float64)):
        for name, p in representative().items():
            if target != new and dtype == torch.float32 and not name.endswith(("16", "softmax")):
                continue  # differs from the new one in products of matrices
            if dtype == torch.float64 and (target != new or name not in ("gradients16", "softmax", "argkmin10_16")):
                continue  # what is largest is enough
            for kernel in kernels(p, dtype, precision="ieee" if target == amd else "tf32x3"):
                kernel = replace(kernel, family={80: "sm_80", 90: "sm_90"}.get(target.arch, "gfx"))
                registers, spilled = usage(gpu_code.compiled(kernel, target), target)
                print(f"{target.arch} {str(dtype)[6:]} {name} tile {kernel.tile}: {registers}, {spilled} spilled")
                assert spilled == 0, name
        if (target, dtype) in ((new, torch.float32), (amd, torch.float64)):
            for p in all_rows():
                gpu_code.compiled(*kernels(p, dtype), target)
    for target, dtype in ((new, torch.float16), (amd, torch.bfloat16)):
        sparse = Kernel(PROGRAMS["argkmin"], 0, gpu.DATA[dtype], (GAPS,) * 3, 2, True)
        gpu_code.compiled(sparse, target)
        gpu_code.compiled(*kernels(PROGRAMS["sum"], dtype), target)


def usage(made, target):
    """(registers of a thread, bytes or vector registers spilled), from the assembler or the binary's notes.

    AMD's scalar registers are spilled to lanes of vector registers, not to memory.
    """
    if target.backend == "hip":
        text = made.asm["amdgcn"]
        vector, spilled = (
            int(re.search(rf"\.{k}:\s+(\d+)", text).group(1)) for k in ("vgpr_count", "vgpr_spill_count")
        )
        return vector, spilled
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    name = f"sm_{target.arch}{'a' if target.arch == 90 else ''}"
    command = [str(ptxas), "-v", f"--gpu-name={name}", "-", "-o", "/dev/null"]
    text = subprocess.run(command, input=made.asm["ptx"], capture_output=True, text=True, check=True).stderr
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())
    return int(re.search(r"Used (\d+) registers", text).group(1)), stores + loads


def _patch_libdevice():
    """Give the interpreter, which has no libdevice, the functions of torch."""
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime.interpreter import TensorHandle

    def patched(function):
        def call(*args):
            like = next(a for a in args if isinstance(a, tl.tensor))
            y = function(*(torch.from_numpy(a.handle.data) if isinstance(a, tl.tensor) else a for a in args)).numpy()
            return tl.tensor(TensorHandle(y, like.dtype), tl.block_type(like.dtype, list(y.shape)))

        return call

    trigonometric = ("tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh")
    for name in ("exp2", "expm1", "log1p", "pow", "erfc", "lgamma", "trunc", *trigonometric):
        setattr(libdevice, name, patched(getattr(torch, name)))
    libdevice.rint = patched(torch.round)


def _patch_dot():
    """Let the interpreter, which multiplies what lies in memory, round as tensor cores do, and know bfloat16."""
    import numpy as np
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def number(a):
        if a.dtype.scalar == tl.bfloat16:
            return torch.from_numpy(a.data.view(np.int16)).view(torch.bfloat16).float().numpy()
        return a.data.astype(np.float32) if a.data.dtype == np.float16 else a.data

    def tf32(a):  # to nearest: 10 bits behind the first
        return ((a.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y = number(a), number(b)
        if x.dtype == np.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            y, x = tf32(y), tf32(x)
        if x.dtype == np.float32 and input_precision == ir.INPUT_PRECISION.TF32x3:
            u, v = tf32(x), tf32(y)
            z = u @ tf32(y - v) + tf32(x - u) @ v + u @ v
        else:
            z = x @ y
        return TensorHandle(z + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def main(names, checks):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if os.environ["TRITON_INTERPRET"] == "1":
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, about edges
        _patch_libdevice()
        _patch_dot()
    for name in names:
        checks[name]()


if __name__ == "__main__":
    main(sys.argv[1:], globals())
