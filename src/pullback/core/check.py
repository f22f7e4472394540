"""The conformance kit: does an operator keep the promises that every other part of the library relies on?

`check(op)` runs a table of named tests on any operator, ours or a user's, and returns a report. Each test either
returns a figure (an error, to be compared with a tolerance), returns None (passed), or raises.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, NotDifferentiableError, PullbackError
from pullback.core.interop import device_of
from pullback.core.operator import LinearOperator
from pullback.core.shapes import size

_DENSE_LIMIT = 400  # operators up to this size are compared with their whole matrix, larger ones in random directions


class CheckError(PullbackError, AssertionError):
    """An operator breaks a promise."""


class _Skip(Exception):
    """A test does not apply; the text says why."""


@dataclass(frozen=True)
class CheckResult:
    """One line of a report: `status` is "passed", "failed" or "skipped"."""

    name: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. `ok` is True if nothing failed; `print(report)` shows the table."""

    operator: str
    results: tuple[CheckResult, ...] = field(repr=False)

    @property
    def ok(self) -> bool:
        """True if no test failed."""
        return all(r.status != "failed" for r in self.results)

    @property
    def failures(self) -> dict[str, str]:
        """Name and reason of every failed test."""
        return {r.name: r.detail for r in self.results if r.status == "failed"}

    def raise_if_failed(self) -> None:
        """Raise CheckError with the table if a test failed."""
        if not self.ok:
            raise CheckError(str(self))

    def __str__(self) -> str:
        width = max(len(r.name) for r in self.results)
        lines = [f"{r.status:8}{r.name:{width}}  {r.detail}".rstrip() for r in self.results]
        return "\n".join([self.operator, *lines])


def dottest(op: LinearOperator, *, rtol: float = 1e-11, n_pairs: int = 3, seed: int = 0) -> float:
    """Max |<A x, y> - <x, A^H y>| / (|A x| |y|) over random and structured vectors, in float64 and complex128.

    Args:
        op: the operator.
        rtol: the largest error that is accepted.
        n_pairs: random pairs beside the structured ones (ones, a step, alternating signs, one element).
        seed: of the random vectors.

    Returns: the largest error. Raises: CheckError if it exceeds rtol.
    """
    probe = _Probe(op, seed)
    worst, where = 0.0, ""
    for dtype in probe.dtypes():
        for x_kind, y_kind in (
            [("random", "random")] * n_pairs
            + [(k, "random") for k in _STRUCTURED]
            + [("random", k) for k in _STRUCTURED]
        ):
            x = probe.vector(op.dims, dtype, x_kind)
            y = probe.vector(op.dimsd, probe.range_dtype(dtype), y_kind)
            with torch.no_grad():
                ax, aty = op._call(x, False), op._call(y, True)
            scale = max(_norm(ax) * _norm(y), _norm(x) * _norm(aty))
            if scale == 0.0:
                continue
            left, right = torch.vdot(_flat(ax, y), _flat(y, ax)), torch.vdot(_flat(x, aty), _flat(aty, x))
            gap = (left - right) if op._clinear else (left.real - right.real)
            error = float(gap.abs()) / scale
            if not error <= worst:  # nan too
                worst, where = error, f"{dtype}, x {x_kind}, y {y_kind}"
    if not worst <= rtol:
        raise CheckError(
            f"dot test of {type(op).__name__}: |<Ax,y> - <x,A.H y>| / (|Ax| |y|) = {worst:.2e} > {rtol:.0e} ({where})"
        )
    return worst


