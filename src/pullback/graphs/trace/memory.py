"""The state of the user's modules and of random numbers, kept as it was."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as _same_version

from pullback.graphs.trace.saved import storage_of


class Memory:
    """Training flags, buffers and parameters of modules, put back by `restore`.

    Buffers are copied when a module is first seen, parameters, which may be large, only before something writes to
    them.
    """

    def __init__(self) -> None:
        self._flags: dict[int, tuple[nn.Module, bool]] = {}
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._parameters: dict[int, tuple[Tensor, bool, Tensor | None]] = {}
        self._storages: dict[Any, list[Tensor]] | None = None
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, module: nn.Module, running: bool = False) -> None:
        """Remember one module, without its children.

        If it is `running` already, what it holds may be stand-ins (`torch.func.functional_call`), and which tensors it
        holds is not remembered.
        """
        if id(module) in self._flags:
            return
        self._flags[id(module)] = module, module.training
        if not running:
            self._tables += [(t, dict(t)) for t in (module._buffers, module._parameters)]
        for b in module._buffers.values():
            if b is not None and b.grad_fn is None:
                self._buffers[id(b)] = b, b.detach().clone()
        for p in module._parameters.values():
            if p is not None and p.is_leaf and not nn.parameter.is_lazy(p):
                self._parameters[id(p)] = p, p.requires_grad, p.grad
                self._storages = None

    def writing(self, tensors: Iterable[Tensor]) -> None:
        """Something is about to write to these tensors: parameters on the same memory are copied."""
        if self._storages is None:
            self._storages = {}
            for p, *_ in self._parameters.values():
                self._storages.setdefault(storage_of(p)[0], []).append(p)
        for t in tensors:
            for p in self._storages.get(storage_of(t)[0], ()):
                self._keep_numbers(p)

    def differentiating(self) -> None:
        """A backward pass is about to write to `.grad`."""
        for *_, grad in self._parameters.values():
            if grad is not None:
                self._keep_numbers(grad)

    def _keep_numbers(self, t: Tensor) -> None:
        if id(t) not in self._written:
            self._written[id(t)] = t, t.detach().clone()

    def restore(self) -> None:
        """Write back what has changed.

        Version counters of buffers stay, so graphs made meanwhile can still run backward. Those of parameters do not:
        a graph that needs numbers which are gone raises instead of giving another gradient.
        """
        for module, flag in self._flags.values():
            module.training = flag
        for table, old in self._tables:
            if any(table.get(name, table) is not t for name, t in old.items()) or len(table) != len(old):
                table.clear()
                table.update(old)
        with torch.no_grad():
            for b, numbers in self._buffers.values():
                if b.is_inference():
                    continue
                with _same_version((b,)):
                    b.copy_(numbers)
            for t, numbers in self._written.values():
                t.copy_(numbers)
            for p, needs, grad in self._parameters.values():
                p.requires_grad_(needs)
                if p.grad is not grad:
                    p.grad = grad


@contextmanager
def random_state() -> Iterator[None]:
    """Random numbers drawn inside leave no trace: torch, CUDA if it is in use, NumPy, Python."""
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
