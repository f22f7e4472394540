"""Invertible layers, and chains of them that need no memory for the gradient."""

from pullback.autodiff.invertible.check import InverseReport as InverseReport
from pullback.autodiff.invertible.check import check_inverse as check_inverse
from pullback.autodiff.invertible.container import Reversible as Reversible
from pullback.autodiff.invertible.coupling import AdditiveCoupling as AdditiveCoupling
from pullback.autodiff.invertible.coupling import AffineCoupling as AffineCoupling
from pullback.autodiff.invertible.layer import Invertible as Invertible
from pullback.autodiff.invertible.mixing import ActNorm as ActNorm
from pullback.autodiff.invertible.mixing import InvertibleConv1x1 as InvertibleConv1x1
from pullback.autodiff.invertible.mixing import Orthogonal as Orthogonal
from pullback.autodiff.invertible.mixing import Permutation as Permutation
from pullback.autodiff.invertible.mixing import Squeeze as Squeeze
from pullback.autodiff.invertible.transform import FourierLayer as FourierLayer
from pullback.autodiff.invertible.transform import OperatorLayer as OperatorLayer