def check(op: LinearOperator, *, rtol: float = 1e-11, compile: bool = True, seed: int = 0) -> CheckReport:
    """Run the conformance kit on a linear operator.

    Args:
        op: the operator; small instances are checked more thoroughly (all of the matrix, every tensor that it holds).
        rtol: relative accuracy in float64 of the adjoint and of derivatives that are compared with it. Above 1e-9, for
            operators that are right to a tolerance only, finite differences take long steps and are compared coarsely.
        compile: also run `torch.compile(fullgraph=True)` (seconds).
        seed: of the random vectors.

    Returns: a CheckReport; call `.raise_if_failed()` in tests. Cost: some hundred applications.
    """
    if not isinstance(op, LinearOperator):
        raise ArgumentError(
            f"check: op must be a LinearOperator; got {type(op).__name__}; wrap it with TorchOperator(op)"
        )
    probe = _Probe(op, seed, rtol)
    results = []
    for name, test in _TESTS.items():
        if not compile and "compile" in name:
            continue
        try:
            # Each test draws its own vectors, whatever ran before it.
            probe.generator.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                error = test(probe)
            if error is None:
                results.append(CheckResult(name, "passed"))
            else:
                status = "passed" if error <= rtol else "failed"  # nan fails
                results.append(
                    CheckResult(name, status, f"error {error:.1e}" + (f" > {rtol:.0e}" if status == "failed" else ""))
                )
        except _Skip as reason:
            results.append(CheckResult(name, "skipped", str(reason)))
        except Exception as error:  # a failed test is a line of the report, whatever went wrong
            text = " ".join(str(error).split())
            results.append(CheckResult(name, "failed", f"{type(error).__name__}: {text[:300]}"))
    return CheckReport(repr(op), tuple(results))


class _Probe:
    """An operator under test, with vectors to test it on."""

    def __init__(self, op: LinearOperator, seed: int, rtol: float = 1e-11) -> None:
        self.op, self.rtol = op, rtol
        self.device = device_of(op)
        self.generator = torch.Generator().manual_seed(seed)
        self.small = max(op.shape) <= _DENSE_LIMIT

    def dtypes(self) -> Iterator[torch.dtype]:
        """Input dtypes that the operator accepts, in double precision."""
        yield torch.float64
        if not self.op._real_domain:
            yield torch.complex128

    def range_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of A x for x of `dtype`."""
        return self.op._out_dtype(dtype, False)

    def vector(
        self, dims: tuple[int, ...], dtype: torch.dtype, kind: str = "random", batch: tuple[int, ...] = ()
    ) -> Tensor:
        shape = (*batch, *dims)
        if kind == "random":
            v = torch.randn(shape, dtype=dtype, generator=self.generator)
        else:
            v = _STRUCTURED[kind](size(dims)).to(dtype).reshape(dims).expand(shape).clone()
        return v.to(self.device)

    def x(self, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> Tensor:
        return self.vector(self.op.dims, dtype, batch=batch)

    def y(self, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> Tensor:
        """A vector of the range for input of `dtype`."""
        return self.vector(self.op.dimsd, self.range_dtype(dtype), batch=batch)

    def real_function(self) -> Callable[[Tensor], Tensor]:
        """X -> A x as real numbers, for transforms that refuse complex results."""
        return lambda x: _as_real(self.op(x))

    def steps(self, atol: float, rtol: float, degree: int = 1, linear: bool = True) -> dict[str, Any]:
        """Options of finite differences: the given tolerances, or what errors of `self.rtol` in values allow.

        Args:
            atol, rtol: for exact operators.
            degree: of the function in A.
            linear: the function is a polynomial of the variable, so that a long step does no harm.
        """
        if self.rtol <= 1e-9:
            return {"atol": atol, "rtol": rtol}
        step = 1.0 if linear else self.rtol ** (1 / 3)  # balances errors of values with those of the difference
        with torch.no_grad():
            size = _norm(self.op(self.x()))
        near = 10 * self.rtol / step
        return {"eps": step, "atol": near * size**degree, "rtol": near, "nondet_tol": near * size**degree}

    def matrix(self) -> Tensor:
        """The real matrix of real_function, one column a call."""
        if not self.small:
            raise _Skip(f"the operator has more than {_DENSE_LIMIT} rows or columns")
        n = self.op.shape[1]
        with torch.no_grad():
            columns = [
                self.real_function()(e.reshape(self.op.dims)).flatten()
                for e in torch.eye(n, dtype=torch.float64, device=self.device)
            ]
        return torch.stack(columns, -1)


_STRUCTURED: dict[str, Callable[[int], Tensor]] = {
    "ones": torch.ones,
    "step": lambda n: (torch.arange(n) >= n // 2).double() + 0.5,
    "alternating": lambda n: 1.0 - 2.0 * (torch.arange(n) % 2),
    "one element": lambda n: (torch.arange(n) == n // 3).double(),
}


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _flat(a: Tensor, b: Tensor) -> Tensor:
    return a.flatten().to(torch.promote_types(a.dtype, b.dtype))


def _as_real(y: Tensor) -> Tensor:
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y


def _gap(a: Tensor, b: Tensor) -> float:
    """|a - b| / max(|a|, |b|), and an error if they are not alike in shape and dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise CheckError(f"expected {tuple(b.shape)} {b.dtype}, got {tuple(a.shape)} {a.dtype}")
    if not torch.isfinite(_as_real(a)).all() and torch.isfinite(_as_real(b)).all():
        raise CheckError("the result is not finite")
    scale = max(_norm(a), _norm(b))
    return 0.0 if scale == 0.0 else _norm(a - b) / scale


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


