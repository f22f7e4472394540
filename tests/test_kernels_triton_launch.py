"""Calls of Triton kernels: what is kept of them, shared columns, tiles; see `test_kernels_triton`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from test_kernels_llvm import PROGRAMS, close, data, definition, sqdist, x_, y_
from test_kernels_triton import compare, main, needs_triton, run_checks
from test_kernels_triton_dot import DOTS, evaluated, gauss

from pullback.core.errors import ArgumentError
from pullback.kernels.codegen.triton import Kernel
from pullback.kernels.codegen.triton_tiles import Tile, candidates, smaller
from pullback.kernels.codegen.triton_values import DENSE, GAPS, UNIT
from pullback.kernels.ir.expr import PARAMETER, I, J
from pullback.kernels.ir.reductions import OVER_I, OVER_J, Program
from pullback.kernels.runtime import gpu, gpu_code, tuning
from pullback.kernels.runtime.compile import cache_folder

KERNEL = Kernel(gauss(17), 0, "float32", (DENSE,) * 3, precision="tf32x3")


def test_tiles():
    tile = KERNEL.tile
    assert candidates(tile)[0] == tile
    assert len(set(candidates(tile))) == len(candidates(tile)) > 4
    tried = [tile]
    while (less := smaller(tried[-1])) is not None:
        tried.append(less)
    assert tried[-1] == Tile(16, 16, 4, 1)
    wide = replace(KERNEL, program=gauss(3, 64))
    assert (replace(wide, family="sm_80").tile.rows, wide.tile.rows) == (32, 64)


def test_precision(monkeypatch):
    """That of torch's own products, if it was asked for."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for asked, used in (("none", "tf32x3"), ("tf32", "tf32"), ("ieee", "ieee")):
            matmul.fp32_precision = asked
            assert gpu_code.precision("float32") == used
            assert gpu_code.precision("float64") == gpu_code.precision("bfloat16") == "ieee"
        matmul.fp32_precision = "none"
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert gpu_code.precision("float32") == "ieee"
    finally:
        matmul.fp32_precision = before


def test_layouts():
    t = torch.zeros(5, 8, 6)
    assert gpu._layout(t, I) == gpu._layout(t[:, :1, :3], I) == gpu._layout(t[0, 0], PARAMETER) == DENSE
    assert gpu._layout(t[..., :4], I) == gpu._layout(t.transpose(0, 1), J) == UNIT
    assert gpu._layout(t[..., ::2], I) == gpu._layout(t.mT, I) == GAPS


def test_launch():
    """A compiled kernel is launched without Triton's dispatch as long as every pointer is a multiple of 16."""
    launched = []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: launched.append((grid, args))

    out, x = torch.zeros(8), torch.zeros(9)
    gpu.Launch(KERNEL, (1, 2, 3), (7, 8), made=Compiled())(out, [x], [])
    ((grid, args),) = launched
    assert grid == (1, 2, 3)
    assert args[0] is out
    assert args[1] is x
    assert args[2:] == (7, 8)


# With Triton ------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
def test_interpreter():
    run_checks("check_strides", "check_parts", "check_less_memory", "check_calls", file=__file__)


@needs_triton
@pytest.mark.slow
def test_tune(tmp_path):
    run_checks("check_tune", "check_tuned", file=__file__, PULLBACK_CACHE=str(tmp_path))


def check_strides():
    """Members and heads apart, components next to each other or not."""
    p = DOTS["attention"]
    for dtype in (torch.float32, torch.float64):
        shapes = ((2, 9, 3, 32), (2, 21, 3, 32), (2, 21, 3, 24))
        heads = [torch.randn(shape, dtype=dtype).transpose(1, 2) for shape in shapes]
        want = definition(p, heads, (2, 3), 9, 21)
        kinds = ((heads, UNIT), ([t.contiguous() for t in heads], DENSE), ([t.mT.contiguous().mT for t in heads], GAPS))
        for args, kind in kinds:
            close(p, evaluated(p, args, (2, 3), 9, 21), want, dtype)
            (call,) = gpu._calls.values()
            kernel = call.parts[0].steps[0][0][0].kernel
            assert kernel.layouts == (kind,) * 3
            assert kernel.aligned == (kind != GAPS or dtype == torch.float64 or kernel.batch == 1)
        q, k, v = heads
        want = definition(p, [q, k[:1].expand_as(k), v[:, :1].expand_as(v)], (2, 3), 9, 21)
        close(p, evaluated(p, [q, k[0], v[:, :1]], (2, 3), 9, 21), want, dtype)
        wide = [torch.randn(*t.shape[:-1], t.shape[-1] + 1, dtype=dtype)[..., 1:] for t in heads]  # no multiples of 16
        close(p, evaluated(p, wide, (2, 3), 9, 21), definition(p, wide, (2, 3), 9, 21), dtype)
        (call,) = gpu._calls.values()
        assert not call.parts[0].steps[0][0][0].kernel.aligned


