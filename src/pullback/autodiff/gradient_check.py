"""Is the gradient of a function right? Random directions, Taylor remainders, and the operation that is to blame.

For a random direction d and random weights w, phi(t) = Re<w, f(x + t d)> is a function of one number. Its derivative
by autograd, reverse and forward, is compared with Richardson's extrapolation of differences, which knows its own error;
so an error of 1e-6 is seen, in any number of dimensions, by some fifty evaluations of f.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten

from pullback.autodiff.gradient_culprit import first_wrong, watched, wrong_operator
from pullback.autodiff.gradient_report import GradientReport, GradientResult
from pullback.autodiff.numeric import NumericDerivative, numeric_derivative
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.linearize import forward_mode

_RTOL = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_EPS = torch.finfo(torch.float64).eps
_LADDER = 12  # steps h, each half of the one before, over which remainders are looked at


def check_gradient(
    f: Callable[..., Any],
    *inputs: Any,
    parameters: bool = False,
    forward: bool = True,
    n_directions: int = 2,
    rtol: float | None = None,
    seed: int = 0,
    throw: bool = True,
) -> GradientReport:
    """Compare the derivatives of f by autograd, reverse and forward, with Richardson differences in random directions.

    Every input is moved by itself, so the report says in which one the gradient is wrong; and if one is, every custom
    autograd.Function and every operation of f is tested by itself, so it says which of them is to blame, in which line.

    Args:
        f: a function of `inputs` to a tensor or a tree of tensors, or a module.
        inputs: tensors or trees of tensors, real or complex; those that are not floating point are passed on.
        parameters: also check the gradient in every parameter of the module f.
        forward: also check forward mode; an operation without a forward derivative is a line "skipped".
        n_directions: random directions for each input.
        rtol: the largest error, relative to the derivative, beside the error bar of the differences. By default 1e-6
            in float64, 1e-3 in float32 (for which differences are taken in float64 where f accepts that).
        seed: of the random directions. f must not draw random numbers.
        throw: raise CheckError if the check fails; else look at `report.ok`.

    Returns: a GradientReport. Kinks: where the derivatives to both sides differ, and autograd's lies between them, the
        line says "kink" and does not fail.

    Raises: CheckError with the table as its text: a wrong or missing derivative, in-place changes of an input, results
        that differ between two calls, or that are not finite. ArgumentError if there is nothing to check.

    Cost: about 50 evaluations of f for each input tensor and direction, whatever its size.

    Not checked: derivatives of second order, and points other than x.
    """
    if not callable(f):
        raise ArgumentError(f"check_gradient: f must be a function or a module; got {type(f).__name__}")
    if parameters and not isinstance(f, torch.nn.Module):
        raise ArgumentError(
            f"check_gradient: parameters=True needs a module; got {type(f).__name__}; pass the tensors as inputs"
        )
    if torch.is_inference_mode_enabled():
        raise ArgumentError("check_gradient cannot run under torch.inference_mode(), which has no gradients")
    if n_directions < 1:
        raise ArgumentError(f"check_gradient: n_directions must be at least 1; got {n_directions}")
    problem = _Problem(f, inputs, parameters, seed)
    results = _preconditions(problem)
    if all(r.status != "failed" for r in results):
        rows = [r for leaf in problem.checked for r in _check_leaf(problem, leaf, forward, n_directions, rtol)]
        if any(r.status == "failed" for r in rows):
            rows = _blame(problem, rows)
        results += rows
    report = GradientReport(getattr(f, "__qualname__", type(f).__name__), tuple(results))
    if throw:
        report.raise_if_failed()
    return report


class _Problem:
    """f as a function of a list of tensors: the inputs' and, on request, the module's parameters."""

    def __init__(self, f: Callable[..., Any], inputs: tuple[Any, ...], parameters: bool, seed: int) -> None:
        self.f, self.generator = f, torch.Generator().manual_seed(seed)
        found, self.spec = tree_flatten_with_path(inputs)
        self.names = [f"input {keystr(path)[1:].replace(']', '', 1)}" for path, _ in found]
        self.leaves: list[Any] = [t.detach().clone() if isinstance(t, Tensor) else t for _, t in found]
        self.n_inputs = len(self.leaves)
        self.state: list[str] = []
        if isinstance(f, torch.nn.Module):
            for name, t in (*f.named_parameters(), *f.named_buffers()):
                self.state.append(name)
                self.names.append(f"parameter {name}")
                self.leaves.append(t.detach().clone())
        trained = {n for n, _ in f.named_parameters()} if isinstance(f, torch.nn.Module) and parameters else set()
        self.checked = [
            i
            for i, t in enumerate(self.leaves)
            if isinstance(t, Tensor)
            and (t.is_floating_point() or t.is_complex())
            and t.numel()
            and (i < self.n_inputs or self.state[i - self.n_inputs] in trained)
        ]
        if not self.checked:
            raise ArgumentError("check_gradient: none of the inputs is a floating point tensor with elements")
        self.single = any(_double(self.leaves[i]) is not self.leaves[i] for i in self.checked)
        self.wide = self.accepts_double()
        self.weights: Tensor | None = None

    def run(self, leaves: list[Any]) -> list[Tensor]:
        """The tensors that f returns for other values of all leaves."""
        inputs = tree_unflatten(leaves[: self.n_inputs], self.spec)
        if self.state:
            out = torch.func.functional_call(
                self.f,  # type: ignore[arg-type]
                dict(zip(self.state, leaves[self.n_inputs :], strict=True)),
                inputs,
            )
        else:
            out = self.f(*inputs)
        return [t for t in tree_leaves(out) if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]

    def copies(self) -> list[Any]:
        return [t.clone() if isinstance(t, Tensor) else t for t in self.leaves]

    def accepts_double(self) -> bool:
        """Whether f works in double precision, so that differences of a float32 function can be exact."""
        if not self.single:
            return True
        try:
            with torch.no_grad():
                out = self.run([_double(t) for t in self.copies()])
        except Exception:  # whatever f raises, it has not worked
            return False
        return bool(out) and all(_double(t) is t for t in out)

    def numbers(self, leaves: list[Any]) -> Tensor:
        """The result as one real vector."""
        parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in self.run(leaves)]
        if not any(p.numel() for p in parts):
            raise ArgumentError("check_gradient: f returns no floating point tensor with elements")
        return torch.cat([p.reshape(-1) for p in parts])

    def moved(self, i: int, t: Tensor) -> Tensor:
        """The result for leaf i = t in double precision, computed in double precision if f can."""
        leaves = [_double(s) if self.wide and isinstance(s, Tensor) else s for s in self.copies()]
        leaves[i] = t if self.wide else t.to(self.leaves[i].dtype)
        return self.numbers(leaves).double()

    def random(self, like: Tensor) -> Tensor:
        """Random numbers of the shape and dtype of a tensor."""
        return torch.randn(like.shape, dtype=_double(like).dtype, generator=self.generator).to(like)


def _double(t: Any) -> Any:
    if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
        return t
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def _preconditions(problem: _Problem) -> list[GradientResult]:
    """What must hold before a derivative makes sense."""
    leaves = problem.copies()
    with torch.no_grad():
        first = problem.numbers(leaves)
        again = [problem.numbers(problem.copies()) for _ in range(3)]  # dropout may agree once or twice
    failures = []
    for name, before, after in zip(problem.names, problem.leaves, leaves, strict=True):
        if isinstance(before, Tensor) and name.startswith("input") and not _alike(before, after, 0.0):
            text = "f changes this input in place; work on a copy: x = x.clone()"
            failures.append(GradientResult(name, "", "failed", detail=text))
    if not all(_alike(first, other, 1e-5 if problem.single else 1e-10) for other in again):
        text = "calls with the same input differ: f is random or keeps a state; set a seed inside f, or use eval()"
        failures.append(GradientResult("result", "", "failed", detail=text))
    elif not first.isfinite().all():
        text = f"f(x) is not finite: {int((~first.isfinite()).sum())} of {first.numel()} numbers"
        failures.append(GradientResult("result", "", "failed", detail=text))
    return failures


def _alike(a: Tensor, b: Tensor, rtol: float) -> bool:
    """Equal but for the rounding of sums in another order."""
    if a.shape != b.shape:
        return False
    scale = a.abs().nan_to_num(0.0, 0.0, 0.0).max() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=rtol * float(scale), equal_nan=True)


def _check_leaf(
    problem: _Problem, i: int, forward: bool, n_directions: int, rtol: float | None
) -> list[GradientResult]:
    """The worst of the directions, in both modes."""
    point = problem.leaves[i]
    worst: dict[str, GradientResult] = {}
    for _ in range(n_directions):
        d = problem.random(point)
        numeric = numeric_derivative(lambda t: problem.moved(i, t), point, d, rounding=_EPS if problem.wide else 1.2e-7)
        w = torch.randn(numeric.value.shape, dtype=torch.float64, generator=problem.generator).to(numeric.value)
        tolerance = rtol if rtol is not None else _RTOL[torch.empty((), dtype=point.dtype).abs().dtype]
        for mode in ("reverse", "forward") if forward else ("reverse",):
            row = _judge(problem, i, mode, d, w, numeric, tolerance)
            old = worst.get(mode)
            if old is None or _badness(row) > _badness(old):
                worst[mode] = row
    return list(worst.values())


def _badness(row: GradientResult) -> tuple[int, float]:
    return ["skipped", "passed", "kink", "failed"].index(row.status), row.error


def _judge(
    problem: _Problem, i: int, mode: str, d: Tensor, w: Tensor, numeric: NumericDerivative, rtol: float
) -> GradientResult:
    """One line: the derivative in leaf i along d, weighted with w, in one mode."""
    name = problem.names[i]
    want, bar = float(w @ numeric.value), 3 * float(torch.linalg.vector_norm(w * numeric.error))
    scale = max(abs(want), float(torch.linalg.vector_norm(w * numeric.value)))
    try:
        got, missing = (_reverse if mode == "reverse" else _forward)(problem, i, d, w)
    except Exception as reason:  # whatever a backward or jvp raises is a line of the report
        text = " ".join(str(reason).split())[:200]
        if mode == "forward" and isinstance(reason, (NotImplementedError, NotDifferentiableError)):
            return GradientResult(name, mode, "skipped", detail=f"no forward derivative: {text}")
        return GradientResult(name, mode, "failed", detail=f"{type(reason).__name__}: {text}")
    row = GradientResult(name, mode, "passed", got, want, bar, _slopes(problem, i, d, w, got))
    # Where the derivative is zero, autograd's is the rounding of sums that cancel.
    eps = torch.finfo(problem.leaves[i].dtype).eps
    rounding = 32 * eps * _magnitude(problem, i, d, w) / _size(problem.leaves[i], d)
    right = abs(got - want) <= rtol * scale + bar + rounding
    if right and not row.slopes[1] < 1.5:
        return row
    finer = None if right else _finer(problem, i, d, w, got, rtol * scale)
    if finer is not None:
        return replace(row, numeric=finer)
    kink = _kink(problem, i, d, w, got, rtol, scale)
    if kink is not None:
        return replace(row, status=kink[0], detail=kink[1])
    if right:
        return row
    if missing:
        text = f"the gradient is {missing}, but f depends on this input"
    elif want:
        text = f"the gradient is wrong: autograd / differences = {got / want:.6g}"
    else:
        text = "the gradient is not zero, but f does not depend on this input"
    return replace(row, status="failed", detail=text)


def _finer(problem: _Problem, i: int, d: Tensor, w: Tensor, got: float, tolerance: float) -> float | None:
    """Differences with smaller steps, if they agree with autograd: a kink a little away from x disturbs the larger."""
    for part in (1e-3, 2e-5) if problem.wide else ():
        step = part * _size(problem.leaves[i], d)
        numeric = numeric_derivative(lambda t: problem.moved(i, t), problem.leaves[i], d, step=step)
        want, bar = float(w @ numeric.value), 3 * float(torch.linalg.vector_norm(w * numeric.error))
        if bar <= 10 * tolerance and abs(got - want) <= tolerance + bar:
            return want
    return None


def _reverse(problem: _Problem, i: int, d: Tensor, w: Tensor) -> tuple[float, str]:
    """(<gradient, d>, "None" or "zero" if it is that)."""
    leaves = problem.copies()
    leaves[i].requires_grad_()
    with torch.enable_grad():
        y = problem.numbers([t * 1 if j == i else t for j, t in enumerate(leaves)])
    if not y.requires_grad:
        return 0.0, "None"
    (g,) = torch.autograd.grad(y, leaves[i], w.to(y.dtype), allow_unused=True)
    if g is None:
        return 0.0, "None"
    g = _double(g).reshape(-1)
    return float(torch.vdot(g, _double(d).reshape(-1)).real), "" if g.any() else "zero"


def _forward(problem: _Problem, i: int, d: Tensor, w: Tensor) -> tuple[float, str]:
    leaves = problem.copies()
    with forward_mode(), forward_ad.dual_level(), torch.no_grad():
        leaves[i] = forward_ad.make_dual(leaves[i], d)
        tangent = forward_ad.unpack_dual(problem.numbers(leaves)).tangent
    if tangent is None:
        return 0.0, "None"
    return float(w @ tangent.double()), "" if tangent.any() else "zero"


def _values(problem: _Problem, i: int, d: Tensor, steps: list[float]) -> list[Tensor]:
    """f(x + hd) for every h."""
    point, d = _double(problem.leaves[i]), _double(d)
    with torch.no_grad():
        return [problem.moved(i, point + h * d) for h in steps]


def _size(t: Tensor, d: Tensor) -> float:
    """How far t can go along d until it has changed by its own size."""
    reach = float(t.abs().max())
    return (reach or 1.0) / max(float(d.abs().max()), 1e-300)


def _slopes(problem: _Problem, i: int, d: Tensor, w: Tensor, derivative: float) -> tuple[float, float]:
    """Orders of the remainders of degree 0 and 1 in h, from those above rounding."""
    h0 = 0.05 * _size(problem.leaves[i], d)
    steps = [h0 * 0.5**k for k in range(_LADDER)]
    base, *values = (float(w @ y) for y in _values(problem, i, d, [0.0, *steps]))
    eps = _EPS if problem.wide else 1.2e-7
    magnitude = _magnitude(problem, i, d, w)
    # Autograd's derivative is itself rounded, to float32 where the input is.
    floors = [1e3 * _EPS * magnitude if problem.wide else 10 * eps * magnitude for _ in steps]
    rounded = [
        f + (1e-5 if problem.single else 1e-12) * abs(h * derivative) for f, h in zip(floors, steps, strict=True)
    ]
    zeroth = [abs(v - base) for v in values]
    first = [abs(v - base - h * derivative) for h, v in zip(steps, values, strict=True)]
    return _order(steps, zeroth, floors), _order(steps, first, rounded)


def _order(steps: list[float], remainders: list[float], floors: list[float]) -> float:
    """The median slope of log remainder against log h; inf if the remainder is rounding only."""
    triples = zip(steps, remainders, floors, strict=True)
    points = [(math.log(h), math.log(r)) for h, r, floor in triples if r > floor]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
    return sorted(slopes)[len(slopes) // 2] if slopes else math.inf


def _magnitude(problem: _Problem, i: int, d: Tensor, w: Tensor) -> float:
    """The size of the numbers of which phi is the sum."""
    return float(torch.linalg.vector_norm(w * _values(problem, i, d, [0.0])[0]))


def _kink(
    problem: _Problem, i: int, d: Tensor, w: Tensor, got: float, rtol: float, scale: float
) -> tuple[str, str] | None:
    """(status, text) if the derivatives to both sides of x surely differ.

    A smooth function's difference between the two falls with h; a kink's does not.
    """
    h = (1e-4 if problem.wide else 1e-2) * _size(problem.leaves[i], d)
    pairs = []
    for step in (h, h / 8):
        base, *v = _values(problem, i, d, [0.0, -step, -2 * step, step, 2 * step])
        # Three points to each side: second order, so that curvature is no kink.
        pairs.append(((3 * base - 4 * v[0] + v[1]) / (2 * step), (-3 * base + 4 * v[2] - v[3]) / (2 * step)))
    wide, narrow = (right - left for left, right in pairs)
    left, right = (w * side for side in pairs[1])
    sure = torch.where(narrow.abs() > 0.5 * wide.abs(), narrow, 0.0)
    size = max(scale, float(left.abs().sum()), float(right.abs().sum()))
    noise = 1e3 * (_EPS if problem.wide else 1.2e-7) * _magnitude(problem, i, d, w) / h
    if float((w * sure).abs().sum()) <= 100 * rtol * size + noise:
        return None
    low, high = float(torch.minimum(left, right).sum()), float(torch.maximum(left, right).sum())
    text = f"f has a kink at or near x: its derivatives to both sides are {left.sum():.6g} and {right.sum():.6g}"
    if low - rtol * size <= got <= high + rtol * size:
        return "kink", f"{text}; autograd's is one between; check at another x too"
    return "failed", f"{text}, and autograd's is none between; check at another x"


def _blame(problem: _Problem, rows: list[GradientResult]) -> list[GradientResult]:
    """Add to failed lines which operation is to blame."""
    leaves = problem.copies()
    for i in problem.checked:
        leaves[i].requires_grad_()
    made: list[Tensor] = []
    # What an operation raises has been reported; those before it are known now.
    with torch.enable_grad(), watched() as watch, contextlib.suppress(Exception):
        made = problem.run([t * 1 if i in problem.checked else t for i, t in enumerate(leaves)])
    found: dict[str, str] = {}

    def with_culprit(row: GradientResult) -> GradientResult:
        if row.status != "failed" or math.isnan(row.got) or "kink" in row.detail:
            return row
        if row.mode not in found:
            found[row.mode] = first_wrong(watch.calls, row.mode == "forward") or wrong_operator(made)
        if found[row.mode]:
            why = f"to blame is {found[row.mode]}"
        elif watch.cuts:
            why = f"no gradient passes through {', '.join(watch.cuts)}"
        elif row.got == 0:
            why = "was it cut off by detach(), .data, .item(), no_grad(), a cast to integers, argmax or rounding?"
        else:
            why = "every operation is right by itself: look for hooks, .data and writes in place"
        return replace(row, detail=f"{row.detail}; {why}")

    return [with_culprit(row) for row in rows]
