"""The derivative of a function at a point: one recorded graph, differentiated as often as products are asked for.

Where nothing is traced or transformed, f is evaluated once and its graph kept; f'(x)^H g is then one pass through it.
f'(x) v is the transpose of g -> f'(x)^H g, whose graph is recorded when it is first needed. Measured on a small
network, that product takes a ninth of the time of forward mode; forward mode is used where an operation has no second
derivative. Inside torch.func transforms and torch.compile the same products are made of `torch.func.vjp`.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pullback.core import autograd, nodes
from pullback.core.errors import ArgumentError, NotDifferentiableError
from pullback.core.operator import LinearOperator, _unshared
from pullback.core.shapes import complex_of, real_of, size

Tensors = Sequence[Tensor]
_forward_lock = threading.RLock()
# The code of every `backward` that is marked so, by which it is known.
_ONCE = torch.autograd.function.once_differentiable(len).__code__
_CHANGED = "modified by an inplace operation"
_LEAF = "leaf Variable that requires grad is being used in an in-place operation"


def recordable(*tensors: Tensor) -> bool:
    """Whether a graph that is recorded now can serve later: nobody traces, transforms or differentiates forward."""
    return (
        not torch.compiler.is_compiling()
        and not autograd.transforms_active()
        and forward_ad._current_level < 0
        and all(autograd.is_eager(t) for t in tensors)
    )


def frozen(t: Tensor) -> Tensor:
    """A copy of `t`, connected to it, that later changes of `t` in place do not reach."""
    if t.is_inference() or torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return t.clone()
    return t.clone(memory_format=torch.contiguous_format)


class Unchanged:
    """A context that refuses functions which write into their arguments: derivatives would belong to another point.

    Raises: ArgumentError.
    """

    def __init__(self, owner: str, points: Tensors) -> None:
        self.owner, self.points = owner, points

    def __enter__(self) -> None:
        self.versions = [p._version for p in self.points]

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if any(p._version != v for p, v in zip(self.points, self.versions, strict=True)) or _LEAF in str(error):
            raise ArgumentError(
                f"{self.owner}: the function changes its argument in place (or another leaf that requires grad), so "
                f"that its derivative would be taken at another point; work on a copy: x = x.clone()"
            ) from error


def private(x: Tensor) -> Tensor:
    """`x`, or a copy inside of transforms, where nobody sees that a function changes its argument in place."""
    return x.clone() if not torch.compiler.is_compiling() and autograd.transforms_active() else x


@contextmanager
def forward_mode() -> Iterator[None]:
    """A stretch of forward mode, for one thread at a time: its level belongs to the whole process."""
    _load_forward()
    with _forward_lock:
        yield


@functools.cache
def _load_forward() -> None:
    """Load what torch loads when forward mode is first used, without the warnings about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._decomp.decompositions_for_jvp  # noqa: F401


def uses_others(y: Tensor, point: Tensor) -> bool:
    """Whether `y` was computed from a leaf that requires grad other than `point`."""
    if not y.requires_grad:
        return False
    leaves = (nodes.variable(n) for n in nodes.topological([nodes.root(y)[0]]))
    return any(leaf is not None and leaf is not point for leaf in leaves)


def _recording() -> AbstractContextManager[Any]:
    """A context in which autograd builds graphs; cheap where it does so anyway."""
    if not torch.is_inference_mode_enabled():
        return torch.enable_grad()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    return stack


