"""The autograd bridge: d(A x) = A dx and grad_x = A^H grad_y, for operators whose code autograd cannot see.

An operator whose `_forward` and `_adjoint` are a hand-written pair (or run outside torch: numba, NumPy, finufft) is
applied through one `autograd.Function`, whose backward is the same Function with the direction flipped. That gives
reverse mode of every order, forward mode and vmap. Tracers (torch.compile, export, FakeTensor, make_fx) must not look
inside, so they see one dispatcher op, `pullback::apply`, whose Autograd and functorch kernels enter the same Function.

This is the only file that touches private torch API. Measured on torch 2.13.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pullback.core.errors import NotDifferentiableError

if TYPE_CHECKING:
    from pullback.core.operator import LinearOperator

_C: Any = torch._C
_PLAIN = (Tensor, torch.nn.Parameter)
_interpreter = _C._functorch.peek_interpreter_stack
_dispatch_modes = _C._len_torch_dispatch_stack
_is_legacy_batched = _C._functorch.is_legacy_batchedtensor
_transforms_active = _C._are_functorch_transforms_active

_F = TypeVar("_F", bound=Callable[..., Any])


def constant_in_graphs(function: _F) -> _F:
    """`torch.compiler.assume_constant_result` without importing torch's compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Handles name live operators in graphs. They start at a random place in each process, so that a graph which was cached
# on disk by another process can never meet an operator of this one.
_operators: WeakValueDictionary[int, LinearOperator] = WeakValueDictionary()
_handles = itertools.count(int.from_bytes(os.urandom(5)) << 22)


def register(op: LinearOperator) -> int:
    """A new handle for `op`, valid while `op` lives."""
    handle = next(_handles)
    _operators[handle] = op
    return handle


def lookup(handle: int) -> LinearOperator:
    """The operator behind a handle."""
    op = _operators.get(handle)
    if op is None:
        raise NotDifferentiableError(
            f"operator {handle} of a traced graph no longer exists; keep the operator alive as long as the graph"
        )
    return op


def is_live(tensor: Tensor) -> bool:
    """Whether a derivative with respect to `tensor` may be asked for (reverse or forward mode, any transform)."""
    return (
        (tensor.requires_grad and torch.is_grad_enabled())
        or _C._functorch.is_functorch_wrapped_tensor(tensor)
        or (
            forward_ad._current_level >= 0
            and _C._is_fwd_grad_enabled()
            and forward_ad.unpack_dual(tensor).tangent is not None
        )
    )


def is_eager(x: Tensor) -> bool:
    """True when `x` holds numbers and nobody watches: no functorch or vmap level, dispatch mode, subclass or meta."""
    return (
        type(x) in _PLAIN
        and _interpreter() is None
        and not _dispatch_modes()
        and not x.is_meta
        and not _is_legacy_batched(x)
    )


def transforms_active() -> bool:
    """Whether a torch.func transform is running."""
    return bool(_transforms_active())


def nested_forward_mode() -> bool:
    """Whether forward mode runs inside forward mode, where torch gets a non-linear Function wrong (pytorch#197867)."""
    stack = _C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == _C._functorch.TransformType.Jvp for level in stack) >= 2


def below_autograd() -> Any:
    """A context in which dispatcher ops skip autograd."""
    return _C._AutoDispatchBelowAutograd()


def ordinary() -> Any:
    """A context in which the dispatcher behaves as in ordinary code, for code that the dispatcher itself calls."""
    return _C._ForceDispatchKeyGuard(*_ORDINARY)


def call(x: Tensor, op: LinearOperator, adjoint: bool, tensors: Sequence[Tensor]) -> Tensor:
    """A(tensors) x or A(tensors)^H x, differentiably, for `x` of shape (..., *dims).

    `tensors` are the values of the tensors that the operator holds, in the order of `op._held()`.
    """
    if torch.compiler.is_compiling():
        return _dispatch(x, tensors, op._handle, adjoint)
    if _transforms_active():
        return _Bridge.apply(x, op, adjoint, *tensors)
    if forward_ad._current_level < 0 and not (
        torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    ):
        return _evaluate(x, op, adjoint, tensors)
    return _fast_apply(x, op, adjoint, *tensors)


def _evaluate(x: Tensor, op: LinearOperator, adjoint: bool, tensors: Sequence[Tensor]) -> Tensor:
    """The numbers, without a graph: in place when they exist, else through the dispatcher op for whoever traces."""
    if not is_eager(x):
        with _C._AutoDispatchBelowAutograd():
            return _dispatch(x, tensors, op._handle, adjoint)
    return _compute(x, op, adjoint, tensors)


