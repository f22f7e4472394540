"""explain(f) shows each step."""

import pytest
import torch

import pullback as pb
from pullback.kernels import explain

FORMULA = pb.Genred("Exp(-SqDist(x,y)*1)*b", ["x = Vi(3)", "y = Vj(3)", "b = Vj(1)"], axis=1)


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
    ):
        assert part in report, part


def test_what_can_be_explained(capsys):
    x = torch.rand(5, 3)
    kernel = (-pb.Vi(x).sqdist(pb.Vj(x))).exp()
    assert "Sum over j" in explain(kernel, text=False)
    assert "LogSumExp over i" in explain(kernel.logsumexp(0, call=False), text=False)
    assert "double" in explain(FORMULA, dtype=torch.float64, text=False)
    assert not capsys.readouterr().out
    rare = pb.Genred("PolyGamma(x+y,3)", ["x = Vi(1)", "y = Vj(1)"], axis=1)
    assert "eager torch" in explain(rare, text=False)
    with pytest.raises(pb.ArgumentError, match="explain expects a Genred, a LazyTensor or a LazyReduction; got int"):
        explain(3)
