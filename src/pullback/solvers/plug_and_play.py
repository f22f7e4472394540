"""Plug and play, and regularisation by denoising: a denoiser in place of a prox."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from pullback.core.errors import ArgumentError, ShapeError
from pullback.functionals import Functional
from pullback.linops import Identity
from pullback.solvers.composite import DataTerm, above, ceiling, composite, default_step, report, smoothness
from pullback.solvers.gmres import gmres
from pullback.solvers.inner import Inner
from pullback.solvers.iterate import State
from pullback.solvers.problem import Problem
from pullback.solvers.run import Equation, Options, run
from pullback.solvers.scalars import Number
from pullback.solvers.status import Solution

Denoiser = Callable[..., Tensor]


@dataclass
class _State(State):
    image: Tensor  # A x
    z: Tensor  # the extrapolated point, or the denoised copy
    az: Tensor  # A z
    u: Tensor  # the scaled dual variable
    t: float
    ceiling: Number


def denoise(problem: Problem, x: Tensor) -> Tensor:
    """What the denoiser makes of x of shape (*batch, *dims)."""
    parts = problem.parts
    lead = x.ndim - problem.n_x - parts["rank"]  # more leading axes than the data have come from torch.func
    shape = x.shape
    if lead > 0 and parts["rank"]:
        x = x.reshape(-1, *shape[lead + 1 :])
    f, sigma = parts["denoiser"], parts["sigma"]
    y = f(x) if sigma is None else f(x, sigma)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        came = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(
            f"{problem.owner}: denoiser must return a tensor of the shape of its input {tuple(x.shape)}; got {came}; "
            f"give A dims with the channel axis that a network needs, such as (1, n, m)"
        )
    return y.reshape(shape)


class PlugAndPlay:
    """The recursions of `plug_and_play`, and of `red` where they are the same."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.data = problem, DataTerm(problem)
        parts = problem.parts
        self.method = parts["method"]
        if self.method in ("admm", "hqs"):
            weight = parts["weight"]
            self.rho = 1 / default_step(problem) if weight is None else problem.number(weight, "weight")
            self.inner = Inner(problem, [(1.0, Identity(problem.A.dims))])
            self.pulled = problem.back(problem.y)
        elif self.method == "red":
            self.weight = problem.number(parts["weight"], "weight")
            given = parts["step"]
            # The gradient of x - D(x) has a Lipschitz constant of 2 for a nonexpansive D.
            self.tau = default_step(problem) if given is not None else 1 / (smoothness(problem) + 2 * self.weight)
        else:
            self.tau = default_step(problem)

    def init(self) -> _State:
        """x0."""
        pb = self.problem
        x, r = pb.start()
        image = pb.y - r
        values = report(pb, self.data, image, [])
        u = torch.zeros_like(x)
        if self.method == "admm" and pb.x0 is not None:  # what it is where x0 is the solution
            u = pb.back(r) / pb.x_scalar(self.rho)
        return _State(
            x, pb.fill(torch.inf), pb.fill(1.0), {"residual": values["residual"]}, image=image, z=x, az=image,
            u=u, t=1.0, ceiling=ceiling(pb, values["residual"]),
        )  # fmt: skip

    def step(self, state: _State) -> None:
        """One denoising, and one gradient step or quadratic subproblem."""
        pb = self.problem
        x = getattr(self, f"_{self.method}")(state)
        image = pb.A(x)
        before = state.x
        if self.method == "fista":
            before = state.z  # x itself may rest for a moment while z moves on
            t = (1 + (1 + 4 * state.t**2) ** 0.5) / 2
            momentum = (state.t - 1) / t
            state.t = t
            state.z, state.az = x + momentum * (x - state.x), image + momentum * (image - state.image)
        state.error, state.scale = pb.norm(x - before, pb.n_x), pb.norm(x, pb.n_x)
        state.x, state.image = x, image
        state.values = {"residual": report(pb, self.data, image, [])["residual"]}
        state.verdict = above(state.values["residual"], state.ceiling)

    def _descend(self, x: Tensor, image: Tensor) -> Tensor:
        pb = self.problem
        return x - pb.x_scalar(self.tau) * pb.back(self.data.grad(image))

    def _pgd(self, state: _State) -> Tensor:
        return denoise(self.problem, self._descend(state.x, state.image))

    def _fista(self, state: _State) -> Tensor:
        return denoise(self.problem, self._descend(state.z, state.az))

    def _admm(self, state: _State) -> Tensor:
        rho = self.problem.x_scalar(self.rho)
        v = self.inner.solve(self.pulled + rho * (state.x - state.u), self.rho, state.z)
        x = denoise(self.problem, v + state.u)
        state.u, state.z = state.u + v - x, v
        return x

    def _hqs(self, state: _State) -> Tensor:
        rho = self.problem.x_scalar(self.rho)
        return self.inner.solve(self.pulled + rho * denoise(self.problem, state.x), self.rho, state.x)

    def _red(self, state: _State) -> Tensor:
        pb = self.problem
        pull = pb.back(self.data.grad(state.image))
        gap = state.x - denoise(pb, state.x)
        return state.x - pb.x_scalar(self.tau) * (pull + pb.x_scalar(self.weight) * gap)


