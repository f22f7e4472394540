"""Random formulas, reductions, sizes, layouts and patterns: the compiled back end against the eager one."""

import itertools
import random

import pytest
import torch

from pullback.kernels.ir.expr import PARAMETER, I, J, builders, const, index, variable
from pullback.kernels.ir.primitives import PRIMITIVES
from pullback.kernels.reduce import Reducer

# Functions without poles, jumps or fast growth, so that both back ends see the same well-conditioned problem.
TAME = ["Sin", "Cos", "Tanh", "Sigmoid", "Atan", "Erf", "Softplus", "Asinh", "SinXDivX", "Abs", "ReLU", "Maximum"]
TAME += ["Minimum", "Where", "LessThan", "IfElse"]
FORMULAS = 25  # a seed


def formula(rng, leaves):
    """A random expression; vectors of several lengths, sums, distances, slices and concatenations among its parts."""
    pool = list(leaves)
    for _ in range(rng.randint(1, 8)):
        kind, last = rng.random(), rng.choice(pool)
        if kind < 0.15:
            new = builders["Sum"](last)
        elif kind < 0.25:
            new = builders["SqDist"](leaves[0], leaves[1])
        elif kind < 0.3:
            new = builders["Exp"](-builders["Square"](builders["Sin"](last)))
        elif kind < 0.35:
            new = builders["Concat"](builders["Gather"](last, tuple(rng.choices(range(last.dim), k=2))), last)
        else:
            name = rng.choice([*TAME, *["Add", "Subtract", "Mult"] * 6])
            arity = PRIMITIVES[name].arity
            first = rng.choice(pool[-3:])
            others = [rng.choice([p for p in pool if 1 in (p.dim, first.dim) or p.dim == first.dim]) for _ in range(3)]
            operands = [first, *others][:arity]
            if len({p.dim for p in operands} - {1}) > 1:
                continue
            new = builders[name](*operands)
        pool.append(new)
    return builders["Sin"](pool[-1]) if rng.random() < 0.5 else pool[-1]


def pattern(rng, m, n):
    """Random blocks of rows with spans of columns, as KeOps' six tensors (the last three unused)."""
    cuts = sorted({0, m, *(rng.randint(0, m) for _ in range(3))})
    blocks, ends, spans = [], [], []
    for a, b in itertools.pairwise(cuts):
        if rng.random() < 0.8:
            stops = sorted(rng.sample(range(n + 1), min(4, (n + 1) // 2 * 2)))
            spans += [list(s) for s in zip(stops[::2], stops[1::2], strict=True)]
            blocks.append([a, b])
            ends.append(len(spans))
    return [torch.tensor(t, dtype=torch.int64).reshape(shape) for t, shape in ((blocks, (-1, 2)), (ends, (-1,)))] + [
        torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)
    ]


def problem(rng):
    """(reducer, arguments in float64, ranges, whether values may be differentiated)."""
    dim = rng.choice([1, 2, 3, 5, 13, 20, 33])
    signature = [(dim, I), (dim, J), (1, J), (1, PARAMETER), (rng.choice([1, dim]), I)]
    leaves = [variable(p, d, category) for p, (d, category) in enumerate(signature)]
    f = formula(rng, [*leaves, index(I) * 0.01, index(J) * 0.02] if rng.random() < 0.1 else leaves)
    kind = rng.choice(["Sum"] * 4 + ["LogSumExp", "SumSoftMax", "Prod", "KMin", "KMin_ArgKMin", "Max", "Mean", "Var"])
    weight = None
    if kind in ("LogSumExp", "SumSoftMax"):
        f = builders["Sin"](builders["Sum"](f)) * 3
        weight = rng.choice([leaves[0], leaves[1], leaves[2]])
        if kind == "LogSumExp":
            weight = rng.choice([None, builders["Square"](weight) + 1])
    if kind == "Prod":
        f = 1 + const(0.2) * builders["Sin"](f)
    axis, batch = rng.choice([0, 1]), rng.choice([(), (), (2,), (2, 3)])
    m, n = rng.choice([0, 1, 2, 7, 16, 33, 100, 300]), rng.choice([0, 1, 2, 9, 31, 64, 257, 600])
    args = []
    for d, category in signature:
        lead = rng.choice([batch, ()])
        t = torch.rand({I: (*lead, m, d), J: (*lead, n, d)}.get(category, (*lead, d)), dtype=torch.float64) * 2 - 1
        args.append(t.mT.contiguous().mT if t.ndim >= 2 and rng.random() < 0.3 else t)
    ranges = None
    if axis == 1 and m and n and rng.random() < 0.2:
        ranges = (*pattern(rng, m, n), *pattern(rng, n, m))
    reducer = Reducer(
        kind,
        f,
        signature,
        axis,
        weight=weight,
        k=rng.choice([1, 2, 5, 12]),
        scheme=rng.choice(["block_sum", "block_sum", "direct_sum", "kahan_scheme"]),
        accumulator=rng.choice(["auto", "float64"]),
    )
    return reducer, args, ranges


def close(found, expected, tol, what):
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True):
        if b.is_floating_point():
            scale = b.detach().abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0
            torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol * max(scale, 1e-2), equal_nan=True, msg=what)


@pytest.mark.parametrize("seed", range(8))
def test_compiled_equals_eager(seed):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(FORMULAS):
        reducer, args, ranges = problem(rng)
        what = f"{reducer!r}, weight {reducer.weight}, shapes {[tuple(a.shape) for a in args]}, ranges {ranges}"
        wanted = [a.clone().requires_grad_() for a in args]
        given = [a.clone().requires_grad_() for a in args]
        expected = reducer(wanted, backend="eager", ranges=ranges)
        found = reducer(given, ranges=ranges)
        close(found, expected, 1e-9, what)
        if reducer.kind not in ("Var", "Mean"):  # their cancellation is checked elsewhere
            close(reducer([a.float() for a in args], ranges=ranges), expected, 3e-4, what)
        first, other = (t[0] if isinstance(t, tuple) else t for t in (expected, found))
        if ranges is None and first.requires_grad and first.isfinite().all():
            g = torch.randn_like(first)
            slow = torch.autograd.grad(first, wanted, g, allow_unused=True)
            fast = torch.autograd.grad(other, given, g, allow_unused=True)
            for a, b in zip(fast, slow, strict=True):
                assert (a is None) == (b is None), what
                if b is not None:
                    close(a, b, 1e-8, what)


@pytest.mark.parametrize("axis", [0, 1])
def test_long_vectors_of_one_axis(axis):
    """Loops over components inside loops that are packed, and long results that depend on one axis only."""
    torch.manual_seed(0)
    signature = ((13, I), (13, J))
    x, y = variable(0, 13, I), variable(1, 13, J)
    for own in (x, y):
        inner = builders["Sum"](builders["Cosh"](own))
        cases = [("Sum", own * inner, None), ("LogSumExp", builders["Sin"](inner) * 3, builders["Square"](own) + 1)]
        for kind, f, weight in cases:
            reducer = Reducer(kind, f, signature, axis, weight=weight)
            args = [torch.rand(n, 13, dtype=torch.float64, requires_grad=True) for n in (7, 31)]
            expected = reducer(args, backend="eager")
            close(reducer(args), expected, 1e-12, kind)
            wanted = args[0 if own is x else 1]
            g = torch.randn_like(expected)
            (fast,) = torch.autograd.grad(reducer(args), wanted, g)
            (slow,) = torch.autograd.grad(expected, wanted, g)
            close(fast, slow, 1e-12, kind)