def check_parts():
    """Few rows: the columns are shared out, and what the parts found is joined."""
    gpu_code.processors = lambda device: 8
    for name, p in {**PROGRAMS, **DOTS}.items():
        long = name.startswith(("sum_", "second", "long", "gradients", "arg", "prod_"))
        if long and name not in ("sum_over_i", "sum_both", "sum_kahan", "sum_wide", "gradients40", "argkmin", "argmax"):
            continue
        m, n = (300, 3) if p.axes == (OVER_I,) else (3, 300)
        dtype = torch.float64 if name in ("sum", "softmax", "argkmin", "wide16") else torch.float32
        gpu._calls.clear()
        compare(p, (), m, n, dtype)
        (call,) = gpu._calls.values()
        assert {len(launches) for launches, *_ in call.parts[0].steps} == {2}, name
    for name in ("argkmin", "softmax", "attention"):
        compare({**PROGRAMS, **DOTS}[name], (2,), 3, 300, torch.float32)
    few = Program("ArgKMin", (sqdist(x_(), y_()),), (OVER_J,), ((3, I), (3, J)), k=60)  # more than a part has
    gpu.TILES = 1
    compare(few, (), 2, 320, torch.float32)


def check_less_memory():
    """A device that has too little shared memory for the tile gets a smaller one."""
    from triton.runtime.errors import OutOfResources

    made, tried = gpu_code.function, []

    def function(kernel):
        tried.append(kernel.tile)
        if kernel.tile.columns > 16:
            raise OutOfResources(1, 0, "shared memory")
        return made(kernel)

    gpu_code.function = function
    compare(gauss(17), (), 5, 20, torch.float32)
    assert [t[1:] for t in tried] == [(32, 4, 2), (32, 4, 1), (16, 4, 1)]
    compare(gauss(17), (), 6, 20, torch.float32)
    assert len(tried) == 4
    gpu_code.function = made


def check_tune():
    """Each kernel is measured once; the answer is that of the call."""
    args = data(gauss(17), (), 40, 50, torch.float32)
    got = tuning.tune(evaluated, gauss(17), args, (), 40, 50)
    close(gauss(17), got, definition(gauss(17), args, (), 40, 50), torch.float32)
    count = len(gpu_code._functions)
    assert count >= len(candidates(KERNEL.tile))
    tuning.tune(evaluated, gauss(17), args, (), 40, 50)
    assert len(gpu_code._functions) == count
    assert not tuning.active()


def check_tuned():
    """What was measured is read again, by other processes too; what could not have been written is not."""
    args = data(gauss(17), (), 40, 50, torch.float32)
    want = definition(gauss(17), args, (), 40, 50)
    (path,) = cache_folder().iterdir()
    assert Tile(*json.loads(path.read_text())) in candidates(KERNEL.tile)
    for text, tile in (("[48, 32, 4, 2]", KERNEL.tile), ("[32", KERNEL.tile), ("[16, 128, 2, 1]", (16, 128, 2, 1))):
        path.write_text(text)
        tuning._chosen.clear()
        close(gauss(17), evaluated(gauss(17), args, (), 40, 50), want, torch.float32)
        (call,) = gpu._calls.values()
        assert call.parts[0].steps[0][0][0].kernel.tile == tile
    os.environ["PULLBACK_TUNE"] = "1"
    evaluated(PROGRAMS["sum"], data(PROGRAMS["sum"], (), 9, 9, torch.float32), (), 9, 9)
    assert len(list(cache_folder().iterdir())) == 2


def check_calls():
    """A call is worked out once for tensors of a shape; any change of it makes another."""
    gpu._calls.clear()
    p = gauss(17)
    args = data(p, (), 40, 50, torch.float32)
    for _ in range(2):
        gpu.run(p, args, (), 40, 50)
    assert len(gpu._calls) == 1
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    gpu.run(p, args, (), 40, 50)
    torch.backends.cuda.matmul.fp32_precision = "none"
    gpu.run(p, [args[0].T.contiguous().T, *args[1:]], (), 40, 50)
    assert len(gpu._calls) == 3
    n_functions = len(gpu_code._functions)
    compare(p, (), 41, 30, torch.float32)
    assert len(gpu._calls) == 4
    assert len(gpu_code._functions) == n_functions  # a new size makes no new code


def test_tune_wants_a_function():
    with pytest.raises(ArgumentError, match="f must be callable, such as a Genred; got int"):
        tuning.tune(3)


if __name__ == "__main__":
    main(sys.argv[1:], globals())
