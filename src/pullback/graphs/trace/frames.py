"""Where a torch function was called from, read from the stack: the user's line, and what the call is a part of."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

_TORCH = str(Path(torch.__file__).parent) + "/"
_TRANSFORMS = str(Path(torch.func.vmap.__code__.co_filename).parent) + "/"
_OURS = str(Path(__file__).parents[2]) + "/"
_VIEWER = str(Path(__file__).parents[1]) + "/"
_PYTHON = sysconfig.get_path("stdlib") + "/"
_SITE = sysconfig.get_path("purelib") + "/"
_APPLY: CodeType = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_CALL: CodeType = torch.nn.Module._call_impl.__code__
_INNER = next(c for c in _CALL.co_consts if isinstance(c, CodeType) and c.co_name == "inner")  # its path with hooks
_kinds: dict[str, str] = {}


class Place(NamedTuple):
    """What surrounds a call.

    Attributes:
        source: the user's line, "model.py:12 in forward".
        region: frame of a call that is drawn as one node: a custom Function, or a function of this library.
        custom: whether that is a custom Function.
        transform: frame of the outermost torch.func transform in the module around the call.
    """

    source: str
    region: FrameType | None
    custom: bool
    transform: FrameType | None


def _kind(filename: str) -> str:
    found = _kinds.get(filename)
    if found is None:
        if filename.startswith(_TRANSFORMS):
            found = "transform"
        elif filename.startswith(_TORCH) or filename.startswith("<"):
            found = "torch"
        elif filename.startswith(_OURS):
            found = "viewer" if filename.startswith(_VIEWER) else "ours"
        else:
            found = "python" if filename.startswith(_PYTHON) and not filename.startswith(_SITE) else "user"
        _kinds[filename] = found
    return found


def look(frame: FrameType | None, base: CodeType) -> Place:
    """Walk from `frame` outwards to the frame that runs `base`.

    Functions of this library count only inside the innermost module: a network of this library is drawn by its layers.
    """
    source, inside = "", True
    region: FrameType | None = None
    custom = False
    transform: FrameType | None = None
    ours: list[FrameType] = []
    previous = frame
    while frame is not None and frame.f_code is not base:
        code = frame.f_code
        kind = _kind(code.co_filename)
        if kind == "user":
            if not source:
                source = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        elif kind == "ours":
            if inside:
                ours.append(frame)
                source = ""  # where the user called the library
        elif kind == "transform":
            if inside:
                transform = frame
        elif code is _APPLY:
            region, custom, source = frame, True, ""
            ours.clear()
        elif inside and (code is _INNER or code is _CALL):
            if ours and ours[-1] is previous:
                ours.pop()
            inside = False
        previous, frame = frame, frame.f_back
    if ours:
        region, custom = ours[-1], False
    return Place(source, region, custom, transform)


def caller(frame: FrameType | None) -> FrameType | None:
    """The frame that called the module whose hook runs in `frame`."""
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    while frame is not None and _kind(frame.f_code.co_filename) == "torch":
        frame = frame.f_back
    return frame


def region_label(frame: FrameType, custom: bool) -> tuple[str, str]:
    """(label, id of the Function's class or "") of a region: "Foo", "cgls", "Genred"."""
    if custom:
        name = frame.f_locals["cls"].__name__
        return name, name
    name = frame.f_code.co_name
    if "self" not in frame.f_locals:
        return name, ""
    owner = type(frame.f_locals["self"]).__name__.strip("_")
    return (owner if name.startswith("__") or name == "forward" else f"{owner}.{name}"), ""


def region_arguments(frame: FrameType, custom: bool) -> Any:
    """What a region was called with, as far as the stack tells it."""
    return frame.f_locals.get("args", ()) if custom else ()


def transform_label(frame: FrameType) -> str:
    """The name of a torch.func transform: "vmap", "grad", "vjp"."""
    return frame.f_code.co_qualname.split(".")[0].strip("_").removesuffix("_impl")