# The tests. One function, one promise. ------------------------------------------------------------------------------


def _shapes(p: _Probe) -> None:
    op = p.op
    for batch in ((), (3,), (2, 1)):
        for adjoint, dims, dimsd, v in (
            (False, op.dims, op.dimsd, p.x(batch=batch)),
            (True, op.dimsd, op.dims, p.y(batch=batch)),
        ):
            out = op._call(v, adjoint)
            if tuple(out.shape) != (*batch, *dimsd):
                raise CheckError(
                    f"{op._name(adjoint)} of {tuple(v.shape)} has shape {tuple(out.shape)}, not {(*batch, *dimsd)}"
                )
            if len(dims) > 1 and (*batch, size(dims))[-len(dims) :] != dims:
                flat = op._call(v.reshape(*batch, -1), adjoint)
                if tuple(flat.shape) != (*batch, size(dimsd)):
                    raise CheckError(f"{op._name(adjoint)} of a flat vector has shape {tuple(flat.shape)}")


def _dtypes(p: _Probe) -> None:
    wanted = [torch.float32, torch.float64, torch.bfloat16] + (
        [] if p.op._real_domain else [torch.complex64, torch.complex128]
    )
    for dtype in wanted:
        with torch.no_grad():
            y = p.op(p.x(torch.float32).to(dtype))
            if y.dtype != p.op._out_dtype(dtype, False):
                raise CheckError(f"{dtype} in, {y.dtype} out; expected {p.op._out_dtype(dtype, False)}")
            x = p.op._call(y, True)
        if x.dtype != p.op._out_dtype(y.dtype, True):
            raise CheckError(f"adjoint: {y.dtype} in, {x.dtype} out; expected {p.op._out_dtype(y.dtype, True)}")


def _linearity(p: _Probe) -> float:
    worst = 0.0
    for dtype in p.dtypes():
        for adjoint in (False, True):
            draw = p.y if adjoint else p.x
            u, v = draw(dtype), draw(dtype)
            a = 0.7 if not (p.op._clinear and u.is_complex()) else 0.7 - 1.3j
            out = p.op._call(a * u - 2.5 * v, adjoint)
            worst = max(worst, _gap(out, a * p.op._call(u, adjoint) - 2.5 * p.op._call(v, adjoint)))
    return worst


def _dot(p: _Probe) -> float:
    return dottest(p.op, rtol=float("inf"))


def _twice_adjoint(p: _Probe) -> None:
    if p.op.H.H is not p.op:
        raise CheckError("A.H.H is not A")


