"""Non-linear problems: where x and y live, the map among the parts, its Jacobian, objectives and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pullback.core.algebra import Composition
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError
from pullback.core.operator import LinearOperator, Operator, OperatorLike
from pullback.core.shapes import as_dims, complex_of, real_of
from pullback.functionals import Functional
from pullback.functionals.arithmetic import is_live
from pullback.solvers.cg import cg
from pullback.solvers.composite import DataTerm, terms_of
from pullback.solvers.problem import Problem, _enter
from pullback.solvers.run import Equation
from pullback.solvers.scalars import Number
from pullback.solvers.status import ConvergenceError, Solution, Status


class _Spaces(LinearOperator):
    """The place of A in problems whose map is no linear operator: it tells where x and y live and cannot be applied."""

    def __init__(self, dims: Any, dimsd: Any, real_domain: bool, real_range: bool) -> None:
        super().__init__(dims, dimsd)
        self._real_domain, self._real_range = real_domain, real_range

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return real_of(dtype) if (self._real_domain if adjoint else self._real_range) else complex_of(dtype)


def stand_in(dims: Any, dimsd: Any, real_domain: bool, real_range: bool) -> LinearOperator:
    """The A of a problem whose map is not linear: shapes, and whether they are real."""
    return _Spaces(dims, dimsd, real_domain, real_range)


class Function(torch.nn.Module):
    """x -> f(x, *tensors) for any callable; what it depends on is what the module f and the tensors hold."""

    def __init__(self, owner: str, f: Callable[..., Tensor], tensors: Any = ()) -> None:
        super().__init__()
        tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        for t in tensors:
            if not isinstance(t, Tensor):
                raise ArgumentError(
                    f"{owner}: parameters must be a sequence of tensors, passed to the function after x; got "
                    f"{type(t).__name__} in it"
                )
        self.f, self.n = f, len(tensors)
        for i, t in enumerate(tensors):
            self.register_buffer(f"t{i}", t)

    def forward(self, x: Tensor) -> Tensor:
        """f(x, *tensors)."""
        return self.f(x, *(self._buffers[f"t{i}"] for i in range(self.n)))


def spaces(owner: str, F: Any, y: Any, x0: Any) -> tuple[LinearOperator, Any, bool]:
    """The A of a problem, its map F, and whether F depends on a live tensor, visible or not.

    Raises: ArgumentError, ShapeError, DtypeError.
    """
    F = F.operator() if isinstance(F, OperatorLike) else F
    if isinstance(F, LinearOperator):
        return F, F, False
    if not callable(F):
        raise ArgumentError(
            f"{owner}: A must be a pullback.Operator, or a function of x; got {type(F).__name__}; wrap a matrix with "
            f"MatrixMult"
        )
    if x0 is None:
        raise ArgumentError(f"{owner}: x0 must be given where A is not linear; zero may be a saddle point; give x0=")
    if isinstance(F, Operator):
        dims, dimsd = F.dims, F.dimsd
    else:
        dims, dimsd = (_shape(owner, t, name) for t, name in ((x0, "x0"), (y, "y")))
        F = Function(owner, F)
    value = probe(owner, F, x0, dims)
    if value.shape != dimsd:
        raise ShapeError(f"{owner}: A(x) must have shape {dimsd}, that of y; got {tuple(value.shape)}")
    return stand_in(dims, dimsd, not is_complex(x0), not value.is_complex()), F, is_live(value)


def _shape(owner: str, t: Any, name: str) -> tuple[int, ...]:
    shape = tuple(getattr(t, "shape", ()))
    if not shape:
        raise ShapeError(f"{owner}: {name} must be a tensor or array with at least one axis; got {t!r}; use shape (1,)")
    return shape


def member_dims(owner: str, x0: Any, dims: Any) -> tuple[int, ...]:
    """The shape of one member of x0: dims, or all of x0 if None."""
    return _shape(owner, x0, "x0") if dims is None else as_dims(dims, "dims", owner)


def is_complex(x: Any) -> bool:
    """Whether a tensor or an array is complex."""
    return bool(x.is_complex()) if isinstance(x, Tensor) else x.dtype.kind == "c"


def probe(owner: str, f: Any, x0: Any, dims: tuple[int, ...], *, whole: bool = False) -> Tensor:
    """F at the first member of x0 (at all of x0 if `whole`), with derivatives in what f depends on besides x."""
    x, _, batch = _enter(x0, dims, owner, "x0", "the function's input")
    x = x.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    value = evaluate(f, x if whole else x[(0,) * len(batch)])
    if not isinstance(value, Tensor):
        raise DtypeError(f"{owner}: the function must return a tensor; got {type(value).__name__}")
    return value


def expose(problem: Problem, depends: bool, unroll: bool) -> None:
    """Raise where the map depends on a live tensor that the problem does not see.

    Raises: NotDifferentiableError.
    """
    if not depends or problem.live:  # if others are live, the equation is looked at when it is differentiated
        return
    if not unroll:
        raise NotDifferentiableError(
            f"{problem.owner}: the function depends on a tensor that requires grad but that it does not hold, so its "
            f"gradient would be lost; pass the tensor with parameters=(...), assign it as an attribute of the operator "
            f"or module, or use unroll=True"
        )
    problem.live, problem.single = True, False


def evaluate(f: Any, x: Tensor) -> Tensor:
    """f(x) without the checks of a call."""
    return f._run(x) if isinstance(f, Operator) else f(x)


def require_dependence(value: Tensor) -> None:
    """Raise where autograd sees no way from F(x) to x: a gradient of zero would look like a minimum."""
    if not value.requires_grad:
        raise NotDifferentiableError(
            "the function has no derivative: autograd sees no way from its value to x; write it in torch without "
            "detach() and .numpy(), or define linearize(x) on the operator"
        )


# Jacobians ----------------------------------------------------------------------------------------------------------


class _Jacobian(LinearOperator):
    """v -> F'(x) v, each member of v with its own member of x; `value` is F(x).

    Without derivatives the graph of F at x is made once, and an application is one or two passes through it.
    """

    _native = True
    live: bool
    value: Tensor
    pull: Any  # g -> F'(x)^H g, where live
    graph: Tensor  # F(point), where not
    point: Tensor
    pulled: Tensor | None  # F'(x)^H seed, whose derivative in seed is F'(x)
    seed: Tensor

    def __init__(self, F: Any, x: Tensor, n: int, live: bool) -> None:
        known: dict[str, Any] = {"live": live}  # past __setattr__, which would make buffers of tensors
        if live:
            known["value"], known["pull"] = torch.func.vjp(lambda x: evaluate(F, x), x)[:2]
        else:
            with torch.enable_grad():
                point = x.detach().requires_grad_()
                graph = evaluate(F, point)
            require_dependence(graph)
            known |= {"value": graph.detach(), "graph": graph, "point": point, "pulled": None}
        batch = x.ndim - n
        super().__init__(x.shape[batch:], known["value"].shape[batch:])
        self.__dict__.update(known)
        self._real_domain, self._real_range = not x.is_complex(), not self.value.is_complex()
        self._clinear = self._real_domain and self._real_range

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return real_of(dtype) if (self._real_domain if adjoint else self._real_range) else complex_of(dtype)

    def _adjoint(self, y: Tensor) -> Tensor:
        if self.live:
            return self.pull(y)[0]
        y = y.reshape(self.graph.shape)
        return torch.autograd.grad(self.graph, self.point, y, retain_graph=True, materialize_grads=True)[0]

    def _forward(self, x: Tensor) -> Tensor:
        if self.live:
            return torch.func.vjp(lambda w: self.pull(w)[0], torch.zeros_like(self.value))[1](x)[0]
        pulled = self.pulled
        if pulled is None:
            with torch.enable_grad():
                seed = torch.zeros_like(self.value, requires_grad=True)
                (pulled,) = torch.autograd.grad(self.graph, self.point, seed, create_graph=True, materialize_grads=True)
            self.__dict__.update(seed=seed, pulled=pulled)
        x = x.reshape(pulled.shape)
        return torch.autograd.grad(pulled, self.seed, x, retain_graph=True, materialize_grads=True)[0]


class _Blocks(LinearOperator):
    """One operator for each member of a batch."""

    _native = True
    ops: tuple[LinearOperator, ...]

    def __init__(self, ops: Sequence[LinearOperator]) -> None:
        super().__init__(ops[0].dims, ops[0].dimsd)
        self.__dict__["ops"] = tuple(ops)
        self._real_domain, self._real_range = ops[0]._real_domain, ops[0]._real_range
        self._clinear = ops[0]._clinear

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return self.ops[0]._out_dtype(dtype, adjoint)

    def _members(self, x: Tensor, dims: tuple[int, ...], adjoint: bool) -> Tensor:
        rows = x.reshape(-1, *dims)
        out = torch.stack([op._run(row, adjoint) for op, row in zip(self.ops, rows, strict=True)])
        return out.reshape(*x.shape[: x.ndim - len(dims)], *out.shape[1:])

    def _forward(self, x: Tensor) -> Tensor:
        return self._members(x, self.dims, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._members(y, self.dimsd, True)


def linearization(F: Any, x: Tensor, n: int, live: bool) -> tuple[Tensor, LinearOperator]:
    """F(x) and F'(x), for x of shape (*batch, *dims); by `F.linearize` where an operator has its own."""
    if isinstance(F, LinearOperator):
        return F._run(x), F
    if isinstance(F, Composition):
        if any(map(_has_own, (F.outer, F.inner))):
            v, inner = linearization(F.inner, x, n, live)
            v = v.reshape(*x.shape[: x.ndim - n], *F.outer.dims)
            w, outer = linearization(F.outer, v, len(F.outer.dims), live)
            return w, outer @ inner
    elif _has_own(F):
        if x.ndim == n:
            return F._run(x), F.linearize(x)
        return F._run(x), _Blocks([F.linearize(row) for row in x.reshape(-1, *F.dims)])
    J = _Jacobian(F, x, n, live)
    return J.value, J


