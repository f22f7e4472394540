"""Fixed points: Picard, Anderson, batches, derivatives in modules and data, resuming, errors."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pullback.core.errors import ArgumentError, NotDifferentiableError, ShapeError
from pullback.solvers import DeepEquilibrium, Status, fixed_point

D = torch.float64
methods = pytest.mark.parametrize("method", ["picard", "anderson"])


def randn(*shape, dtype=D, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def contraction(n, factor, dtype=D):
    matrix = randn(n, n, dtype=dtype)
    return factor * matrix / torch.linalg.matrix_norm(matrix, 2)


def layer(x, W, b):
    return torch.tanh(x @ W.T + b)


class Cell(torch.nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.inner = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(n, n))
        self.outer = torch.nn.Sequential(torch.nn.Linear(m, n), torch.nn.Tanh())
        with torch.no_grad():
            self.inner.parametrizations.weight.original0.fill_(0.3)
        self.double()

    def forward(self, x, u):
        return torch.tanh(self.inner(x) + self.outer(u))


@methods
@pytest.mark.parametrize("dtype", [D, torch.complex128])
def test_linear_fixed_point(method, dtype):
    W, b = contraction(8, 0.8, dtype), randn(2, 8, dtype=dtype, seed=1)
    s = fixed_point(lambda x: x @ W.T + b, torch.zeros(2, 8, dtype=dtype), method=method, rtol=1e-12)
    torch.testing.assert_close(s.x, torch.linalg.solve(torch.eye(8, dtype=dtype) - W, b.T).T)
    assert s.status is Status.CONVERGED
    assert s.history["residual"].shape == (s.iterations + 1,)
    x = np.zeros(1)
    np.testing.assert_allclose(fixed_point(torch.cos, x, method=method, rtol=1e-12).x, 0.7390851332151607)


def test_anderson_is_faster():
    W, b = contraction(20, 0.97).T @ contraction(20, 0.97), randn(20, seed=1)
    counts = {m: fixed_point(lambda x: x @ W.T + b, torch.zeros(20, dtype=D), method=m, rtol=1e-8, maxiter=5000)
              for m in ("picard", "anderson")}  # fmt: skip
    assert all(s.status is Status.CONVERGED for s in counts.values())
    assert 3 * counts["anderson"].iterations < counts["picard"].iterations
    expanding = fixed_point(lambda x: 1 - 3 * x, torch.zeros(3, dtype=D), method="picard")
    assert expanding.status is Status.DIVERGED
    assert torch.isfinite(expanding.x).all()
    assert fixed_point(lambda x: 1 - 3 * x, torch.zeros(3, dtype=D), rtol=1e-10).status.ok
    assert fixed_point(lambda x: 1 - 3 * x, torch.zeros(3, dtype=D), method="picard", relaxation=0.3).status.ok


@methods
def test_batch_is_loop_and_members_stop_by_themselves(method):
    W, b = contraction(5, 0.7), randn(3, 5, seed=1)
    b[0] = 0
    s = fixed_point(layer, torch.zeros(3, 5, dtype=D), parameters=(W, b), dims=5, method=method, rtol=1e-8)
    for i in range(3):
        one = fixed_point(layer, torch.zeros(5, dtype=D), parameters=(W, b[i]), method=method, rtol=1e-8)
        torch.testing.assert_close(s.x[i], one.x, atol=1e-10, rtol=1e-10)
        assert s.member_iterations[i] == one.iterations
    assert s.member_iterations[0] == 0
    tight = fixed_point(layer, torch.zeros(5, dtype=D), parameters=(W, b[1]), method=method, rtol=0.0)
    assert tight.status.ok
    single = fixed_point(layer, torch.zeros(5), parameters=(W.float(), b[1].float()), method=method, rtol=1e-9)
    assert single.status.ok


@methods
def test_resume_is_bit_for_bit(method, tmp_path):
    W, b = contraction(5, 0.9), randn(2, 5, seed=1)
    for dims in (5, None):
        path = tmp_path / f"{dims}.pt"
        k = {"parameters": (W, b), "dims": dims, "method": method, "rtol": 1e-10, "maxiter": 400}
        x0 = torch.zeros(2, 5, dtype=D)
        whole = fixed_point(layer, x0, **k)
        fixed_point(layer, x0, **(k | {"maxiter": 9}), checkpoint=path, checkpoint_every=4)
        resumed = fixed_point(layer, x0, **k, checkpoint=path)
        assert torch.equal(whole.x, resumed.x)
        assert torch.equal(whole.history["residual"], resumed.history["residual"])


# Derivatives -------------------------------------------------------------------------------------------------------


@methods
def test_derivatives(method):
    x0 = torch.zeros(3, dtype=D)
    inputs = (contraction(3, 0.6).requires_grad_(), randn(3, seed=1).requires_grad_())
    for unroll in (False, True):

        def f(W, b, unroll=unroll):
            return fixed_point(layer, x0, parameters=(W, b), method=method, rtol=1e-13, unroll=unroll).x

        assert gradcheck(f, inputs)
        assert gradcheck(f, inputs, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)
        if not unroll:
            assert gradgradcheck(f, inputs)


def test_leaf_and_non_leaf_tensors():
    W, b, x0 = contraction(4, 0.5).requires_grad_(), randn(4, seed=1).requires_grad_(), torch.zeros(4, dtype=D)
    computed = torch.sin(W)  # not a leaf

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("W", computed)

        def forward(self, x, b):
            return layer(x, self.W, b)

    k = {"rtol": 1e-13}
    held = fixed_point(Holder(), x0, parameters=b, **k).x
    named = fixed_point(layer, x0, parameters=(computed, b), **k).x
    unrolled = fixed_point(lambda x: layer(x, computed, b), x0, unroll=True, **k).x
    expected = torch.autograd.grad(unrolled.square().sum(), (W, b), retain_graph=True)
    for x in (held, named):
        found = torch.autograd.grad(x.square().sum(), (W, b), retain_graph=True)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_hidden_tensors_are_refused():
    W, b, x0 = contraction(4, 0.5).requires_grad_(), randn(4, seed=1).requires_grad_(), torch.zeros(4, dtype=D)
    with pytest.raises(NotDifferentiableError, match=r"pass the tensor with parameters=\(...\)"):
        fixed_point(lambda x: layer(x, W, b), x0)
    with pytest.raises(NotDifferentiableError, match="use unroll=True"):
        fixed_point(lambda x, b: layer(x, W, b), x0, parameters=b)
    with torch.no_grad():
        assert fixed_point(lambda x: layer(x, W, b), x0).status.ok
    gru = torch.nn.GRUCell(4, 4).double()  # its parameters are plain attributes of one module
    s = fixed_point(lambda x: gru(b.detach(), x) * 0.5, x0, unroll=True)
    assert torch.autograd.grad(s.x.sum(), gru.weight_hh)[0].abs().max() > 0


def test_deep_equilibrium():
    cell = Cell(4, 3)
    deq = DeepEquilibrium(cell, 4, rtol=1e-12)
    u = randn(5, 3, seed=2).requires_grad_()
    x = deq(u)
    assert x.shape == (5, 4)
    torch.testing.assert_close(x, cell(x, u))
    parameters = [*deq.parameters(), u]
    found = torch.autograd.grad((x**3).sum(), parameters)
    by_hand = torch.zeros(5, 4, dtype=D)
    for _ in range(80):
        by_hand = cell(by_hand, u)
    expected = torch.autograd.grad((by_hand**3).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    inputs = (randn(2, 3, seed=3).requires_grad_(),)
    assert gradcheck(deq, inputs)
    assert gradgradcheck(deq, inputs)
    solution = deq.solve(u)
    solution.x.sum().backward()
    assert solution.adjoint[0].method == "gmres"
    assert cell.outer[0].weight.grad.abs().max() > 0
    assert "rtol=1e-12" in repr(deq)


@pytest.mark.slow
def test_deep_equilibrium_learns():
    torch.manual_seed(0)
    deq = DeepEquilibrium(Cell(4, 3), 4, rtol=1e-6)
    head = torch.nn.Linear(4, 1).double()
    u = randn(64, 3)
    target = (u[:, :1] * u[:, 1:2]).tanh()
    optimizer = torch.optim.Adam([*deq.parameters(), *head.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (head(deq(u)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bad_input():
    x0 = torch.zeros(3, dtype=D)
    with pytest.raises(ArgumentError, match="method must be 'anderson' or 'picard'; got 'newton'"):
        fixed_point(torch.cos, x0, method="newton")
    with pytest.raises(ArgumentError, match="memory must be an int >= 1; got 0"):
        fixed_point(torch.cos, x0, memory=0)
    with pytest.raises(ArgumentError, match="relaxation must be a finite number > 0; got 0"):
        fixed_point(torch.cos, x0, relaxation=0)
    with pytest.raises(ArgumentError, match=r"T must be a function of x or an nn\.Module; got Tensor"):
        fixed_point(x0, x0)
    with pytest.raises(ShapeError, match=r"T\(x\) must have the shape of x, \(3,\); got \(\)"):
        fixed_point(torch.sum, x0)
    with pytest.raises(ArgumentError, match="x0 must be complex; got a real x0"):
        fixed_point(lambda x: x * 1j, x0)
    with pytest.raises(ShapeError, match=r"x0 must have shape \(..., 4\)"):
        fixed_point(torch.cos, x0, dims=4)
    with pytest.raises(ArgumentError, match="parameters must be a sequence of tensors"):
        fixed_point(lambda x, c: c * x, x0, parameters=(0.5,))
    with pytest.raises(ArgumentError, match="unknown argument 'step'"):
        fixed_point(torch.cos, x0, step=1)
    with pytest.raises(ArgumentError, match=r"DeepEquilibrium: module must be an nn\.Module; got"):
        DeepEquilibrium(torch.cos)
