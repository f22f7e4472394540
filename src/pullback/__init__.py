"""pullback: differentiable operators for inverse problems, on PyTorch."""

from pullback.core import algebra as _algebra  # noqa: F401  fills the table of what operators do with each other
from pullback.core.check import CheckError as CheckError
from pullback.core.check import CheckReport as CheckReport
from pullback.core.check import check as check
from pullback.core.check import dottest as dottest
from pullback.core.errors import ArgumentError as ArgumentError
from pullback.core.errors import DeviceError as DeviceError
from pullback.core.errors import DtypeError as DtypeError
from pullback.core.errors import FileFormatError as FileFormatError
from pullback.core.errors import NotDifferentiableError as NotDifferentiableError
from pullback.core.errors import PullbackError as PullbackError
from pullback.core.errors import ShapeError as ShapeError
from pullback.core.operator import LinearOperator as LinearOperator
from pullback.core.operator import Operator as Operator
from pullback.linops import *  # noqa: F403