def _has_own(F: Any) -> bool:
    """Whether an operator brings its own `linearize`; then it need not be torch inside."""
    if isinstance(F, Composition):
        return _has_own(F.outer) or _has_own(F.inner)
    return isinstance(F, Operator) and not F.linear and type(F).linearize is not Operator.linearize


# Objectives ---------------------------------------------------------------------------------------------------------


class Objective:
    """phi(x) = f(x), or D(F(x)) + sum_i g_i(x): values and gradients of each member.

    Args:
        problem: with part "f", or with "F", "data" and terms as `composite` names them.
        live: the gradient is differentiable; that of the problem if None.
    """

    def __init__(self, problem: Problem, live: bool | None = None) -> None:
        self.problem, self.live = problem, problem.live if live is None else live
        self.f: Any = problem.parts.get("f")
        self.F: Any = problem.parts.get("F")
        self.terms = terms_of(problem)

    def __call__(self, x: Tensor) -> tuple[Number, Tensor]:
        """phi(x) and its gradient."""
        pb = self.problem
        if self.f is not None:
            value, g = self._function(x)
            return self._number(value), g
        data = DataTerm(pb)
        v, g = self._data_grad(x, data)
        phi = data.value(v.detach())
        for term in self.terms:
            phi = phi + self._number(term._value(x.detach(), pb.n_x))
        return phi, g

    def _number(self, value: Tensor) -> Number:
        return float(value) if self.problem.single else value.detach()

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient alone."""
        if self.f is not None:
            return self._function(x)[1]
        return self._data_grad(x, DataTerm(self.problem))[1]

    def _function(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f, n = self.f, self.problem.n_x
        if isinstance(f, Functional):
            return f._value(x, n), f._grad(x, n)
        if self.live:
            value, pull = torch.func.vjp(f, x)[:2]
            return value, pull(torch.ones_like(value))[0]
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = f(point)
        require_dependence(value)
        (g,) = torch.autograd.grad(value, point, torch.ones_like(value), materialize_grads=True)
        return value.detach(), g

    def _data_grad(self, x: Tensor, data: DataTerm) -> tuple[Tensor, Tensor]:
        pb = self.problem
        if isinstance(self.F, LinearOperator):
            v = pb.forward(x)
            g = pb.back(data.grad(v))
        else:
            v, J = linearization(self.F, x, pb.n_x, self.live)
            g = J._run(data.grad(v), True).to(pb.x_dtype)
        for term in self.terms:
            g = g + term._grad(x, pb.n_x)
        return v, g


def stationarity(residual: Callable[[Problem, Tensor], Tensor]) -> Equation:
    """The equation that the gradient of an objective is zero; its J is the Hessian, which must be positive definite."""
    return Equation(residual, _by_hessian, symmetric=True)


def _by_hessian(H: LinearOperator, g: Tensor, **options: Any) -> Solution:
    solution = cg(H, g, **options)
    if solution.status is Status.BREAKDOWN:
        raise ConvergenceError(
            "the gradient through a minimiser cannot be computed: the Hessian of the objective at x is not positive "
            "definite, so x is a saddle point or one of many minimisers; add damp or a regularizer, start elsewhere, "
            "or use unroll=True",
            solution,
        )
    return solution


minimiser = stationarity(lambda p, x: Objective(p, live=True).gradient(x))
