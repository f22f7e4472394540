"""Which operation of a function has a wrong derivative, or cuts the gradient off.

One run of the function is watched: every torch function by a TorchFunctionMode, every custom `autograd.Function` by
its `apply`, which is replaced for the length of the run. Then the operations are tested one by one, in order, against
differences of their own values.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pullback.autodiff.numeric import numeric_derivative
from pullback.core import nodes
from pullback.core.check import CheckError, dottest
from pullback.core.linearize import forward_mode
from pullback.core.operator import LinearOperator

_TORCH = str(Path(torch.__file__).parent)
_OUR_ROOT = str(Path(__file__).parent)
_TOLERANCE = 1e-5
_LIMIT = 500  # operations that are tested


@dataclass(frozen=True)
class Call:
    """One operation of a run: what to call again, with which arguments, and the line of the program that did."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    line: str


class _Watch(TorchFunctionMode):
    """Record calls, and those that turn a tensor with a gradient into one without."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.cuts: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        live = any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves((args, kwargs)))
        before = _copied((args, kwargs)) if live else None
        out = func(*args, **kwargs)
        if before is not None:
            self.record(_name(func), func, before[0], before[1], out)
        return out

    def record(self, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Keep a call that had a tensor with a gradient among its arguments."""
        made = [t for t in tree_leaves(out) if isinstance(t, (Tensor, float, int)) and not isinstance(t, bool)]
        if name.startswith("__get__") or not made:
            return
        line = _line()
        if any(isinstance(t, Tensor) and t.requires_grad for t in made):
            if not (name.endswith("_") and not name.endswith("__")):
                self.calls.append(Call(name, func, args, kwargs, line))
        elif name not in _HARMLESS:
            reason = name if torch.is_grad_enabled() or name in _CUTTING else f"{name} under torch.no_grad()"
            self.cuts.setdefault(f"{reason} ({line})")


_HARMLESS = {"size", "stride", "numel", "dim", "storage_offset", "data_ptr", "is_floating_point", "is_complex", "gt"}
_HARMLESS |= {"lt", "ge", "le", "eq", "ne", "isnan", "isfinite", "isinf", "__len__", "zeros_like", "ones_like"}
_HARMLESS |= {"empty_like", "new_zeros", "new_ones", "new_empty", "randn_like", "rand_like", "full_like", "new_full"}
_HARMLESS |= {"requires_grad_", "element_size", "ndimension", "__hash__", "__format__", "__repr__", "new_tensor"}
_CUTTING = {"detach", "data", "item", "__float__", "__int__", "tolist", "numpy", "argmax", "argmin", "round", "floor"}


@contextlib.contextmanager
def watched() -> Iterator[_Watch]:
    """Watch the calls of this thread. Not for two threads at once: `autograd.Function.apply` is replaced meanwhile."""
    watch = _Watch()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        live = any(isinstance(t, Tensor) and t.requires_grad for t in args)
        before = _copied((args, kwargs)) if live else None
        out = original.__get__(None, cls)(*args, **kwargs)
        if before is not None:
            watch.record(cls.__name__, cls.apply, before[0], before[1], out)
        return out

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        with watch:
            yield watch
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


def first_wrong(calls: list[Call], forward: bool) -> str:
    """The first operation whose derivative differs from differences of its values, in words; "" if there is none.

    `forward`: test forward derivatives, else reverse ones.
    """
    for call in calls[:_LIMIT]:
        with contextlib.suppress(Exception):  # what cannot be called again by itself cannot be judged
            gap = _local_gap(call, forward)
            if gap:
                return f"{call.name} at {call.line}: {gap}"
    return ""


def _local_gap(call: Call, forward: bool) -> str:
    leaves, spec = tree_flatten((call.args, call.kwargs))
    places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(0)

    def run(*tensors: Tensor) -> Tensor:
        filled = list(leaves)
        for i, t in zip(places, tensors, strict=True):
            filled[i] = t.clone() if t.is_leaf else t * 1  # an operation may write into its argument
        args, kwargs = tree_unflatten(filled, spec)
        out = [t for t in tree_leaves(call.function(*args, **kwargs)) if isinstance(t, Tensor)]
        out = [t for t in out if t.is_floating_point() or t.is_complex()]
        parts = [torch.view_as_real(t).reshape(-1) if t.is_complex() else t.reshape(-1) for t in out]
        return torch.cat(parts)

    points = [leaves[i].detach() for i in places]
    single = any(p.dtype not in (torch.float64, torch.complex128) for p in points)
    rounding, tolerance = (1.2e-7, 1e-3) if single else (2.3e-16, _TOLERANCE)
    if not torch.equal(run(*points), run(*points)):
        return ""
    for k, point in enumerate(points):

        def of_one(t: Tensor, k: int = k, dtype: torch.dtype = point.dtype) -> Tensor:
            return run(*(t.to(dtype) if j == k else p for j, p in enumerate(points))).double()

        d = torch.randn(point.shape, dtype=point.dtype, generator=generator)
        numeric = numeric_derivative(of_one, point, d, rounding=rounding)
        w = torch.randn(numeric.value.shape, dtype=torch.float64, generator=generator)
        want, bar = float(w @ numeric.value), float(w.abs() @ numeric.error)
        scale = float(torch.linalg.vector_norm(w * numeric.value)) + abs(want)
        if forward:
            with forward_mode(), forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(
                    run(*(forward_ad.make_dual(p, d) if j == k else p for j, p in enumerate(points)))
                ).tangent
                got = 0.0 if tangent is None else float(w @ tangent.double())
        else:
            with torch.enable_grad():
                live = point.clone().requires_grad_()
                y = run(*(live if j == k else p for j, p in enumerate(points)))
                g = torch.autograd.grad(y, live, w.to(y.dtype), allow_unused=True)[0] if y.requires_grad else None
            got = 0.0 if g is None else float(torch.vdot(g.reshape(-1), d.reshape(-1)).real)
        if not abs(got - want) <= tolerance * scale + 10 * bar and not _has_kink(of_one, point, d, tolerance):
            return f"its derivative in argument {k} gives {got:.6g} along a random direction, differences {want:.6g}"
    return ""


def _has_kink(f: Callable[[Tensor], Tensor], x: Tensor, d: Tensor, tolerance: float) -> bool:
    """Whether the derivatives to both sides differ."""
    x, d = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, d))
    h = tolerance * (float(x.abs().max()) or 1.0) / float(d.abs().max())
    with torch.no_grad():
        left, base, right = f(x - h * d), f(x), f(x + h * d)
    return bool(((right - 2 * base + left).abs() > 0.1 * ((right - base).abs() + (base - left).abs())).any())


def wrong_operator(made: list[Tensor]) -> str:
    """The first linear operator of this library in the graph of `made` that fails the dot test, in words; or ""."""
    roots = [nodes.root(t)[0] for t in made if t.requires_grad]
    for node in reversed(nodes.topological(roots)):
        op = nodes.operator(node)
        if isinstance(op, LinearOperator):
            try:
                dottest(op, rtol=_TOLERANCE, n_pairs=1)
            except CheckError as error:
                return f"the operator {nodes.name(node)}: {error}"
    return ""


def _copied(tree: Any) -> Any:
    """Arguments as they are before the call, without their graph but knowing whether they had one."""
    return tree_map(lambda t: t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, tree)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", "__get__"))
    return str(name)


def _line() -> str:
    """File and line of the innermost frame that is neither torch's nor of this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, _OUR_ROOT)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
