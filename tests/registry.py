"""Every operator class of the library with small instances, found by importing all of it."""

from __future__ import annotations

import importlib
import pkgutil

import torch

import pullback as pb
from pullback.core import algebra


def _all_subclasses(cls: type) -> set[type]:
    return {s for c in cls.__subclasses__() for s in (c, *_all_subclasses(c))}


def operator_classes() -> list[type[pb.LinearOperator]]:
    for module in pkgutil.walk_packages(pb.__path__, "pullback."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = _all_subclasses(pb.LinearOperator)
    return sorted((c for c in found if c.__module__.startswith("pullback.")), key=lambda c: (c.__module__, c.__name__))


def public_classes() -> list[type[pb.LinearOperator]]:
    """Classes that must have examples: those a user constructs. Combined operators are made by `algebra_examples`."""
    return [c for c in operator_classes() if not c.__name__.startswith("_") and c.__module__ != algebra.__name__]


def algebra_examples() -> list[pb.LinearOperator]:
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    A, C = pb.MatrixMult(m), pb.MatrixMult(m * (1 + 2j))
    D, G = pb.FirstDerivative((3, 4)), pb.Gradient((3, 4))
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    return [
        A + C,
        D + 2 * pb.SecondDerivative((3, 4)) - pb.Identity((3, 4)),
        A @ pb.Diagonal(torch.arange(4.0, dtype=torch.float64)) @ C,
        G.H @ G,
        weight * D,
        (1 - 2j) * A,
        A.H,
        C.conj(),
        C.T,
        D.T,
        A**3,
        0.5 * G.gram + pb.Identity((3, 4)),
        pb.Real(4) @ C,
        C.H @ pb.Real(4).H @ pb.Real(4) @ C,
        pb.VStack([pb.Real(4), pb.Imag(4)]),
        pb.VStack([pb.Conj(4), C]).H,
        pb.Conj(4) + C,
        pb.BlockDiag([pb.Real(3), pb.Identity(2)]),
        _Square(4).linearize(m[0]),
        A @ _Square(4).linearize(m[1]),
    ]


class _Square(pb.Operator):
    """y = x^2, for the derivative of a non-linear operator."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x