def _compute(x: Tensor, op: LinearOperator, adjoint: bool, tensors: Sequence[Tensor]) -> Tensor:
    """Run the operator's own code. A result that requires grad betrays a tensor that the operator did not declare."""
    op = op._rebind(tensors) if tensors else op
    if tensors and any(t.requires_grad for t in tensors):
        with torch.no_grad():
            return op._adjoint(x) if adjoint else op._forward(x)
    if x.requires_grad:
        x = x.detach()
    # Grad mode stays on, so that a result which requires grad gives such a tensor away.
    enabled = torch.is_grad_enabled()
    if not enabled:
        _C._set_grad_enabled(True)
    try:
        y = op._adjoint(x) if adjoint else op._forward(x)
    finally:
        if not enabled:
            _C._set_grad_enabled(False)
    if y.requires_grad:
        raise NotDifferentiableError(
            f"{type(op).__name__} uses a tensor that requires grad but does not hold it, so its gradient would be "
            f"lost; assign the tensor as an attribute of the operator, or set `_native = True` if its code is torch"
        )
    return y


class _Bridge(torch.autograd.Function):
    """y = A(tensors) x. Inputs: x, operator, adjoint, *tensors."""

    @staticmethod
    def forward(x: Tensor, op: LinearOperator, adjoint: bool, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        y = _evaluate(x, op, adjoint, tensors)
        if y is x:
            return y.clone()
        return y.detach() if y._is_view() else y  # torch forbids writing into a view that a Function returns

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.op, adjoint, *tensors = inputs
        ctx.adjoint = adjoint
        ctx.is_complex = x.is_complex()
        ctx.set_materialize_grads(False)
        if not tensors:
            return
        # x is needed only for the derivative in the tensors. Saved tensors carry a version counter: a parameter that
        # is changed in place between forward and backward is an error, as everywhere in torch.
        # (In forward mode the tangents have been taken off the inputs by now, so it cannot be asked who has one.)
        ctx.with_x = forward_ad._current_level >= 0 or any(is_live(t) or t.requires_grad for t in tensors)
        saved = (x, *tensors) if ctx.with_x else tensors
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def _unpack(ctx: Any) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        saved = ctx.saved_tensors
        if not saved:
            return None, ()
        return (saved[0], saved[1:]) if ctx.with_x else (None, saved)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        x, tensors = _Bridge._unpack(ctx)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = call(g, ctx.op, not ctx.adjoint, tensors)
            if grad_x.is_complex() and not ctx.is_complex:
                grad_x = grad_x.real
        grads: list[Tensor | None] = [None] * len(tensors)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        if wanted:
            assert x is not None, "the bridge did not save its input; please report"
            for i, grad in zip(wanted, _tensor_pullback(ctx.op, ctx.adjoint, x, g, tensors, wanted), strict=True):
                grads[i] = grad
        return (grad_x, None, None, *grads)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, _op: None, _adjoint: None, *dtensors: Tensor | None) -> Tensor:  # type: ignore[override]
        x, tensors = _Bridge._unpack(ctx)
        dy = None if dx is None else call(dx, ctx.op, ctx.adjoint, tensors)
        wanted = [i for i, d in enumerate(dtensors) if d is not None]
        if wanted:
            assert x is not None, "the bridge did not save its input; please report"
            _refuse_nested_forward_mode(ctx.op)
            tangents = [d for d in dtensors if d is not None]
            push = _tensor_pushforward(ctx.op, ctx.adjoint, x, tensors, wanted, tangents)
            dy = push if dy is None else dy + push
        assert dy is not None, "jvp without a tangent; please report"
        return dy

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, op: LinearOperator, adjoint: bool, *tensors: Tensor
    ) -> Any:
        x_dim, _, _, *t_dims = in_dims
        if all(d is None for d in t_dims):
            return call(x.movedim(x_dim, 0), op, adjoint, tensors), 0
        pick = lambda t, d, i: t if d is None else t.select(d, i)  # noqa: E731
        rows = [
            call(pick(x, x_dim, i), op, adjoint, [pick(t, d, i) for t, d in zip(tensors, t_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        return torch.stack(rows), 0


# `Function.apply` binds inspect.signature at every call once setup_context exists (12 us); this does not.
_fast_apply: Any = super(torch.autograd.Function, _Bridge).apply


def _tensor_pullback(
    op: LinearOperator, adjoint: bool, x: Tensor, g: Tensor, tensors: Sequence[Tensor], wanted: Sequence[int]
) -> list[Tensor | None]:
    """Gradients of Re<g, A(tensors) x> in the tensors numbered `wanted`, themselves differentiable."""
    if op._has_range_derivatives:
        grads: list[Tensor | None] = []
        for i in wanted:
            derivative = op._derivative(i)
            if derivative is None:
                grads.append(torch.zeros_like(tensors[i]))
                continue
            u, v = (x, call(g, derivative, False, tensors)) if adjoint else (g, call(x, derivative, False, tensors))
            product = (u.conj() * v).real if u.is_complex() or v.is_complex() else u * v
            grads.append(product.sum_to_size(tensors[i].shape).to(tensors[i].dtype))
        return grads
    chosen = [tensors[i] for i in wanted]
    pull = torch.func.vjp(lambda *new: _plain(op, adjoint, x, tensors, wanted, new), *chosen)[1]
    return list(pull(g))


def _tensor_pushforward(
    op: LinearOperator,
    adjoint: bool,
    x: Tensor,
    tensors: Sequence[Tensor],
    wanted: Sequence[int],
    tangents: Sequence[Tensor],
) -> Tensor:
    """The derivative of A(tensors) x in the direction `tangents` of the tensors numbered `wanted`."""
    if op._has_range_derivatives:
        total: Tensor | None = None
        for i, tangent in zip(wanted, tangents, strict=True):
            derivative = op._derivative(i)
            if derivative is None:
                continue
            if adjoint:
                term = call(tangent * x, derivative, True, tensors)
            else:
                term = tangent * call(x, derivative, False, tensors)
            total = term if total is None else total + term
        return torch.zeros_like(call(x, op, adjoint, tensors)) if total is None else total
    chosen = tuple(tensors[i] for i in wanted)
    return torch.func.jvp(lambda *new: _plain(op, adjoint, x, tensors, wanted, new), chosen, tuple(tangents))[1]


def _plain(
    op: LinearOperator,
    adjoint: bool,
    x: Tensor,
    tensors: Sequence[Tensor],
    wanted: Sequence[int],
    new: Sequence[Tensor],
) -> Tensor:
    """The operator's own torch code with some tensors replaced, open to autograd."""
    values = list(tensors)
    for i, value in zip(wanted, new, strict=True):
        values[i] = value
    bound = op._rebind(values)
    return bound._adjoint(x) if adjoint else bound._forward(x)


def _refuse_nested_forward_mode(op: LinearOperator) -> None:
    """Forward mode inside forward mode through a non-linear Function is silently wrong in torch (pytorch#197867)."""
    if nested_forward_mode():
        raise NotDifferentiableError(
            f"forward mode nested in forward mode with respect to the parameters of {type(op).__name__} is wrong "
            f"in torch (pytorch#197867); use reverse mode for one of the two, for example jacfwd(jacrev(f))"
        )


# The dispatcher op --------------------------------------------------------------------------------------------------

library = torch.library.Library("pullback", "DEF")
# Four optional tensors and not a list: torch's older vmap, which gradcheck uses, cannot batch over list arguments.
_SLOTS = 4
_ORDINARY = (_C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set())  # of ordinary code
library.define(
    "apply(Tensor x, int handle, bool adjoint, Tensor? a, Tensor? b, Tensor? c, Tensor? d) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatch(x: Tensor, tensors: Sequence[Tensor], handle: int, adjoint: bool) -> Tensor:
    if len(tensors) > _SLOTS:
        raise NotDifferentiableError(
            f"an operator that is not plain torch can hold {_SLOTS} tensors in a traced function; got {len(tensors)}; "
            f"write it as a product or sum of smaller operators"
        )
    return torch.ops.pullback.apply(x, handle, adjoint, *tensors, *(None,) * (_SLOTS - len(tensors)))


def _given(slots: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(t for t in slots if t is not None)


def _kernel(x: Tensor, handle: int, adjoint: bool, *slots: Tensor | None) -> Tensor:
    tensors = _given(slots)
    # On the way here the dispatcher has switched off what comes before: autograd, functorch. An operator may use them
    # inside (FunctionOperator's derived adjoint does), so they are as in ordinary code again.
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False), _C._ForceDispatchKeyGuard(*_ORDINARY):
        y = _compute(x, lookup(handle), adjoint, tensors).resolve_conj().contiguous()
    return y.clone() if y.untyped_storage()._cdata == x.untyped_storage()._cdata else y


def _fake(x: Tensor, handle: int, adjoint: bool, *slots: Tensor | None) -> Tensor:
    op = lookup(handle)
    dims_in, dims_out = (op.dimsd, op.dims) if adjoint else (op.dims, op.dimsd)
    batch = x.shape[: x.ndim - len(dims_in)]
    return x.new_empty((*batch, *dims_out), dtype=op._out_dtype(x.dtype, adjoint))


def _autograd_kernel(x: Tensor, handle: int, adjoint: bool, *slots: Tensor | None) -> Tensor:
    tensors = _given(slots)
    if forward_ad._current_level < 0 and not (
        torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    ):
        with _C._AutoDispatchBelowAutograd():
            return _dispatch(x, tensors, handle, adjoint)
    return _fast_apply(x, lookup(handle), adjoint, *tensors)


library.impl("apply", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("pullback::apply", _fake, lib=library)
library.impl("apply", _autograd_kernel, "Autograd")
library.impl(
    "apply",
    lambda x, handle, adjoint, *slots: _Bridge.apply(x, lookup(handle), adjoint, *_given(slots)),
    "FuncTorchDynamicLayerFrontMode",
)
