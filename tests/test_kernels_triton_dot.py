"""Products of matrices in Triton kernels; see `test_kernels_triton` for how they are checked."""

from __future__ import annotations

import ast
import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from test_kernels_llvm import close, data, definition, gaussian, sqdist, x_, y_
from test_kernels_triton import compare, kernels, main, needs_triton, run_checks, usage

from pullback.kernels.codegen import eager, triton_dot
from pullback.kernels.codegen.triton import arguments, render
from pullback.kernels.codegen.triton_pieces import loops, lowered
from pullback.kernels.codegen.triton_vectors import split
from pullback.kernels.ir.expr import PARAMETER, I, J, builders, variable
from pullback.kernels.ir.primitives import op
from pullback.kernels.ir.reductions import OVER_I, OVER_J, Program, pullback
from pullback.kernels.plan.ranges import Ranges
from pullback.kernels.runtime import gpu, gpu_code


def scalar_product(d):
    return builders["Sum"](x_(d) * y_(d))


def gauss(d, e=1):
    return Program("Sum", (gaussian(d) * variable(2, e, J),), (OVER_J,), ((d, I), (d, J), (e, J)))


def attention(d, e):
    f = scalar_product(d) * d**-0.5
    return Program("SoftMax", (f, variable(2, e, J)), (OVER_J,), ((d, I), (d, J), (e, J)))


def nested(d):
    a, b = x_(d) - y_(d), variable(2, d, I) - variable(3, d, J)
    return Program("Sum", (builders["Sum"](a * b),), (OVER_J,), ((d, I), (d, J), (d, I), (d, J)))


DOTS = {
    "gauss16": gauss(16),
    "gauss17": gauss(17),
    "gauss64": gauss(64),
    "gauss150": gauss(150),  # longer than what stays in registers
    "wide16": gauss(3, 16),
    "wide20": gauss(3, 20),
    "wide150": gauss(3, 150),  # several programs share the columns
    "wide_both": gauss(40, 33),
    "gradients40": pullback(gauss(40), (0, 1, 2))[0],
    "gradients_wide": pullback(gauss(3, 20), (0, 1, 2))[0],
    "gradients_long": pullback(gauss(150), (0, 1, 2))[0],
    "attention": attention(32, 24),
    "attention_gradients": pullback(attention(32, 24), (0, 1, 2))[0],
    "logsumexp": Program("LogSumExp", (scalar_product(20) * 0.3,), (OVER_J,), ((20, I), (20, J))),
    "logsumexp_over_i": Program("LogSumExp", (-sqdist(x_(20), y_(20)),), (OVER_I,), ((20, I), (20, J))),
    "logsumexp_wide": Program(
        "LogSumExp", (scalar_product(3), op("Exp", variable(2, 18, J))), (OVER_J,), ((3, I), (3, J), (18, J))
    ),
    "softmax_factor": Program(
        "SoftMax",
        (scalar_product(20), op("Cos", x_(20)) * (scalar_product(20) * variable(2, 20, J))),
        (OVER_J,),
        ((20, I), (20, J), (20, J)),
    ),
    "argkmin": Program("ArgKMin", (sqdist(x_(20), y_(20)),), (OVER_J,), ((20, I), (20, J)), k=3),
    "parameters": Program(
        "Sum",
        (op("Exp", -sqdist(x_(20) * variable(2, 20, PARAMETER), y_(20) * variable(2, 20, PARAMETER))),),
        (OVER_J,),
        ((20, I), (20, J), (20, PARAMETER)),
    ),
    "rows_times_columns": Program(
        "Sum",
        (scalar_product(3) * (op("Sin", variable(2, 20, I)) * variable(3, 20, J)),),
        (OVER_J,),
        ((3, I), (3, J), (20, I), (20, J)),
    ),
    "functions_of_columns": Program(
        "Sum",
        (builders["Sum"](op("Cos", x_(20)) * op("Exp", y_(20))) * op("Cos", variable(2, 20, J)),),
        (OVER_J,),
        ((20, I), (20, J), (20, J)),
    ),
    "nested": nested(20),
}


def evaluated(p, args, batch, m, n, ranges=None):
    gpu._calls.clear()
    return gpu.run(p, args, batch, m, n, ranges)


def phases(p, **options):
    for kernel in kernels(p, **options):
        for phase in ("", "part", "merge"):
            yield replace(kernel, phase=phase)


