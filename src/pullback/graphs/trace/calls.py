"""How one call of a torch function is written on a node: its label, its numbers, its tensors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_REVERSED = {
    f"r{name}": name
    for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
}
_IN_PLACE = {f"i{name}": f"{name}_" for name in _REVERSED.values()}
NUMBERS = {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__"}
SILENT = {"requires_grad_", "retain_grad", "register_hook", "__iter__"}  # no values pass through these
# What has the shape of its argument and none of its values.
_FRESH = re.compile(r"(zeros|ones|empty|full|rand|randn|randint)_like|new_(zeros|ones|empty|full|tensor)")
_names: dict[Any, tuple[str, ...]] = {}


def sets_values(func: Any) -> bool:
    """Whether a setter of an attribute changes the numbers of a tensor."""
    return getattr(func.__self__, "__name__", "") in ("data", "real", "imag")


def label_of(func: Any) -> str:
    """The name of a torch function: "conv2d", "add", "add_", ".data"."""
    name = getattr(func, "__name__", None) or type(func).__name__
    if name in ("__get__", "__set__"):
        return f".{func.__self__.__name__}" + (" =" if name == "__set__" else "")
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return _REVERSED.get(name) or _IN_PLACE.get(name) or name
    return name.split(".")[0] if isinstance(func, torch._ops.OpOverload) else name


def writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call may change the numbers of its arguments."""
    if kwargs.get("out") is not None or kwargs.get("max_norm") is not None:  # the latter of embeddings
        return True
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or name.strip("_") in _IN_PLACE
    return name.endswith("_") and name not in SILENT


def is_fresh(label: str) -> bool:
    """Whether a function of this name takes nothing but shape and dtype from its argument."""
    return _FRESH.fullmatch(label) is not None


def tensors_in(args: Any) -> Iterator[Tensor]:
    """The tensors among arguments, in order; lists, tuples, dicts and slices are opened."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from tensors_in(a)
        elif isinstance(a, dict):
            yield from tensors_in(a.values())
        elif isinstance(a, slice):
            yield from tensors_in((a.start, a.stop, a.step))


def details_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are not tensors, by name."""
    found: dict[str, Any] = {}
    names: tuple[str, ...] | None = None
    for i, a in enumerate(args):
        if not isinstance(a, Tensor) and a is not None and _is_plain(a):
            names = _argument_names(func) if names is None else names
            found[names[i] if i < len(names) else f"argument {i}"] = a
    for key, a in kwargs.items():
        if a is not None and _is_plain(a):
            found[key] = a
    return found


def _is_plain(a: Any) -> bool:
    if isinstance(a, (list, tuple)):
        return len(a) <= 16 and all(_is_plain(b) for b in a)
    if isinstance(a, slice):
        return _is_plain((a.start, a.stop, a.step))
    kinds = (bool, int, float, complex, str, type(...), torch.dtype, torch.device, torch.memory_format)
    return a is None or isinstance(a, kinds)


def _argument_names(func: Any) -> tuple[str, ...]:
    """Positional arguments by name, of built-in functions from the first line of their documentation."""
    if func in _names:
        return _names[func]
    try:
        parameters = inspect.signature(func).parameters.values()
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    except (TypeError, ValueError):
        text = re.match(r"\s*\w+\(([^)]*)\)", getattr(func, "__doc__", None) or "")
        declared = re.split(r",?\s*\*", text[1])[0] if text else ""  # "*size" takes the rest, "*" ends the positions
        names = re.findall(r"(?:^|,)\s*(\w+)", declared)
        if inspect.ismethoddescriptor(func):
            names.insert(0, "self")
    _names[func] = tuple(names)
    return _names[func]
