"""Functionals: value, prox, conjugate prox and gradient, one family a file."""

from pullback.functionals.base import Functional as Functional
from pullback.functionals.constraints import Box as Box
from pullback.functionals.norms import L1 as L1
from pullback.functionals.norms import L2 as L2
from pullback.functionals.norms import L21 as L21
from pullback.functionals.norms import SquaredL2 as SquaredL2
from pullback.functionals.variation import TV as TV
