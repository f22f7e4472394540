"""Sums at linear cost within a tolerance: analysis of formulas, Fourier series, dual trees, checks."""

from pullback.kernels.fast.plans import clear as clear
from pullback.kernels.fast.run import Info as Info
from pullback.kernels.fast.run import ToleranceWarning as ToleranceWarning
from pullback.kernels.fast.run import watch as watch