# Without Triton ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOTS)
def test_text(name):
    """A function of Python, of the arguments that are told, for each type, whole or in parts."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for kernel in phases(DOTS[name], dtype=dtype):
            made = ast.parse(render(kernel)).body[-1]
            assert isinstance(made, ast.FunctionDef)
            assert [a.arg for a in made.args.args] == list(arguments(kernel))


def test_what_is_multiplied():
    """Products of matrices for long loops over d and for wide results; none of products of differences, or short."""

    def count(p, **options):
        return [render(k).count("tl.dot(") for k in kernels(p, **options)]

    assert count(gauss(16)) == count(DOTS["logsumexp"]) == count(DOTS["gauss150"]) == [1]
    assert count(gauss(40)) == [2]  # 32 components and 8
    assert count(attention(64, 64)) == [2]
    assert count(gauss(3, 16)) == [1]
    assert count(pullback(attention(64, 64), (0, 1, 2))[0]) == [3, 4]  # both sides of the softmax share a pass
    assert count(nested(20)) == count(gauss(15)) == count(gauss(3, 15)) == [0] * len(count(gauss(3, 15)))
    assert count(replace(gauss(3, 20), accumulator="float64")) == [0]


def test_terms():
    """What belongs to rows is told from what belongs to columns; the product of two differences is left alone."""
    rows = I
    ((segment,),) = lowered(DOTS["rows_times_columns"]).segments
    (term,) = triton_dot.terms(segment.values[0], rows)
    assert (term.sign, term.row.op, term.column.op) == (1, "Sin", "Component")
    assert loops(gauss(64)) == ((64, True),)
    assert loops(nested(20)) == ((20, False),)


@pytest.mark.parametrize("size", [16, 17, 40, 64, 100, 128])
def test_chunks(size):
    chunks = split(size)
    starts = [int(c.first) for c in chunks]
    assert starts == list(itertools.accumulate([0, *(c.width for c in chunks)]))[:-1]
    assert 0 <= sum(c.width for c in chunks) - size < 16
    assert [c.size for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].size is None) == (size % 16 == 0)


# With Triton ------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
def test_interpreter():
    run_checks(
        "check_programs",
        "check_near",
        "check_precision",
        "check_long_sums",
        "check_half",
        "check_small",
        "check_ranges",
        file=__file__,
    )


@needs_triton
@pytest.mark.slow
def test_compiled():
    run_checks("check_compiled", interpret=False, file=__file__)


def check_programs():
    for name, p in DOTS.items():
        compare(p, (), 9, 33, torch.float64)
        compare(p, (), 70, 65, torch.float32)
        assert name == "nested" or all(k.multiplies for k in kernels(p)), name

    for name in ("gauss17", "logsumexp", "attention"):  # several tiles of rows
        compare(DOTS[name], (), 150, 40, torch.float32)


def check_near():
    """Squared distances of points that are close to each other and far from the others, or from 0, or not finite."""
    m, n, d = 70, 90, 40
    p = Program("Sum", (sqdist(x_(d), y_(d)) * variable(2, 1, I),), (OVER_J,), ((d, I), (d, J), (1, I)))
    both = pullback(Program("Sum", (op("Exp", -0.1 * sqdist(x_(d), y_(d))),), (OVER_J,), ((d, I), (d, J))), (0,))[0]
    worst, errors = {}, {}
    for name, spread, shift in (("spread", 1.0, 0.0), ("shifted", 1.0, 1000.0), ("clusters", 1e-3, 0.0)):
        centres = 30 * torch.randn(5, d, dtype=torch.float64) if name == "clusters" else torch.zeros(1, d).double()
        points = centres[torch.randint(len(centres), (m + n,))] + spread * torch.randn(m + n, d).double()
        x, y = (shift + points).float().split([m, n])
        ones = torch.ones(m, 1)
        # each squared distance by itself, as a reduction over one column
        for j in range(0, n, 30):
            got = evaluated(p, [x, y[j : j + 1], ones], (), m, 1).double()
            want = ((x.double() - y[j].double()) ** 2).sum(-1, keepdim=True)
            worst[name] = max(worst.get(name, 0.0), ((got - want).abs() / want).max().item())
        # a gradient is relative to |x - c| + |y - c|
        args = [x, y, ones]
        errors[name] = (evaluated(both, args, (), m, n) - definition(both, args, (), m, n)).abs().max().item()
    print(worst, errors)
    assert max(worst.values()) < 4e-6
    assert max(errors["spread"], errors["shifted"]) < 1e-5
    assert errors["clusters"] < 3e-4
    points = torch.randn(m, d)
    points[0] = 1e6  # does not spoil what its neighbours get
    args = [points, torch.randn(n, d), torch.ones(m, 1)]
    got, want = evaluated(both, args, (), m, n), definition(both, args, (), m, n)
    assert (got - want)[1:].abs().max() < 1e-5
    points[0] = math.inf  # the first row of a tile is one of three that are taken off all
    points[35, 3] = math.nan
    points[69] = 1e25
    got = evaluated(p, [points, torch.randn(n, d), torch.ones(m, 1)], (), m, n)
    assert got[0].item() == got[69].item() == math.inf
    assert math.isnan(got[35].item())
    assert got[1:35].isfinite().all()
    assert got[36:69].isfinite().all()
    same = evaluated(p, [points[1:30], points[1:30], torch.ones(29, 1)], (), 29, 29)
    assert same.isfinite().all()


def check_precision():
    """tf32 keeps 11 bits, tf32x3 as many as float32 (the interpreter rounds as tensor cores do)."""
    p = Program("Sum", (scalar_product(64),), (OVER_J,), ((64, I), (64, J)))
    x = torch.randn(40, 64)
    exact = x.double() @ x[:1].double().T
    errors = {}
    for asked in ("tf32", "none", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = asked
        got = evaluated(p, [x, x[:1]], (), 40, 1)
        errors[asked] = ((got - exact).abs().max() / exact.abs().max()).item()
    torch.backends.cuda.matmul.fp32_precision = "none"
    print(errors)
    assert 1e-5 < errors["tf32"] < 1e-3
    assert errors["none"] < 1e-6
    assert errors["ieee"] < 1e-6


def check_long_sums():
    """Rounding errors of many tiles do not add up."""
    x, b = torch.rand(2, 3), torch.rand(12_000, 16) + 0.5
    p = gauss(3, 16)
    args = [x, x[:1].expand(12_000, 3).contiguous(), b]
    error = (evaluated(p, args, (), 2, 12_000) / definition(p, args, (), 2, 12_000) - 1).abs().max().item()
    print(error)
    assert error < 1.5e-7


def check_half():
    for dtype, name in itertools.product((torch.float16, torch.bfloat16), DOTS):
        if name not in ("gradients_long", "gauss150", "wide150", "attention_gradients"):
            compare(DOTS[name], (), 9, 33, dtype)
    text = render(kernels(attention(64, 64), torch.bfloat16)[0])
    assert "input_precision" not in text  # products of what lies in memory


def check_small():
    for name, p in DOTS.items():
        for m, n, batch in ((0, 5, ()), (5, 0, ()), (3, 4, (0,))):
            if not name.startswith("gradients_"):
                compare(p, batch, m, n, torch.float32)


def check_ranges():
    """Blocks that end within a tile, rows in no block."""
    ranges = Ranges(
        torch.tensor([[0, 40], [45, 50]]), torch.tensor([2, 3]), torch.tensor([[0, 30], [33, 90], [10, 11]]),
        torch.tensor([[0, 90]]), torch.tensor([1]), torch.tensor([[0, 50]]),
    )  # fmt: skip
    for name in ("gauss17", "wide20", "attention", "logsumexp", "argkmin"):
        args = data(DOTS[name], (), 60, 90, torch.float64)
        got, want = (run(DOTS[name], args, (), 60, 90, ranges) for run in (gpu.run, eager.run))
        close(DOTS[name], got, want, torch.float64)


def check_compiled():
    """On each architecture, within its shared memory, without spills but for few in the gradients."""
    from triton.backends.compiler import GPUTarget

    targets = {
        "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
        "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
        "gfx": (GPUTarget("hip", "gfx942", 64), 64 << 10),
    }
    wide_gradients = pullback(gauss(3, 64), (0, 1, 2))[0]
    programs = {
        "attention64": attention(64, 64),
        "wide64": gauss(3, 64),
        "gauss64": gauss(64),
        "wide_gradients": wide_gradients,
    }
    for family, (target, limit) in targets.items():
        for (name, p), dtype in itertools.product(programs.items(), (torch.float32, torch.bfloat16, torch.float64)):
            if dtype != torch.float32 and (name != "attention64" or family == "sm_80"):
                continue
            precision = "tf32x3" if target.backend == "cuda" and dtype == torch.float32 else "ieee"
            for kernel in kernels(p, dtype, precision=precision):
                kernel = replace(kernel, family=family)
                made = gpu_code.compiled(kernel, target)
                registers, spilled = usage(made, target)
                what = f"{family} {kernel.data} {name} {tuple(kernel.tile)}"
                print(f"{what}: {registers}, {spilled} spilled, {made.metadata.shared} shared")
                assert made.metadata.shared <= limit, what
                assert spilled <= (64 if name == "wide_gradients" else 0), what
        precision = "tf32x3" if target.backend == "cuda" else "ieee"
        for p, phase in itertools.product((attention(16, 16), DOTS["argkmin"]), ("part", "merge")):
            (kernel,) = kernels(p, precision=precision)
            gpu_code.compiled(replace(kernel, phase=phase, family=family), target)


if __name__ == "__main__":
    main(sys.argv[1:], globals())