def _batch(p: _Probe) -> float:
    worst = 0.0
    for dtype in p.dtypes():
        x, y = p.x(dtype, (2, 3)), p.y(dtype, (2, 3))
        for v, adjoint in ((x, False), (y, True)):
            loop = torch.stack([torch.stack([p.op._call(w, adjoint) for w in row]) for row in v])
            worst = max(worst, _gap(p.op._call(v, adjoint), loop))
    return worst


def _layout(p: _Probe) -> float:
    worst = 0.0
    for dtype in p.dtypes():
        for draw, adjoint in ((p.x, False), (p.y, True)):
            v = draw(dtype, (3,))
            want = p.op._call(v, adjoint)
            strided = torch.empty(*v.shape, 2, dtype=v.dtype, device=v.device)[..., 0].copy_(v)
            worst = max(worst, _gap(p.op._call(strided, adjoint), want))
            one = v[:1].expand(3, *v.shape[1:])
            worst = max(worst, _gap(p.op._call(one, adjoint), want[:1].expand_as(want)))
            if v.is_complex():
                worst = max(worst, _gap(p.op._call(v.conj().resolve_conj().conj(), adjoint), want))
    return worst


def _untouched(p: _Probe) -> None:
    for draw, adjoint in ((p.x, False), (p.y, True)):
        v = draw()
        before = v.clone()
        out = p.op._call(v, adjoint)
        if not torch.equal(v, before):
            raise CheckError(f"{p.op._name(adjoint)} changes its input")
        if out.untyped_storage().data_ptr() == v.untyped_storage().data_ptr():
            raise CheckError(f"the result of {p.op._name(adjoint)} shares memory with its input")
        again = p.op._call(v, adjoint).clone()
        out.add_(1)
        if not torch.equal(p.op._call(v, adjoint), again):
            raise CheckError(f"writing into the result of {p.op._name(adjoint)} changes the operator")


def _gradcheck(p: _Probe) -> None:
    batched = p.rtol <= 1e-9  # torch compares batches with loops to 1e-8; the tests of vmap do it to `rtol`
    for dtype in p.dtypes():
        for draw, adjoint in ((p.x, False), (p.y, True)):
            v = _leaf(draw(dtype))
            torch.autograd.gradcheck(
                lambda u, adjoint=adjoint: p.op._call(u, adjoint),  # type: ignore[misc]
                v,
                **p.steps(1e-6, 1e-5),
                check_forward_ad=True,
                check_batched_grad=batched,
                check_batched_forward_grad=batched,
                fast_mode=not p.small,
            )


def _gradgradcheck(p: _Probe) -> None:
    for dtype in p.dtypes():
        torch.autograd.gradgradcheck(
            lambda u: _as_real(p.op(u)) ** 2,
            _leaf(p.x(dtype)),
            **p.steps(1e-5, 1e-4, 2),
            check_fwd_over_rev=True,
            fast_mode=True,
        )


def _backward_is_adjoint(p: _Probe) -> float:
    worst = 0.0
    for dtype in p.dtypes():
        x, g = _leaf(p.x(dtype, (2,))), p.y(dtype, (2,))
        (grad,) = torch.autograd.grad(p.op(x), x, g)
        want = p.op._call(g, True)
        worst = max(worst, _gap(grad, want.real if want.is_complex() and not x.is_complex() else want.to(x.dtype)))
    return worst


def _second_order(p: _Probe) -> float:
    """Hessian-vector product of |A x|^2 / 2 + sum x^4 / 4: a loss whose operator part must not be dropped."""
    x, v = _leaf(p.x()), p.x()
    loss = (_as_real(p.op(x)) ** 2).sum() / 2 + (x**4).sum() / 4
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (hv,) = torch.autograd.grad(g, x, v)
    back = p.op._call(p.op(v), True)
    return _gap(hv, (back.real if back.is_complex() else back) + 3 * x.detach() ** 2 * v)