def _fixed_point(p: Problem, x: Tensor) -> Tensor:
    """The difference x - N(x - tau A^H grad), which holds for pgd and fista, and for admm with tau = 1 / weight."""
    weight = p.parts["weight"]
    tau = default_step(p) if weight is None else 1 / p.number(weight, "weight")
    pull = p.adjoint(DataTerm(p).grad(p.A(x))).to(p.x_dtype)
    return x - denoise(p, x - p.x_scalar(tau) * pull)


def _balance(p: Problem, x: Tensor) -> Tensor:
    """A^H grad + weight (x - D(x)), which holds for hqs and red."""
    weight = p.parts["weight"]
    weight = 1 / default_step(p) if weight is None else p.number(weight, "weight")
    pull = p.adjoint(DataTerm(p).grad(p.A(x))).to(p.x_dtype)
    return pull + p.x_scalar(weight) * (x - denoise(p, x))


def _run(
    owner: str, A: Any, y: Any, denoiser: Any, x0: Any, data_term: Any, method: str, weight: Any, step: Any, sigma: Any,
    **options: Any,
) -> Solution:  # fmt: skip
    if not callable(denoiser) or isinstance(denoiser, Functional):
        raise ArgumentError(
            f"{owner}: denoiser must be a torch.nn.Module or a function that maps x to x; got "
            f"{type(denoiser).__name__}" + ("; use pullback.fista for a functional" if callable(denoiser) else "")
        )
    parts = {"denoiser": denoiser, "sigma": sigma, "weight": weight, "step": step, "method": method}
    problem = composite(owner, A, y, x0, [], data_term, **parts)
    problem.parts["rank"] = len(problem.batch)
    if weight is not None:
        problem.number(weight, "weight", positive=True)
    if method in ("admm", "hqs"):
        DataTerm(problem).require_quadratic()
    if weight is None and step is None:  # once: the equation runs inside of vmap, too, where |A| cannot be estimated
        problem.parts["step"] = default_step(problem)
    equation = Equation(_balance if method in ("hqs", "red") else _fixed_point, gmres)
    return run(problem, PlugAndPlay, equation, **options)