class Recording:
    """The values of a function at a point, with the graph behind them.

    Args:
        function: list of tensors -> list of tensors, in differentiable torch.
        at: the point; a tensor that requires grad stays connected.
        gradient: record the gradient of the function, whose one value is a number, in place of the function.
    """

    def __init__(self, function: Callable[[Tensors], Tensors], at: Tensors, gradient: bool = False) -> None:
        self.function, self.spent = function, False
        with _recording():
            self.points = [t if t.requires_grad else t.detach().requires_grad_() for t in at]
            with Unchanged("derivative", self.points):
                self.values: list[Tensor] = list(function(self.points))
            if not any(v.requires_grad for v in self.values):
                raise NotDifferentiableError(
                    "the function has no derivative: autograd sees no way from its value to x; write it in torch "
                    "without detach(), .item(), .numpy() and torch.no_grad()"
                )
            self.hidden = False  # the values depend on tensors that require grad beside the point
            self._reason = ""  # why no second derivative exists, once that is known
            self._search()
            if gradient and self._reason:
                raise NotDifferentiableError(f"the function has no Hessian: {self._reason}")
            self.outs = self._gradient() if gradient else self.values
        self._pullback: tuple[list[Tensor], list[Tensor]] | None = None  # f'(x)^H g with its graph, and g

    def _gradient(self) -> list[Tensor]:
        found = torch.autograd.grad(self.values, self.points, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.points, found, strict=True)]

    def _search(self) -> None:
        """Look once at all nodes behind the values.

        What `once_differentiable` gives is cut off from the point, so that torch takes its derivative for zero.
        """
        seen = {p.grad_fn for p in self.points}
        own = {id(p) for p in self.points}
        self.hidden = any(v.requires_grad and v.grad_fn is None and id(v) not in own for v in self.values)
        stack = [v.grad_fn for v in self.values if v.grad_fn is not None and v.grad_fn not in seen]
        seen.update(stack)
        while stack:
            node: Any = stack.pop()
            function = getattr(node, "_forward_cls", None)
            if function is not None and getattr(function.backward, "__code__", None) is _ONCE:
                self._reason = f"the backward of {function.__name__} is marked once_differentiable"
            for child, _ in node.next_functions:
                if child is None or child in seen:
                    continue
                seen.add(child)
                leaf = None if child.next_functions else nodes.variable(child)
                if leaf is None:
                    stack.append(child)
                elif id(leaf) not in own:
                    if node.name() == "torch::autograd::Error":
                        raise NotDifferentiableError("the function differentiates something once_differentiable")
                    self.hidden = True
        if self.hidden:
            # `backward()` on a product reaches the point, which belongs to nobody: no `.grad` is kept there.
            for p in self.points:
                if p.is_leaf:
                    p.register_post_accumulate_grad_hook(_forget)

    def product(self, vs: Tensors, batch: tuple[int, ...], adjoint: bool, create: bool) -> list[Tensor]:
        """`pull`, or `push`, of tensors of any dtypes."""
        if adjoint:
            found = self.pull(_like(vs, self.outs), batch, create)
        else:
            found = self.push(_like(vs, self.points), batch, create)
        return self.watched(found) if create else found

    def watched(self, tensors: Tensors) -> list[Tensor]:
        """The tensors, such that a backward pass from one of them marks the recording as spent.

        Such a pass frees what the recording needs, and a later product would fail when it is differentiated.
        """
        found = [t.view_as(t) if t.requires_grad else t for t in tensors]
        for t in found:
            if t.requires_grad:
                t.register_hook(self._spend)
        return found

    def _spend(self, _: Tensor) -> None:
        self.spent = True

    def pull(self, gs: Tensors, batch: tuple[int, ...], create: bool) -> list[Tensor]:
        """f'(x)^H g for cotangents of shape (*batch, *shape of the value)."""
        try:
            return _differentiate(self.outs, self.points, gs, batch, create)
        except RuntimeError as error:
            if not is_missing(error):
                raise
            raise NotDifferentiableError(
                f"an operation of the function has no {'second ' if self.outs is not self.values else ''}derivative: "
                f"{first_line(error)}"
            ) from None

    def push(self, vs: Tensors, batch: tuple[int, ...], create: bool) -> list[Tensor]:
        """f'(x) v for tangents of shape (*batch, *shape of the point)."""
        if not self._reason:
            try:
                known = self._pullback
                if known is None:
                    with _recording():
                        seeds = [torch.zeros_like(o, requires_grad=True) for o in self.outs]
                        known = _differentiate(self.outs, self.points, seeds, (), True), seeds
                    self._pullback = known  # in one step, because other threads may be here
                return _differentiate(*known, vs, batch, create)
            except RuntimeError as error:
                if not is_missing(error):
                    raise
                self._pullback, self._reason = None, first_line(error)
        return self._push_forward(vs, batch)

    def _push_forward(self, vs: Tensors, batch: tuple[int, ...]) -> list[Tensor]:
        points = tuple(p if p.requires_grad and not p.is_leaf else p.detach() for p in self.points)
        product = lambda *v: torch.func.jvp(lambda *p: tuple(self.function(p)), points, v)[1]  # noqa: E731
        try:
            with forward_mode():
                return _over(product, vs, batch)
        except RuntimeError as error:
            if not is_missing(error):
                raise
            raise NotDifferentiableError(
                f"J v cannot be computed: an operation of the function has neither a second derivative "
                f"({self._reason}) nor a forward one ({first_line(error)}); J.H and todense(mode='reverse') work"
            ) from None


def _forget(t: Tensor) -> None:
    t.grad = None


def is_missing(error: RuntimeError) -> bool:
    """Whether torch says that a derivative does not exist."""
    text = str(error)
    if "atching rule" in text:  # the derivative exists, but not for many vectors at a time
        return False
    known = ("not implemented", "once_differentiable", "autograd.Function with functorch")
    return isinstance(error, NotImplementedError) or any(k in text for k in known)


