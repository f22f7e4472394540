"""explain(f) shows each step."""

import pytest
import torch

import pullback as pb
from pullback.kernels import explain, fast
from pullback.kernels.codegen.triton import LARGEST_K
from pullback.kernels.fast.choose import rate

GAUSSIAN = ("Exp(-SqDist(x,y)*1)*b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(1)"])
FORMULA = pb.Genred(*GAUSSIAN, axis=1)


def lines_of(report):
    """The last line with each label."""
    return {line.split(" ")[0]: line[12:] for line in report.splitlines()}


def test_every_step_is_shown(capsys):
    report = explain(FORMULA)
    assert capsys.readouterr().out.strip() == report.strip()
    for part in (
        "formula     Exp(-SqDist(x,y)*1)*b",
        "argument 2  b = Vj(1)",
        "expression  Mult(Exp(Mult(Minus(Sum(Square(Subtract(",
        "rewritten   program 0: Sum(Mult(Exp(Minus(Sum(Square(Subtract(",
        "lanes of float",
        "operations:",
        "define void @worker",
        "assembly of the inner loop",
        "on a GPU    ",
    ):
        assert part in report, part
    assert "tolerance" not in report


def test_what_can_be_explained(capsys):
    x = torch.rand(5, 3)
    kernel = (-pb.Vi(x).sqdist(pb.Vj(x))).exp()
    assert "Sum over j" in explain(kernel, text=False)
    assert "LogSumExp over i" in explain(kernel.logsumexp(0, call=False), text=False)
    assert "double" in explain(FORMULA, dtype=torch.float64, text=False)
    assert "double" in explain(FORMULA, *(torch.rand(5, k, dtype=torch.float64) for k in (3, 3, 1)), text=False)
    assert not capsys.readouterr().out
    rare = pb.Genred("PolyGamma(x+y,3)", ["x = Vi(1)", "y = Vj(1)"], axis=1)
    assert "back end    eager torch, tile by tile: no code for PolyGamma" in explain(rare, text=False)
    many = pb.Genred("SqDist(x,y)", ["x = Vi(3)", "y = Vj(3)"], "ArgKMin", axis=1, opt_arg=LARGEST_K + 1)
    assert f"on a GPU    eager torch, tile by tile: K = {LARGEST_K + 1} is more" in explain(many, text=False)
    with pytest.raises(pb.ArgumentError, match="explain expects a Genred, a LazyTensor or a LazyReduction; got int"):
        explain(3)
    with pytest.raises(pb.ArgumentError, match="tolerance must be a number between 0 and 1"):
        explain(FORMULA, tolerance=2.0)


# Within a tolerance -----------------------------------------------------------------------------------------------


def points(n, *batch):
    return torch.rand(*batch, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_fourier_series():
    """Method, error and cost, which are those of the sum itself."""
    x = points(6000)
    f = pb.Genred("Exp(-SqDist(x,y))*b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(2)"], axis=1, tolerance=1e-5)
    args = x, x, torch.ones(6000, 2, dtype=torch.float64)
    report = explain(f, *args, text=False)
    said = lines_of(report)
    with fast.watch() as done:
        f(*args)
    assert done[0].method == "fourier"
    assert said["method"].startswith(f"fourier: {done[0].detail}; error ")
    assert 0 < float(said["method"].split("error ")[1].split()[0]) < 1e-5
    assert said["tolerance"].startswith("1e-05")
    assert said["form"] == "a sum of a_i K b_j, K a function of 3 differences"
    assert "difference  Var(5,1,0) = Gather(Var(0,3,0),[2]) - Gather(Var(1,3,1),[2])" in report
    assert said["kernel"].startswith("K = Exp(")
    for way in ("exact ", "tree ", "Fourier series "):
        assert way in said["estimates"]


def test_tree_and_exact():
    x = points(40_000)[:, :1].contiguous()
    sharp = (-(pb.Vi(x).sqdist(pb.Vj(x)) + 1e-20).sqrt() / 0.01).exp()
    said = lines_of(explain(sharp.with_tolerance(1e-4), text=False))
    assert said["method"].startswith("tree: order ") and "too sharp" in said["estimates"]
    few = (-pb.Vi(x[:9]).sqdist(pb.Vj(x[:9]))).exp()
    assert (
        lines_of(explain(few.sum(1, call=False, tolerance=1e-4), text=False))["method"] == "exact: 9 x 9 pairs are few"
    )
    alike = (pb.Vi(x) * pb.Vj(x) * pb.Vj(x)).sum(-1).sin()
    assert lines_of(explain(alike, tolerance=1e-4, text=False))["method"].startswith("exact: Sin mixes i and j")


def test_on_a_device():
    x = points(5).to("meta")
    said = lines_of(explain((-pb.Vi(x).sqdist(pb.Vj(x))).exp(), tolerance=1e-4, text=False))
    assert said["method"] == "exact: fast sums run on the CPU; the tensors lie on meta" and "estimates" not in said


def test_without_data():
    """The form and estimates for evenly spread points; the choice depends on the points."""
    f = pb.Genred(*GAUSSIAN, axis=1, tolerance=1e-6)
    said = lines_of(explain(f, m=10**6, n=10**6, text=False))
    assert said["method"].startswith("depends on the points") and "Fourier" not in said["estimates"]
    assert said["estimates"].startswith(f"exact {1e12 / rate(f.reducer.programs[0]):.2g} s, tree ")
    assert lines_of(explain(f, text=False))["estimates"].startswith(f"exact {1e6 / rate(f.reducer.programs[0]):.2g} s")
    open_arguments = pb.Vi(0, 3).sqdist(pb.Vj(1, 3)).logsumexp(1, tolerance=1e-3)
    assert lines_of(explain(open_arguments, text=False))["form"].startswith("an exponent K + a_i + b_j")
    assert lines_of(explain(open_arguments, points(5), points(4), text=False))["method"] == "exact: 5 x 4 pairs are few"


def test_passes_and_batches():
    """A variance is two sums; of a batch the first member is told."""
    f = pb.Genred("Exp(-SqDist(x,y))", ["x = Vi(3)", "y = Vj(3)"], "Var", axis=1, tolerance=1e-3)
    report = explain(f, points(5000, 2), points(5000), text=False)
    assert report.count("method      fourier: ") == 1 and report.count("method      depends on the points") == 1
    assert "batch       the first member is told of" in report
    product = pb.Genred("Exp(-SqDist(x,y))", ["x = Vi(3)", "y = Vj(3)"], "Prod", axis=1)
    assert "method" not in explain(product, tolerance=1e-3, text=False)


def test_arguments_that_do_not_fit():
    f = pb.Genred("Exp(-SqDist(x,y))*b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(1)"], axis=1, tolerance=1e-4)
    x, b = torch.rand(5, 3), torch.rand(5, 1)
    with pytest.raises(pb.ArgumentError, match="expected 3 arguments"):
        explain(f, x, x, text=False)
    with pytest.raises(pb.ShapeError, match="y"):
        explain(f, x, x[:, :2], b, text=False)
    with pytest.raises(pb.DtypeError, match="must be tensors"):
        explain(f, x, "y", b, text=False)
