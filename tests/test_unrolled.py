"""Unrolled: the solver itself before training, gradients of everything that is learned, errors."""

import copy

import pytest
import torch

from pullback.core.errors import ArgumentError
from pullback.functionals import L1, TV
from pullback.linops import MatrixMult
from pullback.solvers import admm, condat_vu, davis_yin, douglas_rachford, fista, hqs, ista, landweber, pdhg
from pullback.solvers.unrolled import LearnedProx, Unrolled

D = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class Shrink(torch.nn.Module):
    """Soft threshold with a learned width."""

    def __init__(self):
        super().__init__()
        self.width = torch.nn.Parameter(torch.tensor(0.05, dtype=D))

    def forward(self, x):
        return x.sign() * (x.abs() - self.width).clamp(min=0)


SOLVERS = {
    "ista": (ista, ["step", "weight"], {"g": 0.1 * L1()}),
    "fista": (fista, ["step", "weight"], {"g": 0.1 * L1()}),
    "landweber": (landweber, ["step"], {}),
    "pdhg": (pdhg, ["weight"], {"regularizer": 0.1 * TV(6)}),
    "admm": (admm, ["penalty", "weight"], {"regularizer": 0.1 * TV(6), "penalty": 1.0}),
    "condat_vu": (condat_vu, ["balance", "weight"], {"regularizer": 0.1 * TV(6)}),
    "douglas_rachford": (douglas_rachford, ["step", "weight"], {"regularizer": 0.1 * L1(), "step": 0.5}),
    "davis_yin": (davis_yin, ["step", "weight"], {"regularizer": 0.1 * L1()}),
    "hqs": (hqs, ["beta", "weight"], {"regularizer": 0.1 * L1()}),
}


@pytest.mark.parametrize("name", list(SOLVERS))
def test_untrained_is_the_solver(name):
    solver, learn, arguments = SOLVERS[name]
    A, y = MatrixMult(randn(8, 6)), randn(3, 8, seed=1)
    net = Unrolled(solver, 4, learn, **arguments)
    expected = solver(A, y, maxiter=4, rtol=0.0, **arguments)
    torch.testing.assert_close(net(A, y).detach(), expected.x)
    assert net.solve(A, y).iterations == 4
    torch.testing.assert_close(net(A, y, expected.x), solver(A, y, x0=expected.x, maxiter=4, rtol=0.0, **arguments).x)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_gradients_of_what_is_learned(name):
    solver, learn, arguments = SOLVERS[name]
    matrix, y = randn(8, 6), randn(2, 8, seed=1)
    net = Unrolled(solver, 3, learn, **arguments).double()
    thetas = list(net.theta.values())

    def run(y, matrix, *values):
        table = {f"theta.{k}": v for k, v in zip(learn, values, strict=True)}
        return torch.func.functional_call(net, table, (MatrixMult(matrix), y))

    assert torch.autograd.gradcheck(lambda y, *v: run(y, matrix, *v), (y.requires_grad_(), *thetas))
    if name in ("ista", "fista", "landweber"):  # the steps of the others depend on |A| and count as constants
        net.arguments["step"] = 0.01
        assert torch.autograd.gradcheck(lambda m, *v: run(y.detach(), m, *v), (matrix.requires_grad_(), *thetas))


def test_each_iteration_has_numbers_of_its_own():
    A, y = MatrixMult(randn(8, 6)), randn(8, seed=1)
    net = Unrolled(landweber, 3, ["step"], step=0.01)
    with torch.no_grad():
        net.theta["step"].copy_(torch.tensor([0.0, 1.0, -1.0]))
    x = torch.zeros(6, dtype=D)
    for theta in (0.0, 1.0, -1.0):
        x = x + 0.01 * torch.tensor(theta).exp().double() * A.H(y - A(x))
    torch.testing.assert_close(net(A, y).detach(), x)


def test_prox_networks():
    A, y = MatrixMult(randn(8, 6)), randn(5, 8, seed=1)
    shared, own = Shrink(), [Shrink() for _ in range(3)]
    for prox in (shared, own):
        net = Unrolled(fista, 3, ["step"], prox=prox)
        net(A, y).square().sum().backward()
        grads = [p.grad for p in net.parameters()]
        assert len(grads) == (2 if prox is shared else 4)
        assert all(g is not None and g.abs().max() > 0 for g in grads)
    torch.testing.assert_close(Unrolled(fista, 3, [], prox=shared)(A, y), Unrolled(fista, 3, [], prox=own)(A, y))
    u = LearnedProx(shared).prox(y, 1.0)
    torch.testing.assert_close(u, L1().prox(y, 0.05))
    assert LearnedProx(shared, 8)(y).tolist() == [0.0] * 5


def test_training_helps_and_states_travel():
    torch.manual_seed(0)
    A = MatrixMult(randn(12, 16))
    x = randn(32, 16, seed=2) * (torch.rand(32, 16, generator=torch.Generator().manual_seed(3)) < 0.1)
    y = A(x)
    net = Unrolled(ista, 5, ["step", "weight"], g=0.1 * L1()).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(A, y) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    other = Unrolled(ista, 5, ["step", "weight"], g=0.1 * L1()).double()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(A, y), net(A, y))
    assert torch.equal(copy.deepcopy(net)(A, y), net(A, y))
    assert "ista, n=5" in repr(net)


def test_bad_input():
    A, y = MatrixMult(randn(8, 6)), randn(8, seed=1)
    with pytest.raises(ArgumentError, match=r"pdhg has no number 'rho' to learn; it has balance, weight"):
        Unrolled(pdhg, 2, ["rho"], regularizer=L1())(A, y)
    with pytest.raises(ArgumentError, match=r"Unrolled: give penalty=\.\.\., the number from which learning starts"):
        Unrolled(admm, 2, ["penalty"], regularizer=L1())(A, y)
    with pytest.raises(ArgumentError, match="n must be an int >= 1; got 0"):
        Unrolled(ista, 0)
    with pytest.raises(ArgumentError, match="learn must be a list of names"):
        Unrolled(ista, 2, "step")
    with pytest.raises(ArgumentError, match="prox must be one module or 3, one an iteration; got 2"):
        Unrolled(ista, 3, prox=[Shrink(), Shrink()])
    with pytest.raises(ArgumentError, match="give either prox or g, not both"):
        Unrolled(ista, 3, prox=Shrink(), g=L1())
    with pytest.raises(ArgumentError, match="solver must be a solver"):
        Unrolled(3, 3)
    with pytest.raises(ArgumentError, match=r"module must return the shape of its input \(6,\)"):
        Unrolled(ista, 3, prox=lambda x: x[:3])(A, y)
