"""One door for bare functions."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.functionals import Functional
from pullback.functionals.arithmetic import is_live
from pullback.solvers.descent import Descent, start
from pullback.solvers.lbfgs import LBFGS, check_memory
from pullback.solvers.nonlinear import Function, expose, is_complex, member_dims, minimiser, probe, stand_in
from pullback.solvers.nonlinear_cg import NonlinearCG, check_variant
from pullback.solvers.problem import Problem
from pullback.solvers.run import Options, run
from pullback.solvers.status import Solution

METHODS: dict[str, type[Descent]] = {"lbfgs": LBFGS, "nonlinear_cg": NonlinearCG}


def minimize(
    f: Any,
    x0: Any,
    *,
    parameters: Any = (),
    dims: Any = None,
    method: str = "lbfgs",
    memory: int = 10,
    variant: str = "hager-zhang",
    maxiter: int = 200,
    rtol: float = 1e-6,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """argmin_x f(x) for a smooth function in torch, by `lbfgs` or `nonlinear_cg`.

    Args:
        f: a function, nn.Module or smooth Functional: f(x, *parameters) is one real number for each member of x. Its
            gradient comes from autograd, that of a Functional from itself.
        x0: where to start, of shape (..., *dims); a tensor, or an array, which gives an array.
        parameters: tensors passed to f after x, in which the solution shall be differentiable. Those that a module or a
            functional f holds need not be named.
        dims: the shape of one member; leading axes of x0 are the batch. All of x0 is one member if None (for a
            Functional its own dims).
        method: "lbfgs" or "nonlinear_cg".
        memory: of lbfgs. variant: of nonlinear_cg.
        maxiter, rtol, atol, options: as in `lbfgs`.

    Returns: Solution with history "objective" and "gradient".
    Raises: ArgumentError, ShapeError, DtypeError; NotDifferentiableError where f is a functional that is not smooth, or
        depends on a tensor that requires grad and is neither held nor among the parameters.
    Cost: about one value and gradient of f an iteration.
    """
    if method not in METHODS:
        raise ArgumentError(f"minimize: method must be one of {', '.join(METHODS)}; got {method!r}")
    check_memory(method, memory)
    check_variant(method, variant)
    if not callable(f):
        raise ArgumentError(f"minimize: f must be a function of x; got {type(f).__name__}")
    if isinstance(f, Functional):
        dims = member_dims(method, x0, f.dims if dims is None else dims)
        depends = False
    else:
        f, dims = Function(method, f, parameters), member_dims(method, x0, dims)
        value = probe(method, f, x0, dims, whole=True)
        batch = tuple(x0.shape[: len(x0.shape) - len(dims)])
        if value.shape != batch:
            raise ShapeError(
                f"{method}: f(x) must have one number for each member of x, shape {batch}; got {tuple(value.shape)}; "
                f"leading axes of x0 before dims {dims} are the batch"
            )
        if not value.is_floating_point():
            raise DtypeError(f"{method}: f(x) must be real and floating point; got {value.dtype}; use f(x).real")
        depends = is_live(value)
    is_real = not is_complex(x0)
    problem = Problem(method, stand_in(dims, dims, is_real, is_real), x0, x0, f=f, memory=memory, variant=variant)
    if isinstance(f, Functional):
        with torch.no_grad():
            f._grad(start(problem), problem.n_x)
    expose(problem, depends, bool(options.get("unroll")))
    return run(problem, METHODS[method], minimiser, maxiter=maxiter, rtol=rtol, atol=atol, **options)
