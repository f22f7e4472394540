"""Implicit differentiation: the derivative of s where F(s, theta) = 0, without looking at how s was found.

    ds = -J^-1 (dF/dtheta) dtheta,    gradient in theta = -(dF/dtheta)^H J^-H g,    J = dF/ds.

The linear systems in J are again equations of this kind, so derivatives of every order follow.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pullback.core import maps
from pullback.core.errors import NotDifferentiableError
from pullback.core.operator import LinearOperator, Operator
from pullback.functionals.arithmetic import is_live
from pullback.linops import FunctionOperator
from pullback.solvers.problem import Problem
from pullback.solvers.status import AccuracyWarning, AdjointSolve, ConvergenceError, Solution, Status

_numbers = itertools.count()

HIDDEN = (
    "{owner}: the equation depends on a tensor that requires grad but that neither the operator, the functionals nor "
    "the arguments hold, so its gradient would be lost; assign the tensor as an attribute of the operator (or "
    "functional), pass it among the parameters of a function, or use unroll=True"
)


@dataclass(frozen=True)
class Linear:
    """How the systems J v = g are solved.

    Args:
        solver: called as solver(J, g, rtol=..., maxiter=...), J acting on the members of the state.
        symmetric: J is self-adjoint.
        rtol, maxiter: passed on.
    """

    solver: Callable[..., Solution]
    symmetric: bool
    rtol: float
    maxiter: int


class Root(maps.Map):
    """s(tensors) with F(s, tensors) = 0.

    Args:
        owner: the solver's name, for messages.
        residual: F(s, tensors), differentiable torch, one member like another along leading axes.
        solve: tensors without derivatives -> s.
        n: how many axes a member of s has.
        ranks: how many axes each tensor has; further leading axes come from vmap.
        whole: which tensors cannot have leading axes (those inside operators), so that their members come one by one.
        linear: how linear systems are solved.
        reports: where each solve is reported.
    """

    def __init__(
        self,
        owner: str,
        residual: Callable[..., Tensor],
        solve: Callable[[Sequence[Tensor]], Tensor],
        n: int,
        ranks: tuple[int, ...],
        whole: tuple[bool, ...],
        linear: Linear,
        reports: list[AdjointSolve],
    ) -> None:
        self.key = f"solve:{next(_numbers)}:{owner}"
        self.owner, self.residual, self.solve, self.n = owner, residual, solve, n
        self.ranks, self.whole, self.linear, self.reports = ranks, whole, linear, reports
        self.rank = -1  # of s, known once it is solved
        self._related: dict[str, Root] = {}

    def event(self) -> tuple[int, ...]:
        """All axes that a tensor had when the equation was made."""
        return self.ranks

    def over(self, tensors: Sequence[Tensor]) -> Tensor:
        """s(tensors) for tensors with one more leading axis, or size 1 there."""
        extra = [t.ndim - r for t, r in zip(tensors, self.ranks, strict=True)]
        if not any(e and w for e, w in zip(extra, self.whole, strict=True)):
            return maps.call(self, tensors)
        depth = max(extra)
        size = max(t.shape[0] for t, e in zip(tensors, extra, strict=True) if e == depth)
        members = []
        for i in range(size):
            picked = [t if e < depth else t[i if t.shape[0] > 1 else 0] for t, e in zip(tensors, extra, strict=True)]
            members.append(self.over(picked) if depth > 1 else maps.call(self, picked))
        return torch.stack(members)

    def evaluate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The numbers."""
        tensors = [t.detach() for t in tensors]  # not all who trace have done so
        s = self.solve(tensors)
        with torch.enable_grad():
            hidden = self.residual(s, *tensors).requires_grad
        if hidden:
            raise NotDifferentiableError(HIDDEN.format(owner=self.owner))
        return s

    def fake(self, tensors: Sequence[Tensor]) -> Tensor:
        """A solution is not traced."""
        raise NotDifferentiableError(
            f"{self.owner}: solvers look at their numbers, so they cannot be traced; call the solver outside of "
            f"torch.compile(fullgraph=True) and torch.export"
        )

    def pullback(
        self, tensors: Sequence[Tensor], out: Tensor, g: Tensor, wanted: Sequence[int]
    ) -> Sequence[Tensor | None]:
        """-(dF/dtheta)^H J^-H g."""
        level = self._level(tensors)
        v = maps.call(self._relative("cotangent", level, out), (g, out, *level))
        pull = torch.func.vjp(self._of(tensors, wanted, out), *(tensors[i] for i in wanted))[1]
        return [-p for p in pull(v)]

    def pushforward(self, tensors: Sequence[Tensor], out: Tensor, tangents: Sequence[Tensor | None]) -> Tensor | None:
        """-J^-1 dF/dtheta dtheta."""
        moving = [i for i, t in enumerate(tangents) if t is not None]
        if not moving:
            return None
        primals = tuple(tensors[i] for i in moving)
        change = _push(self._of(tensors, moving, out), primals, tuple(tangents[i] for i in moving), out)
        level = self._level(tensors)
        return maps.call(self._relative("tangent", level, out), (-change, out, *level))

    def _level(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors with as many leading axes (of size 1) as the one that has most, so that further ones align."""
        most = max(t.ndim - r for t, r in zip(tensors, self.ranks, strict=True))
        return [
            t if whole or t.ndim - r == most else t.reshape(*(1,) * (most - t.ndim + r), *t.shape)
            for t, r, whole in zip(tensors, self.ranks, self.whole, strict=True)
        ]

    def _of(self, tensors: Sequence[Tensor], chosen: Sequence[int], s: Tensor) -> Callable[..., Tensor]:
        """F as a function of the chosen tensors alone."""

        def function(*values: Tensor) -> Tensor:
            every = list(tensors)
            for i, v in zip(chosen, values, strict=True):
                every[i] = v
            return self.residual(s, *every)

        return function

    def _relative(self, kind: str, tensors: Sequence[Tensor], out: Tensor) -> Root:
        """The equation J^H v = g (cotangent) or J v = g (tangent), in which s and the tensors are tensors again."""
        ranks = (out.ndim, out.ndim, *(t.ndim for t in tensors))
        known = self._related.get(kind)
        if known is not None and known.ranks == ranks:
            return known

        def residual(v: Tensor, g: Tensor, s: Tensor, *tensors: Tensor) -> Tensor:
            v, s = torch.broadcast_tensors(v, s)  # under vmap one of them alone may have further leading axes

            def of_state(s: Tensor) -> Tensor:
                return self.residual(s, *tensors)

            if kind == "tangent":
                return _push(of_state, (s,), (v,), s) - g
            return torch.func.vjp(of_state, s)[1](v)[0] - g

        def solve(tensors: Sequence[Tensor]) -> Tensor:
            g, s, *rest = tensors
            return self._solve_linear(kind, g, s, rest)

        whole = (False, False, *self.whole)
        new = Root(f"{self.owner} ({kind})", residual, solve, self.n, ranks, whole, self.linear, self.reports)
        self._related[kind] = new
        return new

    def _solve_linear(self, kind: str, g: Tensor, s: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        rank = max(g.ndim, s.ndim)
        g, s = (t.expand(*(1,) * (rank - t.ndim), *t.shape) for t in (g, s))
        g, s = torch.broadcast_tensors(g, s)
        J: LinearOperator = _Jacobian(lambda s: self.residual(s, *tensors), s, self.n)
        if kind == "cotangent" or self.linear.symmetric:
            J = J.H
        options = self.linear
        solution = options.solver(J, _real(g), rtol=options.rtol, maxiter=options.maxiter)
        self._report(kind, solution)
        v = solution.x
        return torch.view_as_complex(v.contiguous()) if s.is_complex() else v

    def _report(self, kind: str, solution: Solution) -> None:
        last = next(iter(solution.history.values()))
        first = last[0].clamp(min=torch.finfo(last.dtype).tiny)
        residual = float((last[-1] / first).max())
        report = AdjointSolve(kind, solution.method, solution.status, solution.iterations, residual)
        self.reports.append(report)
        if solution.status in (Status.DIVERGED, Status.BREAKDOWN, Status.NOT_FINITE, Status.NOT_SELF_ADJOINT):
            raise ConvergenceError(
                f"{self.owner}: the gradient cannot be computed, because the {kind} solve by {solution.method} failed: "
                f"{solution.status}; use unroll=True, or add damping so that the solution is unique",
                solution,
            )
        if not solution.status.ok:
            warnings.warn(
                f"{self.owner}: the {kind} solve by {solution.method} stopped at a relative residual of "
                f"{residual:.1e} after {solution.iterations} iterations ({solution.status}); the gradient has an error "
                f"of that order; increase adjoint_maxiter or loosen adjoint_rtol",
                AccuracyWarning,
                stacklevel=2,
            )


def _push(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Any, ...], like: Tensor
) -> Tensor:
    """The derivative of a function, whose value is like `like`, along tangents.

    By two pullbacks: torch has no forward mode within forward mode.
    """
    twice = torch.func.vjp(lambda u: torch.func.vjp(function, *primals)[1](u), torch.zeros_like(like))[1]
    result: Tensor = twice(tangents)[0]
    return result


class _Jacobian(LinearOperator):
    """v -> J v for each member, J = dF/ds; complex states as pairs of real numbers."""

    point: Tensor  # s, F(s) with its graph, a probe u of F(s), and J^H u with its graph
    value: Tensor
    probe: Tensor
    pulled: Tensor | None

    def __init__(self, function: Callable[[Tensor], Tensor], s: Tensor, n: int) -> None:
        dims = tuple(s.shape[s.ndim - n :]) + ((2,) if s.is_complex() else ())
        super().__init__(dims or (1,))
        with torch.enable_grad():
            point = s.detach().clone().requires_grad_()
            value = function(point)
            probe = torch.zeros_like(value, requires_grad=True)
        self.__dict__.update(point=point, value=value, probe=probe, pulled=None, is_paired=s.is_complex())

    def _vector(self, v: Tensor) -> Tensor:
        v = torch.view_as_complex(v.contiguous()) if self.is_paired else v
        return v.reshape(self.point.shape)

    def _adjoint(self, v: Tensor) -> Tensor:
        if not self.value.requires_grad:  # F does not depend on s
            return torch.zeros_like(v)
        (g,) = torch.autograd.grad(self.value, self.point, self._vector(v), retain_graph=True, materialize_grads=True)
        return _real(g).reshape(v.shape)

    def _forward(self, v: Tensor) -> Tensor:
        pulled = self.pulled
        if pulled is None:
            with torch.enable_grad():
                (pulled,) = torch.autograd.grad(
                    self.value, self.point, self.probe, create_graph=True, materialize_grads=True
                )
            self.__dict__["pulled"] = pulled
        if not pulled.requires_grad:
            return torch.zeros_like(v)
        (g,) = torch.autograd.grad(pulled, self.probe, self._vector(v), retain_graph=True, materialize_grads=True)
        return _real(g).reshape(v.shape)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


# What a problem depends on ------------------------------------------------------------------------------------------


def watch(problem: Problem) -> None:
    """Let the first call of somebody's code raise if it uses a tensor with derivatives unseen.

    That is: A where it is not made of this library's operators, which hold what they use, and functions such as a
    denoiser. Derivatives do not depend on preconditioners.
    """
    A = problem.A
    if not all(type(m).__module__.startswith("pullback.") and not isinstance(m, FunctionOperator) for m in A.modules()):
        plain = problem.forward

        def unwatch() -> None:
            problem.forward = plain

        problem.forward = _watched(problem.owner, plain, unwatch)
    for name, part in problem.parts.items():
        if callable(part) and not isinstance(part, torch.nn.Module) and name != "preconditioner":
            problem.parts[name] = _watched(problem.owner, part, lambda: None)


def _watched(owner: str, function: Callable[..., Any], found_nothing: Callable[[], None]) -> Callable[..., Any]:
    looked = False

    def call(*args: Any) -> Any:
        nonlocal looked
        if looked:
            return function(*args)
        with torch.enable_grad():
            value = function(*args)
        if isinstance(value, Tensor) and value.requires_grad:
            raise NotDifferentiableError(HIDDEN.format(owner=owner))
        looked = True
        found_nothing()
        return value

    return call


def live_tensors(problem: Problem) -> tuple[list[Tensor], list[bool]]:
    """The tensors in which a derivative may be asked for, and whether each is held by an operator or a module."""
    found: dict[int, tuple[Tensor, bool]] = {}
    modules = [problem.A, *(p for p in problem.parts.values() if isinstance(p, torch.nn.Module))]
    for t in (problem.y, problem.x0, *problem.parts.values()):
        if isinstance(t, Tensor) and _differentiable(t):
            found[id(t)] = (t, False)
    for module in modules:
        for t in (*module.parameters(), *module.buffers()):
            if _differentiable(t):
                found[id(t)] = (t, True)
    return [t for t, _ in found.values()], [w for _, w in found.values()]


def _differentiable(t: Tensor) -> bool:
    return (t.is_floating_point() or t.is_complex()) and is_live(t)


def rebound(problem: Problem, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Problem:
    """The same problem with other values for the tensors, which may have further leading axes."""
    table = {id(t): v for t, v in zip(tensors, values, strict=True)}
    new = copy.copy(problem)
    extra: tuple[int, ...] = ()
    for t in (problem.y, problem.x0, *problem.parts.values()):
        v = table.get(id(t))
        if v is not None and v.ndim > t.ndim:
            extra = tuple(torch.broadcast_shapes(extra, v.shape[: v.ndim - t.ndim]))
    new.batch = (*extra, *problem.batch)
    new.y = _spread(table.get(id(problem.y), problem.y), new.batch, problem.A.dimsd)
    if problem.x0 is not None:
        new.x0 = _spread(table.get(id(problem.x0), problem.x0), new.batch, problem.A.dims)
    memo: dict[int, Any] = {}
    new.A = shadow(problem.A, table, memo)
    new.adjoint = new.A.H
    new.parts = {}
    for name, part in problem.parts.items():
        if isinstance(part, torch.nn.Module):
            part = shadow(part, table, memo)
        elif isinstance(part, Tensor):
            value = table.get(id(part), part)
            missing = len(problem.batch) - part.ndim
            if value.ndim > part.ndim and part.ndim and missing:
                value = value.reshape(*value.shape[: value.ndim - part.ndim], *(1,) * missing, *part.shape)
            elif value.ndim > part.ndim:
                value = value.reshape(*value.shape, *(1,) * missing)
            part = value
        new.parts[name] = part
    new._look()
    return new


def _spread(t: Tensor, batch: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    shape = t.shape[: t.ndim - len(dims)]
    return t if tuple(shape) == batch else t.expand(*batch, *dims)


def shadow(module: torch.nn.Module, table: dict[int, Tensor], memo: dict[int, Any]) -> Any:
    """A copy of a module that holds the values of a table in place of its tensors; whatever needs none is shared."""
    if id(module) in memo:
        return memo[id(module)]
    if not any(id(t) in table for ts in (module.parameters(), module.buffers()) for t in ts):
        return module
    new: Any = object.__new__(type(module))
    memo[id(module)] = new
    is_operator = isinstance(module, Operator)
    state = module.__getstate__() if is_operator else module.__dict__
    new.__dict__.update({k: _replaced(v, table, memo) for k, v in state.items()})
    for name in ("_parameters", "_buffers"):
        new.__dict__[name] = {k: t if t is None else table.get(id(t), t) for k, t in module.__dict__[name].items()}
    if is_operator:
        new._wake()
    return new


def _replaced(value: Any, table: dict[int, Tensor], memo: dict[int, Any]) -> Any:
    """What an attribute holds, with modules replaced by their shadows, one level into containers."""
    if isinstance(value, torch.nn.Module):
        return shadow(value, table, memo)
    if isinstance(value, dict) and any(isinstance(v, torch.nn.Module) for v in value.values()):
        return type(value)({k: _replaced(v, table, memo) for k, v in value.items()})
    if type(value) in (list, tuple) and any(isinstance(v, torch.nn.Module) for v in value):
        return type(value)(_replaced(v, table, memo) for v in value)
    return value
