"""Gauss-Newton and Fisher matrices: J^H W J, with the Jacobian of a function and a matrix W of its values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pullback.autodiff.differential import _OnTrees
from pullback.autodiff.hessian import Hessian, refuse_holomorphic
from pullback.autodiff.jacobian import Jacobian, _waves
from pullback.autodiff.tree import name_of
from pullback.core.errors import ArgumentError, DtypeError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import complex_of, real_of

# The negative logarithm of a likelihood in its natural parameter z is A(z) - <z, t(y)>, so the Fisher matrix is the
# Hessian of A: one row a likelihood.
_PARTITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "categorical": lambda z: torch.logsumexp(z, -1).sum(),
    "bernoulli": lambda z: -torch.nn.functional.logsigmoid(-z).sum(),
    "poisson": lambda z: z.exp().sum(),
}
LIKELIHOODS = ("gaussian", *_PARTITIONS)


def gauss_newton(
    f: Callable[..., Any], loss: Callable[[Any], Tensor], *args: Any, complex: str | None = None
) -> Curvature:
    """G = J^H (Hessian of loss at f(x)) J, with J = f'(x): the curvature of loss(f(x)) without that of f.

    Positive semidefinite where the loss is convex. Vectors are as in `jacobian`.

    Args:
        f: function or module of the arguments; a tensor or tree of tensors.
        loss: function of the value of f alone, one real number: `lambda out: cross_entropy(out, labels)`.
        args: the point x.
        complex: for complex x, "real" or "wirtinger", as in `hessian`.

    Returns: a Curvature with the parts `J` and `W`, differentiable as those are.

    Raises: ArgumentError, ShapeError if the loss is not one number, DtypeError, NotDifferentiableError.

    Cost: one J v, one product with the Hessian of the loss, one J^H w for each product.

    Source: N. N. Schraudolph 2002, doi 10.1162/08997660260028683.
    """
    refuse_holomorphic("gauss_newton", complex)
    if not callable(loss) or not args:
        got = type(loss).__name__ if not callable(loss) else "no point"
        raise ArgumentError(f"gauss_newton: write gauss_newton(f, loss, x), with a function loss of f(x); got {got}")
    return _around("gauss_newton", f, loss, args, complex)


def fisher(
    f: Callable[..., Any], *args: Any, likelihood: str, sigma: Any = None, complex: str | None = None
) -> Curvature:
    """F = J^H E[s s^T] J, the exact Fisher matrix at x of the data whose likelihood has the parameters f(x).

    s is the gradient of log p(y | z) in z = f(x), and the mean is over y given z. All elements of f(x) are independent
    measurements, and so their information is summed: batch axes are not averaged.

    Args:
        f: function or module of the arguments; a real tensor, or a tree of them.
        args: the point x: tensors or trees.
        likelihood: "gaussian": y = z + sigma times standard noise. "categorical": logits on the last axis. "bernoulli":
            logits. "poisson": z is the logarithm of the rate.
        sigma: the standard deviation for "gaussian", a number or a tensor that broadcasts with f(x); 1 if None.
        complex: for complex x, "real" or "wirtinger", as in `hessian`.

    Returns: a Curvature, positive semidefinite.

    Raises: ArgumentError, DtypeError, ShapeError.

    Source: J. Martens 2020, New insights and perspectives on the natural gradient method, section 5, jmlr 21(146).
    """
    refuse_holomorphic("fisher", complex)
    if likelihood not in LIKELIHOODS:
        raise ArgumentError(
            f"fisher: likelihood must be one of {', '.join(map(repr, LIKELIHOODS))}; got {likelihood!r}"
        )
    if likelihood != "gaussian" and sigma is not None:
        raise ArgumentError(f"fisher: sigma belongs to likelihood='gaussian'; got sigma with {likelihood!r}")
    if sigma is not None and bool((torch.as_tensor(sigma) <= 0).any()):
        raise ArgumentError(f"fisher: sigma must be positive; got {sigma!r}")
    return _around("fisher", f, partial(_partition, likelihood, 1.0 if sigma is None else sigma), args, complex)


def empirical_fisher(losses: Callable[..., Any], *args: Any, complex: str | None = None) -> Curvature:
    """E = sum_i g_i g_i^H, with the gradients g_i of the losses of single samples at x; not averaged.

    This is not an estimate of the Fisher matrix unless the labels are drawn from the model.

    Args:
        losses: function of the arguments with a real tensor of any shape, one loss a sample (`reduction="none"`).
        args: the point x: tensors or trees.
        complex: for complex x, "real" or "wirtinger", as in `hessian`.

    Returns: a Curvature J^H J with J = losses'(x).

    Source: F. Kunstner, P. Hennig, L. Balles 2019, arXiv 1905.12558.
    """
    refuse_holomorphic("empirical_fisher", complex)
    J = Jacobian(losses, args, complex)
    if not J._real_range:
        raise DtypeError("empirical_fisher: the losses must be real; got complex values")
    if J.shape[0] == 1:
        raise ShapeError(
            "empirical_fisher: the function must return one loss for each sample; got one number; use reduction='none'"
        )
    return Curvature(J, None)


def _around(
    owner: str, f: Callable[..., Any], loss: Callable[[Any], Tensor], args: tuple[Any, ...], complex: str | None
) -> Curvature:
    J = Jacobian(f, args, complex)
    treat = complex if complex == "real" or not any(J.range.complex) else "wirtinger"
    if owner == "fisher" and (any(J.range.complex) or any(J.range.paired)):
        raise DtypeError("fisher: f(x) must be real, the parameters of the likelihood; got complex values")
    return Curvature(J, Hessian(loss, (J.value,), treat if treat == "real" or any(J.range.complex) else None))


def _partition(likelihood: str, sigma: Any, value: Any) -> Tensor:
    """A(z), summed over the tensors of a tree."""
    total: Any = 0
    for z in pytree.tree_leaves(value):
        if isinstance(z, Tensor) and z.is_floating_point():
            if likelihood == "gaussian":
                total = total + ((z / sigma) ** 2).sum() / 2
            else:
                total = total + _PARTITIONS[likelihood](z)
    return total  # type: ignore[no-any-return]


class Curvature(_OnTrees):
    """J^H W J, self-adjoint, with a Jacobian `J` and a Hessian `W` (the identity if None)."""

    J: Jacobian
    W: Hessian | None

    def __init__(self, J: Jacobian, W: Hessian | None) -> None:
        super().__init__(J.dims, J.dims)
        self.J, self.W = J, W
        self.domain = self.range = J.domain
        self._real_domain = self._real_range = self._clinear = J._real_domain

    @property
    def value(self) -> Any:
        """f(x)."""
        return self.J.value

    @property
    def H(self) -> LinearOperator:
        """The operator itself."""
        return self

    def _forward(self, x: Tensor) -> Tensor:
        y = self.J._run(x)
        return self.J._run(y if self.W is None else self.W._run(y), True)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return real_of(dtype) if self._real_domain else complex_of(dtype)

    def extra_repr(self) -> str:
        """f, and the number of its values."""
        return f"{name_of(self.J.f)}, {self.J.shape[0]} outputs"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """The exact Fisher matrix of a classifier and an empirical one."""
        x = torch.linspace(0.3, 1.1, 6, dtype=torch.float64)
        yield fisher(_waves, x.reshape(2, 3), likelihood="categorical")
        yield empirical_fisher(_waves, x.reshape(2, 3))