def _vjp(p: _Probe) -> float:
    x, g = p.x(), p.y()
    y, pull, *_ = torch.func.vjp(p.op, x)
    want = p.op._call(g, True)
    return max(_gap(y, p.op(x)), _gap(pull(g)[0], want.real if want.is_complex() else want))


def _jvp(p: _Probe) -> float:
    worst = 0.0
    for dtype in p.dtypes():
        x, t = p.x(dtype), p.x(dtype)  # the tangent is not the point
        y, dy = torch.func.jvp(p.op, (x,), (t,))[:2]
        worst = max(worst, _gap(y, p.op(x)), _gap(dy, p.op(t)))
    return worst


def _vmap(p: _Probe) -> float:
    x = p.x(batch=(3, 2))
    want = p.op(x)
    nested = torch.func.vmap(torch.func.vmap(p.op))(x)
    moved = torch.func.vmap(p.op, in_dims=1)(x.movedim(0, 1))
    back = torch.func.vmap(p.op.H)(want)
    return max(_gap(nested, want), _gap(moved, want), _gap(back, p.op.H(want)))


def _jacrev(p: _Probe) -> float:
    m = p.matrix()
    return _gap(torch.func.jacrev(p.real_function())(p.x()).reshape(m.shape), m)


def _jacfwd(p: _Probe) -> float:
    m = p.matrix()
    return _gap(torch.func.jacfwd(p.real_function())(p.x()).reshape(m.shape), m)


def _hessian(p: _Probe) -> float:
    m = p.matrix()
    loss = lambda x: (p.real_function()(x) ** 2).sum() / 2  # noqa: E731
    want = m.T @ m
    nested = torch.func.jacrev(torch.func.jacrev(loss))(p.x()).reshape(want.shape)
    return max(_gap(torch.func.hessian(loss)(p.x()).reshape(want.shape), want), _gap(nested, want))


def _linearize(p: _Probe) -> float:
    x, t = p.x(), p.x()
    y, push, *_ = torch.func.linearize(p.op, x)
    return max(_gap(y, p.op(x)), _gap(push(t), p.op(t)))


