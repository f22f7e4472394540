"""pullback: differentiable operators for inverse problems, on PyTorch."""

from pullback.core.operator import LinearOperator as LinearOperator
from pullback.core.operator import Operator as Operator
from pullback.core import algebra as _algebra