def first_line(error: Exception) -> str:
    """The first sentence of an error."""
    return str(error).strip().splitlines()[0].split(". ")[0].rstrip(".")


def _differentiate(outs: Tensors, inputs: Tensors, gs: Tensors, batch: tuple[int, ...], create: bool) -> list[Tensor]:
    """sum_i (d outs_i / d inputs)^H g_i, zero where nothing depends on an input."""
    pairs = [(o, g) for o, g in zip(outs, gs, strict=True) if o.requires_grad]
    if not pairs or not size(batch):
        return [p.new_zeros((*batch, *p.shape)) for p in inputs]
    chosen = [o for o, _ in pairs]
    n, count = len(batch), size(batch)
    several = count > 1
    if several:
        rows = [g.reshape(-1, *g.shape[n:]) for _, g in pairs]
    else:
        rows = [g.reshape(g.shape[n:]) if n else g for _, g in pairs]

    def grad(given: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            chosen, inputs, given, retain_graph=True, create_graph=create, allow_unused=True, is_grads_batched=batched
        )

    try:
        if several:
            try:
                found = grad(rows, True)
            except RuntimeError as error:
                if is_missing(error) or _CHANGED in str(error):
                    raise
                # Some operation cannot be batched: one row after the other.
                members = [grad([r[k] for r in rows], False) for k in range(count)]
                found = tuple(None if c[0] is None else torch.stack(c) for c in zip(*members, strict=True))  # type: ignore[arg-type]
        else:
            found = grad(rows, False)
    except RuntimeError as error:
        if _CHANGED not in str(error):
            raise
        raise ArgumentError(
            "a tensor that the function uses was changed in place after its derivative was recorded, so the derivative "
            "belongs to values that no longer exist; build the operator again, or give the function a copy"
        ) from error
    return [
        p.new_zeros((*batch, *p.shape)) if d is None else (d.reshape(*batch, *p.shape) if n else d)
        for p, d in zip(inputs, found, strict=True)
    ]


def _over(function: Callable[..., tuple[Tensor, ...]], vs: Tensors, batch: tuple[int, ...]) -> list[Tensor]:
    """A function of several tensors over leading axes."""
    if not batch:
        return list(function(*vs))
    n = len(batch)
    found = torch.func.vmap(function)(*(v.reshape(-1, *v.shape[n:]) for v in vs))
    return [f.reshape(*batch, *f.shape[1:]) for f in found]


