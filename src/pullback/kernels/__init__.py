"""Kernel reductions: sum_j F(x_i, y_j), LogSumExp, ArgKMin ... of formulas over pairs, M*N never in memory."""

from pullback.kernels import cluster as cluster
from pullback.kernels.explain import explain as explain
from pullback.kernels.generic import generic_argkmin as generic_argkmin
from pullback.kernels.generic import generic_argmin as generic_argmin
from pullback.kernels.generic import generic_logsumexp as generic_logsumexp
from pullback.kernels.generic import generic_sum as generic_sum
from pullback.kernels.genred import Genred as Genred
from pullback.kernels.lazy import ComplexLazyTensor as ComplexLazyTensor
from pullback.kernels.lazy import LazyTensor as LazyTensor
from pullback.kernels.lazy import Pm as Pm
from pullback.kernels.lazy import Var as Var
from pullback.kernels.lazy import Vi as Vi
from pullback.kernels.lazy import Vj as Vj
from pullback.kernels.operator import KernelOperator as KernelOperator
from pullback.kernels.plan.ranges import Ranges as Ranges
from pullback.kernels.runtime.tuning import tune as tune
from pullback.kernels.solve import KernelSolve as KernelSolve
from pullback.kernels.task import BackendWarning as BackendWarning