def _compile(p: _Probe) -> float:
    torch._dynamo.reset()
    there = torch.compile(lambda x: p.op(x), fullgraph=True, backend="aot_eager")
    back = torch.compile(lambda x: p.op.H(p.op(x)), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        return max(max(_gap(there(x), p.op(x)), _gap(back(x), p.op.H(p.op(x)))) for x in (p.x(), p.x(batch=(2,))))


def _compile_training(p: _Probe) -> float:
    torch._dynamo.reset()
    loss = lambda x: (_as_real(p.op(x)) ** 3).sum()  # noqa: E731
    x = _leaf(p.x(batch=(2,)))
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    (want,) = torch.autograd.grad(loss(x), x)
    return _gap(got, want)


def _fake(p: _Probe) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    want = p.op(p.x(batch=(2,)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = p.op(mode.from_tensor(p.x(batch=(2,))))
    if got.shape != want.shape or got.dtype != want.dtype:
        raise CheckError(
            f"FakeTensor says {tuple(got.shape)} {got.dtype}, the result has {tuple(want.shape)} {want.dtype}"
        )


def _copies(p: _Probe) -> float:
    x = p.x()
    buffer = io.BytesIO()
    torch.save(p.op, buffer)
    buffer.seek(0)
    made = [
        pickle.loads(pickle.dumps(p.op)),
        copy.deepcopy(p.op),
        copy.copy(p.op),
        torch.load(buffer, weights_only=False),
    ]
    before = [t.dtype for t in (*p.op.parameters(), *p.op.buffers())]
    single = p.op.to(torch.float32)
    if before != [t.dtype for t in (*p.op.parameters(), *p.op.buffers())]:
        raise CheckError("A.to(dtype) changes A")
    if repr(single) != repr(p.op):
        raise CheckError(f"repr changes from {p.op!r} to {single!r}")
    made[0].load_state_dict(p.op.state_dict())
    y = p.y()
    return max(max(_gap(m(x), p.op(x)), _gap(m.H(y), p.op.H(y))) for m in made)


def _numpy(p: _Probe) -> None:
    x, y = p.x().cpu(), p.y().cpu()
    for v, adjoint in ((x, False), (y, True)):
        got, want = (
            p.op._call(v.numpy(), adjoint),
            p.op._call(v.to(p.device), adjoint).detach().cpu().resolve_conj().numpy(),
        )
        if not isinstance(got, np.ndarray) or got.dtype != want.dtype or not np.array_equal(got, want):
            raise CheckError(f"{p.op._name(adjoint)} of an ndarray differs from that of a tensor")
    if p.op.matvec(x.numpy().ravel()).shape != (p.op.shape[0],) or p.op.rmatvec(y.numpy().ravel()).shape != (
        p.op.shape[1],
    ):
        raise CheckError("matvec and rmatvec must map flat vectors to flat vectors")


class _Call(torch.nn.Module):
    """The operator or its adjoint as a module, so that functional_call can replace what it holds."""

    def __init__(self, op: LinearOperator, adjoint: bool) -> None:
        super().__init__()
        self.op, self.adjoint = op, adjoint

    def forward(self, v: Tensor) -> Tensor:
        return self.op._call(v, self.adjoint)


def _parameters(p: _Probe) -> None:
    """Every floating point tensor held: its gradient is right, in both directions, or refused."""
    held = {
        n: t for n, t in (*p.op.named_parameters(), *p.op.named_buffers()) if t.is_floating_point() or t.is_complex()
    }
    if not held:
        raise _Skip("the operator holds no floating point tensor")
    if not p.small:
        raise _Skip(f"the operator has more than {_DENSE_LIMIT} rows or columns")
    refused = []
    for name, tensor in held.items():
        value = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).clone().requires_grad_()
        for adjoint, v in ((False, p.x()), (True, p.y())):
            module = _Call(p.op, adjoint)
            function = lambda t, m=module, v=v, n=name: torch.func.functional_call(m, {f"op.{n}": t}, (v,))  # noqa: E731
            try:
                torch.autograd.gradcheck(function, value, **p.steps(1e-5, 1e-4, 1, False), check_forward_ad=True)
                square = lambda t, f=function: (_as_real(f(t)) ** 2).sum()  # noqa: E731
                torch.autograd.gradgradcheck(square, value, **p.steps(1e-4, 1e-3, 2, False), fast_mode=True)
            except NotDifferentiableError as error:
                refused.append(f"{name}: {error}")
    if refused:
        raise _Skip("refused with a reason: " + refused[0])


_TESTS: dict[str, Callable[[_Probe], float | None]] = {
    "shapes": _shapes,
    "dtypes": _dtypes,
    "linearity": _linearity,
    "dot test": _dot,
    "A.H.H is A": _twice_adjoint,
    "batch equals loop": _batch,
    "strided, expanded, conjugate input": _layout,
    "no mutation, no aliasing": _untouched,
    "backward equals adjoint": _backward_is_adjoint,
    "gradcheck, forward and batched": _gradcheck,
    "gradgradcheck": _gradgradcheck,
    "second order in a mixed loss": _second_order,
    "torch.func.vjp": _vjp,
    "torch.func.jvp": _jvp,
    "torch.func.vmap": _vmap,
    "torch.func.jacrev": _jacrev,
    "torch.func.jacfwd": _jacfwd,
    "torch.func.hessian": _hessian,
    "torch.func.linearize": _linearize,
    "torch.compile forward": _compile,
    "torch.compile training": _compile_training,
    "FakeTensor": _fake,
    "pickle, copy, to, state_dict": _copies,
    "NumPy": _numpy,
    "gradients of held tensors": _parameters,
}
