"""Derivatives under the conditions of programs: functions that write, inference mode, threads, warnings, memory."""

import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch

from pullback.autodiff import (
    check_gradient,
    fisher,
    gauss_newton,
    hessian,
    jacobian,
    numeric_derivative,
    propagate,
    sparse_hessian,
    sparse_jacobian,
)
from pullback.core.errors import ArgumentError

D = torch.float64
CONTEXTS = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def point(n=4):
    return torch.linspace(0.3, 1.2, n, dtype=D)


def writes(x):
    return x.mul_(2) ** 2


def waves(x):
    return torch.sin(x) * x.sum()


def total(x):
    return waves(x).sum()


# Functions that write into their argument ----------------------------------------------------------------------------

DERIVATIVES = {
    "jacobian": lambda x: jacobian(writes, x).todense(),
    "tree": lambda x: jacobian(lambda p: writes(p["x"]), {"x": x, "n": 3}).todense(),
    "hessian": lambda x: hessian(lambda x: writes(x).sum(), x).todense(),
    "gauss_newton": lambda x: gauss_newton(writes, lambda y: y.sum() ** 2, x).todense(),
    "propagate": lambda x: propagate(writes, x, 0.1).std,
    "sparse_jacobian": lambda x: sparse_jacobian(writes, x),
    "sparse_hessian": lambda x: sparse_hessian(lambda x: writes(x).sum(), x),
}


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_functions_that_write_into_x_are_refused_and_x_stays(name, live):
    x = point().requires_grad_(live)
    with pytest.raises(ArgumentError, match=r"changes its argument in place.*x = x\.clone\(\)"):
        DERIVATIVES[name](x)
    torch.testing.assert_close(x.detach(), point(), rtol=0, atol=0)


def test_functions_that_write_into_x_inside_transforms():
    points = torch.stack([point(), 2 * point()])
    for derivative, want in (
        (lambda x: jacobian(writes, x).todense(), (8 * points).diag_embed()),
        (lambda x: jacobian(writes, x) @ x, 8 * points**2),
        (lambda x: hessian(lambda x: writes(x).sum(), x).diag(), torch.full_like(points, 8)),
        (lambda x: propagate(writes, x, 1.0).std, 8 * points),
    ):
        given = points.clone()
        torch.testing.assert_close(torch.func.vmap(derivative)(given), want)
        torch.testing.assert_close(given, points, rtol=0, atol=0)


def test_functions_that_write_into_a_copy_are_fine():
    f = lambda x: writes(x.clone())  # noqa: E731
    x, eight = point().requires_grad_(), (8 * point()).diag()
    torch.testing.assert_close(jacobian(f, x).todense(), eight)
    torch.testing.assert_close(sparse_jacobian(f, x).to_dense(), eight)
    torch.testing.assert_close(propagate(f, x, 1.0).std, eight.diagonal())


def test_numeric_derivatives_of_functions_that_write():
    x = point()
    torch.testing.assert_close(numeric_derivative(writes, x).value.diagonal(), 8 * point(), rtol=1e-10, atol=0)
    torch.testing.assert_close(x, point(), rtol=0, atol=0)


# Contexts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("made_inside", [False, True])
def test_numbers_do_not_depend_on_the_context(context, made_inside):
    outside = point()
    want = torch.func.jacrev(waves)(point())
    close = torch.testing.assert_close
    with context():
        x = point() if made_inside else outside
        close(jacobian(waves, x).todense(mode="forward"), want)
        close(jacobian(waves, x) @ point(), want @ point())
        close(hessian(total, x).todense(), torch.func.hessian(total)(point()))
        close(gauss_newton(waves, lambda y: (y**2).sum() / 2, x).todense(), want.T @ want)
        close(fisher(waves, x, likelihood="gaussian").todense(), want.T @ want)
        close(propagate(waves, x, 1.0).cov.todense(), want @ want.T)


# Threads -------------------------------------------------------------------------------------------------------------


def in_threads(work, number=4):
    """What the threads raised, by its text."""
    raised = Counter()
    start = threading.Barrier(number)

    def run(k):
        start.wait()
        try:
            work(k)
        except Exception as error:
            raised[repr(error)] += 1

    threads = [threading.Thread(target=run, args=(k,)) for k in range(number)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return raised


def test_one_operator_in_several_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        x, v = point(20), torch.ones(20, dtype=D)
        want = torch.func.jacrev(waves)(x) @ v
        for _ in range(20):
            J = jacobian(waves, x)
            assert not in_threads(lambda k, J=J: torch.testing.assert_close(J @ v, want))
    finally:
        sys.setswitchinterval(before)


def test_forward_mode_in_several_threads():
    def work(k):
        for _ in range(3):
            check_gradient(lambda x: torch.sin((k + 1) * x), point())
            sparse_jacobian(torch.sin, point(), mode="forward")

    assert not in_threads(work)


@pytest.mark.slow
def test_torch_warnings_about_itself_are_no_failed_derivatives():
    code = (
        "import torch; from pullback.autodiff import check_gradient, sparse_jacobian\n"
        "import warnings; warnings.simplefilter('error')\n"
        "x = torch.ones(3, dtype=torch.float64)\n"
        "assert check_gradient(torch.sin, x).ok; sparse_jacobian(torch.sin, x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda x: jacobian(torch.sin, x), lambda x: hessian(lambda x: x.sin().sum(), x)],
    ids=["jacobian", "hessian"],
)
def test_matrices_that_no_machine_holds_are_refused_at_once(make):
    A = make(torch.ones(5_000_000, dtype=torch.float32))
    with pytest.raises(ArgumentError, match=r"\(5000000, 5000000\) does not fit into memory; products, trace"):
        A.todense()
    assert A.trace(neval=3, method="hutch++").isfinite()


def test_diag_is_diagonal():
    x = point()
    H, J = hessian(total, x), jacobian(waves, x)
    for A in (H, J, gauss_newton(waves, lambda y: (y**2).sum(), x)):
        torch.testing.assert_close(A.diag(), A.todense().diagonal())
        torch.testing.assert_close(A.diag(chunk_size=1), A.diagonal())
        torch.testing.assert_close(A.diag(50, "hutchinson", 3), A.diagonal(50, "hutchinson", 3))


def test_random_functions_cannot_be_sampled():
    dropout = torch.nn.Dropout(0.5)
    with pytest.raises(ArgumentError, match=r"f must be deterministic.*eval\(\)"):
        propagate(dropout, point(), 0.1).check(10)


def test_gauss_newton_says_what_to_write():
    for arguments, got in (((waves, point()), "got Tensor"), ((waves, torch.sum), "got no point")):
        with pytest.raises(ArgumentError, match=rf"write gauss_newton\(f, loss, x\).*{got}"):
            gauss_newton(*arguments)
