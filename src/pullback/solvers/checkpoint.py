"""The state of a solver on disk: saved on the way, taken up by the next run, bit for bit."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.solvers.problem import Problem

_MEMBERS = {  # what the bookkeeping of members must remember
    "Single": ("limit", "good", "least"),
    "Batch": ("codes", "counts", "limit", "is_open", "kept", "good", "least"),
}


class Checkpoint:
    """A file with the state of a run.

    Args:
        path: where; a file that exists is continued, and must be of the same problem.
        every: iterations between two writes; it is written at `maxiter` as well.
    """

    def __init__(self, path: str | os.PathLike[str], every: int) -> None:
        self.path, self.every = Path(path), every

    def save(self, problem: Problem, state: Any, members: Any, records: list[dict[str, Any]]) -> None:
        """Write everything that the next iteration depends on, to a temporary name which is then renamed."""
        content = {
            "problem": _fingerprint(problem),
            "state": dict(vars(state)),
            "members": {name: getattr(members, name) for name in _MEMBERS[type(members).__name__]},
            "records": records,
        }
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            torch.save(content, temporary)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, problem: Problem, state: Any, members: Any, records: list[dict[str, Any]]) -> None:
        """Continue from the file, if there is one."""
        if not self.path.exists():
            return
        try:
            content = torch.load(self.path, map_location=problem.y.device, weights_only=True)
            known = content["problem"]
        except Exception as error:
            raise ArgumentError(
                f"{problem.owner}: checkpoint {self.path} is not a state that a solver saved ({error}); delete it"
            ) from None
        if known != _fingerprint(problem):
            raise ArgumentError(
                f"{problem.owner}: checkpoint {self.path} was saved for another problem: expected "
                f"{_fingerprint(problem)}, got {known}; delete it or choose another name"
            )
        for name, value in content["state"].items():
            setattr(state, name, value)
        for name, value in content["members"].items():
            setattr(members, name, value)
        records[:] = content["records"]


def _fingerprint(problem: Problem) -> str:
    """The method, the shapes, the numbers and a digest of the data: enough to refuse another problem."""
    digest = hashlib.sha256()
    modules = [m for m in (problem.A, *problem.parts.values()) if isinstance(m, torch.nn.Module)]
    held = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    for m in modules:  # numbers that are no tensors, such as the 2 in 2 * A; an address says nothing in another process
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(m)).encode())
    for t in (problem.y, problem.x0, *held):
        if t is not None:
            digest.update(t.detach().resolve_conj().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    numbers = [
        f"{name}={value.tolist() if isinstance(value, Tensor) and value.numel() < 64 else value}"
        for name, value in problem.parts.items()
        if isinstance(value, (int, float, str, Tensor))
    ]
    shapes = f"{problem.batch} {problem.A.dims} -> {problem.A.dimsd} {problem.y.dtype}"
    return " ".join([problem.owner, shapes, *numbers, digest.hexdigest()[:16]])
