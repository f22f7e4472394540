"""Solvers: the inverse of an operator, one algorithm a file."""

from pullback.solvers.cg import cg as cg
from pullback.solvers.cgls import cgls as cgls
from pullback.solvers.landweber import landweber as landweber
from pullback.solvers.lsqr import lsqr as lsqr
from pullback.solvers.pdhg import pdhg as pdhg
from pullback.solvers.proximal import fista as fista
from pullback.solvers.proximal import ista as ista
from pullback.solvers.solve import solve as solve
from pullback.solvers.status import ConvergenceError as ConvergenceError
from pullback.solvers.status import Solution as Solution
from pullback.solvers.status import Status as Status
