"""Unrolled: a solver with a fixed number of iterations as a network, whose numbers and proxes are learned."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.functionals import Functional
from pullback.functionals.base import Step
from pullback.solvers.composite import default_step
from pullback.solvers.problem import Problem
from pullback.solvers.status import Solution

_GRADIENT_STEPS = ("ista", "fista", "landweber", "davis_yin", "plug_and_play")  # step=None is `default_step` there


class LearnedProx(Functional):
    """A functional that is known by its prox alone: prox(x, step) = module(x).

    Args:
        module: maps (..., *dims) to the same shape.
        dims: shape of one member of the batch; see `Functional`.

    Its value is unknown and counts as 0 in histories.
    """

    def __init__(self, module: Callable[[Tensor], Tensor], dims: Any = None) -> None:
        super().__init__(dims)
        if not callable(module):
            raise ArgumentError(f"LearnedProx: module must be callable as module(x); got {type(module).__name__}")
        self.module = module

    def _value(self, x: Tensor, n: int) -> Tensor:
        return torch.zeros(x.shape[: x.ndim - n], dtype=x.dtype.to_real(), device=x.device)

    def _prox(self, x: Tensor, step: Step, n: int) -> Tensor:
        u = self.module(x)
        if not isinstance(u, Tensor) or u.shape != x.shape:
            came = tuple(u.shape) if isinstance(u, Tensor) else type(u).__name__
            raise ArgumentError(f"LearnedProx: module must return the shape of its input {tuple(x.shape)}; got {came}")
        return u


class Unrolled(torch.nn.Module):
    """x_n(A, y), n iterations of a solver, with numbers c_k = c exp(theta_k) and proxes of its own in each iteration.

    Args:
        solver: any solver of this library that iterates, such as `pullback.ista` or `pullback.admm`.
        n: iterations.
        learn: which numbers are learned: names of the solver's own arguments ("step", "penalty", "damp" ...), and
            "weight" for the factor before the regularizer. theta starts at 0: at first the network is the solver.
        prox: a module, applied in place of the prox of the regularizer in every iteration (shared weights), or a list
            of n modules.
        arguments: what the solver takes besides A, y and x0, such as `regularizer=0.1 * pullback.TV(dims)`.

    `net(A, y, x0=None)` gives x. A, y, and the parameters of the operator, the functionals and the modules get their
    gradients through the iterations, whose memory grows with n.

    Raises: ArgumentError.
    Source: Gregor & LeCun 2010 (learned ISTA); Adler & Oktem 2018, doi 10.1109/TMI.2018.2799231.
    """

    def __init__(
        self,
        solver: Callable[..., Solution],
        n: int,
        learn: Sequence[str] = ("step",),
        *,
        prox: Any = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        if not callable(solver):
            raise ArgumentError(f"Unrolled: solver must be a solver such as pullback.ista; got {type(solver).__name__}")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ArgumentError(f"Unrolled: n must be an int >= 1; got {n!r}")
        if isinstance(learn, str) or not all(isinstance(name, str) for name in learn):
            raise ArgumentError(f"Unrolled: learn must be a list of names such as ['step']; got {learn!r}")
        self.solver, self.n = solver, n
        self.theta = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(n)) for name in learn})
        modules = list(prox) if isinstance(prox, (list, tuple, torch.nn.ModuleList)) else [prox] * (prox is not None)
        if len(modules) not in (0, 1, n):
            raise ArgumentError(f"Unrolled: prox must be one module or {n}, one an iteration; got {len(modules)}")
        self.proxes = torch.nn.ModuleList([LearnedProx(m) for m in modules])
        if self.proxes:
            name = next((k for k in ("regularizer", "g") if k in arguments), _regularizer_name(solver))
            if arguments.get(name) is not None:
                raise ArgumentError(f"Unrolled: give either prox or {name}, not both")
            arguments[name] = self.proxes[0]
        self.held = torch.nn.ModuleDict({k: v for k, v in arguments.items() if isinstance(v, torch.nn.Module)})
        self.arguments = {k: v for k, v in arguments.items() if k not in self.held}

    def forward(self, A: Any, y: Any, x0: Any = None) -> Any:
        """The iterate after n iterations, of the form that the solver gives."""
        return self.solve(A, y, x0).x

    def solve(self, A: Any, y: Any, x0: Any = None) -> Solution:
        """The same with the history."""
        return self.solver(
            A, y, x0=x0, maxiter=self.n, unroll=True, schedule=self._problem_of,
            **dict(self.held.items()), **self.arguments, **_no_tolerance(self.solver),
        )  # fmt: skip

    def _problem_of(self, problem: Problem, k: int) -> Problem:
        """The problem of iteration k."""
        new = copy.copy(problem)
        new.parts = dict(problem.parts)
        terms = [name for name in new.parts if name.startswith("term")]
        if len(self.proxes) > 1:
            new.parts[terms[0]] = self.proxes[k]
        for name, theta in self.theta.items():
            factor = theta[k].exp()
            if name == "weight" and terms:
                for term in terms:
                    new.parts[term] = new.parts[term] * factor
                continue
            known = [p for p, v in new.parts.items() if p in ("step", "penalty") or isinstance(v, (float, Tensor))]
            if name not in known:
                raise ArgumentError(
                    f"Unrolled: {problem.owner} has no number {name!r} to learn; it has "
                    f"{', '.join([*known, *(['weight'] if terms else [])])}"
                )
            if new.parts[name] is None and not (name == "step" and problem.owner in _GRADIENT_STEPS):
                raise ArgumentError(f"Unrolled: give {name}=..., the number from which learning starts")
            value = default_step(problem) if name == "step" else new.parts[name]
            new.parts[name] = value * factor.to(problem.y.dtype.to_real())
        new._look()
        return new

    def extra_repr(self) -> str:
        """The solver and what is learned."""
        learned = [*self.theta, *(["prox"] if self.proxes else [])]
        return f"{getattr(self.solver, '__name__', self.solver)}, n={self.n}, learn={learned}"


def _regularizer_name(solver: Any) -> str:
    return "regularizer" if "regularizer" in inspect.signature(solver).parameters else "g"


def _no_tolerance(solver: Any) -> dict[str, float]:
    known = inspect.signature(solver).parameters
    return {name: 0.0 for name in ("rtol", "atol", "btol") if name in known}