def plug_and_play(
    A: Any,
    y: Any,
    denoiser: Denoiser,
    *,
    method: Literal["pgd", "fista", "admm", "hqs"] = "pgd",
    sigma: Any = None,
    data_term: Functional | None = None,
    x0: Any = None,
    step: Any = None,
    maxiter: int = 100,
    rtol: float = 1e-4,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """The x with x = N(x - step A^H grad D(A x)): a denoiser N where fista and admm have a prox.

    Args:
        A: LinearOperator of any shape.
        y: data of shape (..., *A.dimsd), or flat; leading axes are the batch. NumPy gives NumPy.
        denoiser: N, an nn.Module or a function from tensors of shape (*batch, *A.dims) to the same. A network for
            images gets its channel axis from A, as in A.dims = (1, n, m). Gradients reach the parameters of a module.
        method: "pgd", "fista": a gradient step on the data, then N. "admm": the quadratic subproblem, then N. "hqs": N,
            then the quadratic subproblem.
        sigma: if given, N is called as denoiser(x, sigma); a number or a tensor, which may require grad.
        data_term: a smooth functional of A x - y for "pgd" and "fista"; half the squared norm if None.
        x0: where to start, of shape (..., *A.dims); zero if None.
        step: 1 / (L |A|^2) if None, L a Lipschitz constant of grad D. For "admm" and "hqs" the penalty is 1 / step, and
            a step near (noise that N is trained for)^2 / (noise of y)^2 is a good start.
        maxiter, rtol, atol: stop when |x_new - x| (for "fista" |x_new - z|, z the extrapolated point) is at most
            max(rtol |x_new|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    "pgd", "fista" and "admm" have the same fixed points for the same step; those of "hqs" satisfy
    A^H (A x - y) + (x - N(x)) / step = 0. They exist and are reached where N is averaged (a prox is); that is not
    verified, and a residual that grows without bound ends with the status DIVERGED. Implicit derivatives are those of
    the fixed point in everything that it depends on: y, what A holds, step, sigma and the parameters of N. A function
    that closes over tensors that require grad is refused, because its gradient would be lost: make it a module.

    Returns: Solution with history "residual" |A x - y|.
    Raises: ShapeError, DtypeError, ArgumentError.
    Cost: one application of N and A, and one of A^H or one quadratic subproblem, an iteration.
    Source: Venkatakrishnan, Bouman & Wohlberg 2013, doi 10.1109/GlobalSIP.2013.6737048; hqs: Zhang et al. 2017,
        arXiv 1704.03264; convergence: Ryu et al. 2019, arXiv 1905.05406.
    """
    if method not in ("pgd", "fista", "admm", "hqs"):
        raise ArgumentError(f"plug_and_play: method must be 'pgd', 'fista', 'admm' or 'hqs'; got {method!r}")
    return _run(
        "plug_and_play", A, y, denoiser, x0, data_term, method, None, step, sigma,
        maxiter=maxiter, rtol=rtol, atol=atol, **options,
    )  # fmt: skip


def red(
    A: Any,
    y: Any,
    denoiser: Denoiser,
    *,
    weight: Any = 1.0,
    method: Literal["gradient", "fixed_point"] = "gradient",
    sigma: Any = None,
    data_term: Functional | None = None,
    x0: Any = None,
    step: Any = None,
    maxiter: int = 200,
    rtol: float = 1e-4,
    atol: float = 0.0,
    **options: Unpack[Options],
) -> Solution:
    """The x with A^H grad D(A x) + weight (x - N(x)) = 0: regularisation by denoising.

    Args:
        A, y, denoiser, sigma, data_term, x0: as in `plug_and_play`.
        weight: > 0, a number or one for each member of the batch; it may require grad.
        method: "gradient": steps along the left-hand side. "fixed_point": (A^H A + weight) x_new = A^H y + weight N(x).
        step: of "gradient"; 1 / (L |A|^2 + 2 weight) if None.
        maxiter, rtol, atol: stop when |x_new - x| <= max(rtol |x_new|, atol), or after maxiter iterations.
        options: see `pullback.solvers.run.Options`.

    It is the gradient of D(A x) + weight <x, x - N(x)> / 2 where N is homogeneous with a symmetric Jacobian; networks
    are neither, and the equation is what is solved. Derivatives as in `plug_and_play`.

    Returns: Solution with history "residual" |A x - y|.
    Raises: ShapeError, DtypeError, ArgumentError. Cost: as `plug_and_play`.
    Source: Romano, Elad & Milanfar 2017, doi 10.1137/16M1102884; Reehorst & Schniter 2019,
        doi 10.1109/TCI.2018.2880326.
    """
    if method not in ("gradient", "fixed_point"):
        raise ArgumentError(f"red: method must be 'gradient' or 'fixed_point'; got {method!r}")
    name = "red" if method == "gradient" else "hqs"
    return _run(
        "red", A, y, denoiser, x0, data_term, name, weight, step, sigma,
        maxiter=maxiter, rtol=rtol, atol=atol, **options,
    )  # fmt: skip
