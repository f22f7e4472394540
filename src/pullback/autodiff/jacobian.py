"""The Jacobian of a function at a point, as a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pullback.autodiff.differential import _TreeDifferential, tree_function, whole
from pullback.autodiff.tree import name_of
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.linearize import is_missing
from pullback.core.operator import LinearOperator
from pullback.core.shapes import complex_of, real_of
from pullback.core.spectrum import unit_chunks

_MODES = ("forward", "reverse")


def jacobian(f: Callable[..., Any], *args: Any, complex: str | None = None, mode: str | None = None) -> Jacobian:
    """J with J v = f'(x) v and J.H w = f'(x)^H w, without the matrix.

    One tensor in and one out: J has `dims` = x.shape and `dimsd` = f(x).shape, where a 0-d tensor counts as (1,), and
    acts on tensors (..., *dims) as any operator does. Where an argument or the value is a tree (tuple, list, dict,
    nested), the vectors of that side are flat, `J @ tree` and `J.H @ tree` give trees, `J.pack`, `J.unpack`,
    `J.pack_range` and `J.unpack_range` go from trees to vectors and back, and `J.push(v)`, `J.pull(w)` always give
    trees. Leaves that are no floating point or complex tensors are constants. `J.value` is f(x).

    Args:
        f: function or module of the arguments, deterministic, in differentiable torch; a tensor or tree of tensors.
        args: the point x: tensors or trees. With several arguments the domain is the space of their tuple.
        complex: what the derivative in complex x is. "holomorphic": f is complex differentiable and J complex-linear;
            checked on random vectors (not inside of transforms). "real": complex tensors of x and f(x) are pairs of
            real numbers, (..., 2), and J is real. "wirtinger": J v = df/dz v + df/dz* conj(v), linear over the reals
            only, with the two parts as `J.dz` and `J.dzbar`; J.H @ 1 is the gradient of a real loss.
        mode: how `todense` works, "forward" (columns) or "reverse" (rows); None chooses by the sizes.

    Returns: a Jacobian, differentiable in v, in x and in what f holds or closes over, where those require grad.

    Mixed precisions: a product is computed in the precisions that the tensors of x and f(x) have, and has that of v.
    Tensors of x must lie on one device.

    Products that require grad share the graph of f, so that several losses made of them need one backward pass, or
    `retain_graph=True`. After a backward pass the next product makes the graph anew.

    Memory: the graph of f at x is kept as long as the operator; a product J v keeps the graph of the pullback, too.
    x is copied, so that later changes of x in place do not matter. A change in place of another tensor that f uses,
    and does not hold as a module, is an error where autograd sees it.

    Raises: DtypeError for complex x without `complex`, ArgumentError, ShapeError, NotDifferentiableError.

    Cost: f once with its graph; a product J.H w is one backward pass, J v one through the graph of that.
    """
    if mode is not None and mode not in _MODES:
        raise ArgumentError(f"jacobian: mode must be 'forward', 'reverse' or None; got {mode!r}")
    return Jacobian(f, args, complex, mode)


class Jacobian(_TreeDifferential):
    """f'(x): what `jacobian` returns."""

    def __init__(
        self, f: Callable[..., Any], args: tuple[Any, ...], complex: str | None = None, mode: str | None = None
    ) -> None:
        function = tree_function("jacobian", f, args, complex)
        self._build(f, function, whole(args), False)
        self.treatment, self.given_mode, self.reason = complex, mode, ""
        if complex == "holomorphic":
            self._clinear = True
            self._check_holomorphic()

    # The dense matrix ----------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """How `todense` works, and why: "reverse: 3 outputs <= 1000 inputs"."""
        n, m = self.shape[1], self._rows()
        if self.given_mode is not None:
            return f"{self.given_mode}: as given"
        if n < m and not self.reason:
            return f"forward: {n} inputs < {m} outputs"
        return f"reverse: {self.reason}" if self.reason else f"reverse: {m} outputs <= {n} inputs"

    def _rows(self) -> int:
        """How many pullbacks the matrix needs; the real and the imaginary part of a row are two if x is real."""
        return self.shape[0] * (2 if self._real_domain and not self._real_range else 1)

    def todense(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        chunk_size: int | None = None,
        mode: str | None = None,
    ) -> Tensor:
        """The matrix of J, of shape (m, n), differentiable as J is.

        Args:
            dtype: of the matrix; that of the products if None.
            device: where to put it; where x lies if None.
            chunk_size: how many columns or rows are computed at a time; by the sizes if None.
            mode: "forward" or "reverse"; `J.mode` if None. If an operation has no forward derivative, None goes over to
                reverse and `J.mode` says so.

        Raises: ArgumentError for complex="wirtinger" (see `dz` and `dzbar`), or if it cannot fit into memory;
        NotDifferentiableError.
        """
        self._require_matrix("use J.dz.todense() and J.dzbar.todense(), or complex='real'")
        if mode is not None and mode not in _MODES:
            raise ArgumentError(f"todense: mode must be 'forward', 'reverse' or None; got {mode!r}")
        chosen = self.mode.split(":")[0] if mode is None else mode
        if chosen == "forward":
            try:
                dense = self._columns(chunk_size)
            except RuntimeError as error:
                unable = isinstance(error, NotDifferentiableError) or is_missing(error)
                if not unable or mode is not None or self.given_mode is not None:
                    raise
                n, m = self.shape[1], self._rows()
                self.reason = f"{n} inputs < {m} outputs, but an operation has no forward derivative"
                dense = self._rows_dense(chunk_size)
        else:
            dense = self._rows_dense(chunk_size)
        return dense.to(device=device, dtype=dtype)

    def blocks(self, *, chunk_size: int | None = None, mode: str | None = None) -> Any:
        """The matrix in blocks: a tree like f(x) of trees like x, with tensors (*shape of f(x), *shape of x).

        As `torch.func.jacrev` returns it; None where x or f(x) has constants.
        """
        dense = self.todense(chunk_size=chunk_size, mode=mode)
        rows = dense.split(self.range.sizes)
        trees = []
        for row, shape in zip(rows, self.range.shapes, strict=True):
            blocks = row.split(self.domain.sizes, -1)
            trees.append(
                self.domain.plain([b.reshape((*shape, *s)) for b, s in zip(blocks, self.domain.shapes, strict=True)])
            )
        return self.range.plain(trees)

    def _precision(self) -> torch.dtype:
        dtype = self._points()[0].dtype
        for t in self._points()[1:]:
            dtype = torch.promote_types(dtype, t.dtype)
        return dtype

    def _columns(self, chunk_size: int | None) -> Tensor:
        m, n = self.shape
        found = []
        for units in unit_chunks(n, m, self._precision(), self._points()[0].device, chunk_size):
            found.append(self._run(units.reshape(-1, *self.dims)).reshape(-1, m))
        return torch.cat(found).T

    def _rows_dense(self, chunk_size: int | None) -> Tensor:
        m, n = self.shape
        dtype = self._precision()
        if dtype.is_complex != (not self._real_range):
            dtype = real_of(dtype) if self._real_range else complex_of(dtype)
        found = []
        for units in unit_chunks(m, n, dtype, self._points()[0].device, chunk_size):
            units = units.reshape(-1, *self.dimsd)
            rows = self._run(units, True).reshape(-1, n)
            if self._real_domain and not self._real_range:
                rows = torch.complex(rows, self._run(1j * units, True).reshape(-1, n))
            found.append(rows.conj().resolve_conj() if rows.is_complex() and self._clinear else rows)
        return torch.cat(found)

    # Complex derivatives -------------------------------------------------------------------------------------------

    def _check_holomorphic(self) -> None:
        if self._real_range:
            raise ArgumentError(
                "jacobian: complex='holomorphic' needs a complex value; f(x) is real, so f is holomorphic only if it "
                "is constant; use complex='wirtinger' or 'real'"
            )
        if self._open:
            return  # inside a transform there are no numbers to compare
        dtype, device = self._precision(), self._points()[0].device
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(2, *self.dimsd, dtype=dtype, generator=generator).to(device)
        with torch.no_grad():
            a, b = self._product(w, True, False), self._product(1j * w, True, False)
        gap = float(torch.linalg.vector_norm(1j * a - b))
        scale = float(torch.linalg.vector_norm(a) + torch.linalg.vector_norm(b))
        if not gap <= 100 * torch.finfo(dtype).eps ** 0.75 * scale:
            raise ArgumentError(
                f"jacobian: f is not holomorphic at x: |J.H (i w) - i J.H w| is {gap / max(scale, 1e-300):.1e} of "
                f"|J.H w| for random w; use complex='wirtinger' or complex='real'"
            )

    @property
    def dz(self) -> LinearOperator:
        """df/dz, complex-linear, of a Jacobian with complex="wirtinger"; df/dz v + df/dz* conj(v) = J v."""
        return _Wirtinger(self._as_wirtinger(), False)

    @property
    def dzbar(self) -> LinearOperator:
        """df/dz*, complex-linear, of a Jacobian with complex="wirtinger"."""
        return _Wirtinger(self._as_wirtinger(), True)

    def _as_wirtinger(self) -> Jacobian:
        if self.treatment != "wirtinger":
            raise ArgumentError(
                f"dz and dzbar belong to jacobian(..., complex='wirtinger'); this one has complex={self.treatment!r}"
            )
        return self

    def extra_repr(self) -> str:
        """f, and how the matrix would be made."""
        return f"{name_of(self.f)}, {self.mode}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """A function of a tensor, of a tree, with complex values, and three ways to treat complex x."""
        x = torch.linspace(0.3, 1.1, 6, dtype=torch.float64)
        z = torch.complex(x[:4], x[2:])
        yield cls(_waves, (x.reshape(2, 3),))
        yield cls(_model, ({"w": x.reshape(2, 3), "n": 2}, x[:3]))
        yield cls(_spiral, (x[:4],))
        yield cls(_polynomial, (z,), "holomorphic")
        yield cls(_energy, (z,), "wirtinger")
        yield cls(_energy, (z,), "real", "forward")


class _Wirtinger(LinearOperator):
    """(J v - i J(i v)) / 2 or, conjugated, w -> (J conj(w) + i J(i conj(w))) / 2: the parts of a real-linear J."""

    _native = True

    def __init__(self, J: Jacobian, conjugated: bool) -> None:
        super().__init__(J.dims, J.dimsd)
        self.J, self.conjugated = J, conjugated

    def _forward(self, x: Tensor) -> Tensor:
        x = x.to(complex_of(x.dtype))
        if self.conjugated:
            x = x.conj()
            return (self._there(x) + 1j * self._there(1j * x)) / 2
        return (self._there(x) - 1j * self._there(1j * x)) / 2

    def _adjoint(self, y: Tensor) -> Tensor:
        y = y.to(complex_of(y.dtype))
        if self.conjugated:
            return ((self._back(y) + 1j * self._back(1j * y)) / 2).conj().resolve_conj()
        return (self._back(y) - 1j * self._back(1j * y)) / 2

    def _there(self, x: Tensor) -> Tensor:
        return self.J._run(x)

    def _back(self, y: Tensor) -> Tensor:
        return self.J._run(y.real if self.J._real_range else y, True)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return complex_of(dtype)

    def _expression(self, level: int = 0) -> str:
        return f"{self.J._expression(3)}.{'dzbar' if self.conjugated else 'dz'}"


def _waves(x: Tensor) -> Tensor:
    return torch.sin(x).cumsum(-1) * x[..., :1] ** 2


def _model(parameters: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(parameters["w"] @ x) * parameters["n"]
    return y, y.sum() * x


def _spiral(x: Tensor) -> Tensor:
    return torch.polar(x, x**2)


def _polynomial(z: Tensor) -> Tensor:
    return z**3 + 2j * z.flip(0) * z


def _energy(z: Tensor) -> Tensor:
    return (z * z.conj()).real * z.real + z.imag.flip(0)
