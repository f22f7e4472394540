"""`pullback graph`: draw what a module, function or tensor of the user's own code computes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pullback.core.errors import ArgumentError, PullbackError
from pullback.graphs import Collapse, Fold, GraphData, Hide, Prune, graph

KINDS = ("forward", "autograd", "joint", "fx")
_INPUT = re.compile(r"(\d+(?:x\d+)*|scalar)(?::(\w+))?")


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    target: str
    inputs: Sequence[str] = ()
    kind: str = ""
    out: Path | None = None
    theme: str = "basic"
    collapse: str = ""
    fold: Sequence[str] = ()
    prune: Sequence[str] = ()
    hide: Sequence[str] = ()
    gradients: bool = False
    saved: bool = False


def draw(request: Request) -> list[str]:
    """Trace, simplify, save.

    Returns: the lines to print: a summary of the graph and the name of the file.
    Raises: ArgumentError for a mistake in the command line, or an exception in the user's code.
    """
    if request.kind and request.kind not in KINDS:
        raise ArgumentError(f"--kind must be one of {', '.join(KINDS)}; got {request.kind!r}")
    passes = _passes(request)
    name, _, attribute = request.target.rpartition(":")
    if not name or not attribute:
        raise ArgumentError(f"give what to draw as module:name or file.py:name; got {request.target!r}")
    inputs = [_input(text) for text in request.inputs]
    begin = time.perf_counter()
    with _theirs(request.target):
        obj = _resolved(_imported(name), attribute, bool(inputs))
    options: dict[str, Any] = {"gradients": request.gradients, "saved": request.saved}
    if not isinstance(obj, nn.Module) and request.kind in ("autograd", "joint"):
        inputs = [x.requires_grad_() if x.is_floating_point() or x.is_complex() else x for x in inputs]
    with _theirs(request.target):
        try:
            drawn = graph(obj, *inputs, kind=request.kind or None, theme=request.theme, **options)
        except ArgumentError as error:
            if "give example inputs" not in str(error):
                raise
            hint = "--input 1x3x224x224, once for each input"
            raise ArgumentError(f"{request.target} needs example inputs: {hint}") from None
    if not drawn.title:
        drawn.title = attribute
    drawn = drawn.apply(*passes)
    path = drawn.save(request.out or Path(f"{attribute.rpartition('.')[2]}.svg"))
    seconds = time.perf_counter() - begin
    return [*drawn.summary().splitlines(), f"{seconds:.1f} s; wrote {path}"]


def _passes(request: Request) -> list[Callable[[GraphData], GraphData]]:
    """Prune, hide, fold, collapse, in this order."""
    passes: list[Callable[[GraphData], GraphData]] = [Prune(p) for p in request.prune]
    passes += [Hide(p) for p in request.hide]
    for text in request.fold:
        pattern, _, label = text.rpartition("=")
        if not pattern or not label or "]" in label:
            raise ArgumentError(f"--fold must be PATTERN=LABEL, such as 'Conv > Relu=ConvRelu'; got {text!r}")
        passes.append(Fold(pattern, label))
    if request.collapse:
        passes.append(Collapse(int(request.collapse) if request.collapse.isdecimal() else request.collapse))
    return passes


def _input(text: str) -> Tensor:
    """An example input: "1x3x224x224", "8x16:int64", "scalar:float64"; random normal numbers, or zeros of integers."""
    found = _INPUT.fullmatch(text)
    dtype = getattr(torch, found.group(2) or "float32", None) if found else None
    if found is None or not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"--input must be a shape such as 1x3x224x224 or 8x16:int64; got {text!r}")
    shape = () if found.group(1) == "scalar" else tuple(int(n) for n in found.group(1).split("x"))
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _imported(name: str) -> ModuleType:
    """The module of this name, or in this file; the current folder is searched first, as by `python -m`."""
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise ArgumentError(f"there is no file {name}")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # classes look their module up by name
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ArgumentError(f"there is no module {name!r} here or installed; for a file write {name}.py:") from None
        raise


def _resolved(module: ModuleType, attribute: str, has_inputs: bool) -> Any:
    """What the name stands for: classes are instantiated, functions without required arguments called."""
    obj: Any = module
    for part in attribute.split("."):
        if not hasattr(obj, part):
            names = [
                n for n, v in vars(module).items() if not n.startswith("_") and (callable(v) or isinstance(v, Tensor))
            ]
            raise ArgumentError(f"{module.__name__} has no {attribute!r}; it has {', '.join(names[:12]) or 'nothing'}")
        obj = getattr(obj, part)
    if isinstance(obj, type):
        needed = ", ".join(_required(obj))
        if needed:
            raise ArgumentError(f"{attribute} needs the arguments {needed}; name a function that makes it instead")
        obj = obj()
    elif callable(obj) and not isinstance(obj, nn.Module) and inspect.isroutine(obj) and not _required(obj):
        made = obj()  # a factory of a module, or a function that computes a tensor from its own data
        obj = made if callable(made) or not has_inputs else obj
    return obj


def _required(obj: Any) -> list[str]:
    try:
        parameters = inspect.signature(obj).parameters.values()
    except (TypeError, ValueError):
        return ["its inputs"]
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


@contextmanager
def _theirs(target: str) -> Iterator[None]:
    """An exception in the user's code becomes one line that tells where it was raised."""
    try:
        yield
    except PullbackError:
        raise
    except Exception as error:
        own = str(Path(__file__).parents[1])
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((own, "<"))]
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise ArgumentError(f"{target} raised {type(error).__name__}{place}: {error}") from error