class _Differential(LinearOperator):
    """Base of the operators v -> f'(x) v; subclasses say what f is and how a vector is a list of tensors.

    The point is held as buffers. While nothing is asked for but numbers and derivatives in v, the operator is one node
    of the graph, computed by its `Recording`. If a derivative in x, or in what f holds or closes over, may be asked
    for, it is plain torch.
    """

    _recording: Recording | None
    _holders: tuple[dict[str, Tensor | None], ...] | None  # where f holds tensors, once that is known
    _open: bool  # made while something was traced or transformed: never recorded

    def _set_up(self, at: Tensors, recording: Recording | None) -> None:
        """Hold the point: called once, at the end of __init__."""
        self._buffers.update({f"x{i}": t for i, t in enumerate(at)})
        known = all(not m._parameters and not m._buffers and not m._modules for m in self._modules.values())  # type: ignore[union-attr]
        holders = () if known else None
        self.__dict__.update(_open=recording is None, _recording=recording, _holders=holders, _recorded_at=())
        self.__dict__["_recorded_at"] = () if recording is None else self._state()

    def _outputs(self, points: Tensors) -> Tensors:
        """The value at a point, as a list of tensors."""
        raise NotImplementedError

    def _derived(self, points: Tensors) -> Tensors:
        """What the operator is the derivative of, inside transforms: f, or its gradient."""
        return self._outputs(points)

    def _record(self) -> Recording:
        return Recording(self._outputs, self._points())

    def _points(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers.values())  # type: ignore[arg-type]

    def _state(self) -> tuple[tuple[Tensor, int], ...]:
        """Every tensor held, with what tells when it is changed in place."""
        return tuple((t, -1 if t.is_inference() else t._version) for t in self._tensors())

    def _recorded(self) -> Recording:
        """The graph of f at x; made anew where a tensor that the operator holds has been replaced or changed."""
        known, now = self.__dict__["_recorded_at"], self._state()
        if self._recording is None or self._recording.spent or not _same(known, now):
            self.__dict__["_recording"] = self._record()
            self.__dict__["_recorded_at"] = self._state()
        assert self._recording is not None
        return self._recording

    def _replaced(self) -> bool:
        """Whether the tensors held are others than those of the recording, as under functional_call.

        Those belong to somebody else, who may change them in ways that are not seen (gradcheck writes through `.data`).
        """
        known = self.__dict__["_recorded_at"]
        return bool(known) and any(t is not s for t, (s, _) in zip(self._tensors(), known, strict=False))

    def _tensors(self) -> tuple[Tensor, ...]:
        """The point, and what f holds if it is a module."""
        holders = self._holders
        if holders is None or torch.compiler.is_compiling():
            inner = [d for m in self.modules() for d in (m._parameters, m._buffers) if m is not self and d]
            self.__dict__["_holders"] = holders = tuple(inner)  # type: ignore[arg-type]
        if not holders:
            return self._points()
        return (*self._points(), *(t for d in holders for t in d.values() if t is not None))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_recording": None, "_recorded_at": (), "_holders": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.__dict__.update(_recording=None, _recorded_at=())  # the data of parameters is exchanged without a trace
        return super()._apply(fn, recurse)

    def _is_live(self, tensors: Any = None) -> bool:
        if self._open:
            return True
        held = self._tensors()
        if torch.compiler.is_compiling():
            return any(t.requires_grad for t in held)
        if any(autograd.is_live(t) for t in held):
            return True
        if self._recording is None and not recordable(*self._points()):
            return True  # a copy that is first used inside a transform, where nothing can be recorded
        return torch.is_grad_enabled() and self._recorded().hidden

    def _run(self, x: Tensor, adjoint: bool = False, tensors: Sequence[Tensor] | None = None) -> Tensor:
        if tensors is not None:
            return self._rebind(tensors)._run(x, adjoint)  # type: ignore[no-any-return]
        if self._is_live():
            return self._product(x, adjoint, True)
        if recordable(x) and not (x.requires_grad and torch.is_grad_enabled()):
            return self._product(x, adjoint, False)  # what the bridge would do in the end
        return autograd.call(x, self, adjoint, ())

    def _forward(self, x: Tensor) -> Tensor:
        return self._product(x, False, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._product(y, True, False)

    def _product(self, x: Tensor, adjoint: bool, live: bool) -> Tensor:
        batch = tuple(x.shape[: x.ndim - len(self.dimsd if adjoint else self.dims)])
        vs = self._enter(x, batch, adjoint)
        if live and (self._open or self._replaced() or not recordable(x, *self._points())):
            found = self._functional(vs, batch, adjoint)
        else:
            found = self._recorded().product(vs, batch, adjoint, live and torch.is_grad_enabled())
        return _unshared(self._leave(found, batch, adjoint, self._out_dtype(x.dtype, adjoint)).contiguous(), x)

    def _functional(self, vs: Tensors, batch: tuple[int, ...], adjoint: bool) -> list[Tensor]:
        """The product by torch.func: reverse mode twice, because forward mode cannot be nested (pytorch#197867)."""
        points = self._points()
        value, pull, *_ = torch.func.vjp(lambda *p: tuple(self._derived(p)), *points)
        if adjoint:
            return _over(lambda *g: pull(g), _like(vs, value), batch)
        zeros = tuple(torch.zeros_like(v) for v in value)
        push = torch.func.vjp(lambda *g: pull(g), *zeros)[1]
        return _over(lambda *v: push(v), _like(vs, points), batch)

    def _out_dtype(self, dtype: torch.dtype, adjoint: bool) -> torch.dtype:
        return real_of(dtype) if (self._real_domain if adjoint else self._real_range) else complex_of(dtype)

    def _enter(self, x: Tensor, batch: tuple[int, ...], adjoint: bool) -> list[Tensor]:
        """A vector of the domain (of the range, if `adjoint`) as the list of tensors that it stands for."""
        raise NotImplementedError

    def _leave(self, found: Tensors, batch: tuple[int, ...], adjoint: bool, dtype: torch.dtype) -> Tensor:
        """A list of tensors of the range (of the domain, if `adjoint`) as a vector."""
        raise NotImplementedError


def _same(a: tuple[tuple[Tensor, int], ...], b: tuple[tuple[Tensor, int], ...]) -> bool:
    return len(a) == len(b) and all(s is t and v == w for (s, v), (t, w) in zip(a, b, strict=True))


def _like(vs: Tensors, others: Tensors) -> list[Tensor]:
    return [cast(v, t.dtype) for v, t in zip(vs, others, strict=True)]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another dtype; what becomes real loses its imaginary part, which is the adjoint of becoming complex."""
    if x.dtype == dtype:
        return x
    return (x.real if x.is_complex() and not dtype.is_complex else x).to(dtype)
