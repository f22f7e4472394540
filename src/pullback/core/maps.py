"""The bridge for non-linear maps y = F(tensors) that know their numbers, their pullback and their pushforward.

A `Map` is code outside torch (a compiled kernel) with its derivatives as further maps. It enters the graph through one
`autograd.Function`; tracers see one dispatcher op, `pullback::map`, that names it by a text. See `core/autograd.py` for
why both are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pullback.core import autograd
from pullback.core.errors import NotDifferentiableError


class Map(Protocol):
    """What the bridge asks of a map."""

    key: str  # names it in the graphs of this process

    def event(self) -> tuple[int, ...]:
        """How many trailing axes of each tensor are not batch."""

    def evaluate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The numbers."""

    def fake(self, tensors: Sequence[Tensor]) -> Tensor:
        """An empty tensor like the result."""

    def pullback(
        self, tensors: Sequence[Tensor], out: Tensor, g: Tensor, wanted: Sequence[int]
    ) -> Sequence[Tensor | None]:
        """Gradients in the tensors numbered `wanted`, made of differentiable calls. None is zero."""

    def pushforward(self, tensors: Sequence[Tensor], out: Tensor, tangents: Sequence[Tensor | None]) -> Tensor | None:
        """The tangent of the result, made of differentiable calls. None is zero."""

    def over(self, tensors: Sequence[Tensor]) -> Tensor:
        """F over one more leading axis, which some of the tensors have; for maps that cannot, member by member."""
        return call(self, tensors)


_found: WeakValueDictionary[str, Map] = WeakValueDictionary()


def register(m: Map) -> None:
    """Make `m` known to graphs by its key, while it lives."""
    _found.setdefault(m.key, m)


def lookup(key: str) -> Map:
    """The map behind a key."""
    m = _found.get(key)
    if m is None:
        raise NotDifferentiableError(
            f"the map {key!r} of a traced graph no longer exists; keep what made it alive as long as the graph"
        )
    return m


def call(m: Map, tensors: Sequence[Tensor]) -> Tensor:
    """F(tensors), differentiably."""
    if torch.compiler.is_compiling():
        return _dispatch(m, tensors)
    if autograd.transforms_active():
        return _Bridge.apply(m, *tensors)
    if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return _evaluate(m, tensors)
    return _fast_apply(m, *tensors)


def _evaluate(m: Map, tensors: Sequence[Tensor]) -> Tensor:
    if not all(map(autograd.is_eager, tensors)):
        with autograd.below_autograd():
            return _dispatch(m, tensors)
    return m.evaluate([t.detach() for t in tensors] if any(t.requires_grad for t in tensors) else tensors)


class _Bridge(torch.autograd.Function):
    """y = F(tensors). Inputs: map, *tensors."""

    @staticmethod
    def forward(m: Map, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        return _evaluate(m, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.map, *tensors = inputs
        ctx.set_materialize_grads(False)
        if not (output.is_floating_point() or output.is_complex()):
            ctx.mark_non_differentiable(output)
        ctx.save_for_backward(*tensors, output)
        ctx.save_for_forward(*tensors, output)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 1)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        if g is not None and wanted:
            *tensors, out = ctx.saved_tensors
            for i, grad in zip(wanted, ctx.map.pullback(tensors, out, g, wanted), strict=True):
                # A zero gradient is a tensor of zeros: None would read as "not connected".
                grads[i] = torch.zeros_like(tensors[i]) if grad is None else grad
        return (None, *grads)

    @staticmethod
    def jvp(ctx: Any, _map: None, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        *tensors, out = ctx.saved_tensors
        push = ctx.map.pushforward(tensors, out, tangents)
        return torch.zeros_like(out) if push is None else push

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], m: Map, *tensors: Tensor) -> Any:
        event = m.event()
        batch = max(
            t.ndim - k - (d is not None) for t, k, d in zip(tensors, event, in_dims[1:], strict=True)
        )  # batch axes of the map itself
        moved = []
        for t, k, d in zip(tensors, event, in_dims[1:], strict=True):
            if d is not None:
                t = t.movedim(d, 0)
                missing = batch - (t.ndim - 1 - k)
                t = t.reshape(t.shape[0], *(1,) * missing, *t.shape[1:]) if missing else t
            moved.append(t)
        return m.over(moved), 0


_fast_apply: Any = super(torch.autograd.Function, _Bridge).apply  # see core/autograd.py

# The dispatcher op --------------------------------------------------------------------------------------------------

# Optional tensors and not a list: torch's older vmap, which gradcheck uses, cannot batch over list arguments.
_SLOTS = 24
autograd.library.define(
    f"map(str key, {', '.join(f'Tensor? t{k}' for k in range(_SLOTS))}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _dispatch(m: Map, tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) > _SLOTS:
        raise NotDifferentiableError(
            f"a traced reduction can have {_SLOTS} arguments (each derivative adds some); got {len(tensors)}; "
            f"concatenate variables of the same kind"
        )
    if not torch.compiler.is_compiling():
        register(m)
    return torch.ops.pullback.map(m.key, *tensors, *(None,) * (_SLOTS - len(tensors)))


def _given(slots: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(t for t in slots if t is not None)


def _kernel(key: str, *slots: Tensor | None) -> Tensor:
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False), autograd.ordinary():
        return lookup(key).evaluate(_given(slots))


def _autograd_kernel(key: str, *slots: Tensor | None) -> Tensor:
    tensors = _given(slots)
    if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        with autograd.below_autograd():
            return torch.ops.pullback.map(key, *slots)
    return _fast_apply(lookup(key), *tensors)


autograd.library.impl("map", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("pullback::map", lambda key, *slots: lookup(key).fake(_given(slots)), lib=autograd.library)
autograd.library.impl("map", _autograd_kernel, "Autograd")
autograd.library.impl(
    "map", lambda key, *slots: _Bridge.apply(lookup(key), *_given(slots)), "FuncTorchDynamicLayerFrontMode"
)
