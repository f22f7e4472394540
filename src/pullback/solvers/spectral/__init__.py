"""What the singular values of an operator say, and the solutions that they give."""

from pullback.solvers.spectral.choice import Choice as Choice
from pullback.solvers.spectral.choice import choose as choose
from pullback.solvers.spectral.choice import discrepancy as discrepancy
from pullback.solvers.spectral.choice import gcv as gcv
from pullback.solvers.spectral.choice import lcurve as lcurve
from pullback.solvers.spectral.choice import sure as sure
from pullback.solvers.spectral.decompose import SVD as SVD
from pullback.solvers.spectral.decompose import svd as svd
from pullback.solvers.spectral.filters import BiasVariance as BiasVariance
from pullback.solvers.spectral.filters import bias_variance as bias_variance
from pullback.solvers.spectral.filters import filter_factors as filter_factors
from pullback.solvers.spectral.filters import spectral_filter as spectral_filter
from pullback.solvers.spectral.inverse import pinv as pinv
from pullback.solvers.spectral.lowrank import LowRank as LowRank
from pullback.solvers.spectral.numbers import PowerResult as PowerResult
from pullback.solvers.spectral.numbers import cond as cond
from pullback.solvers.spectral.numbers import noise_amplification as noise_amplification
from pullback.solvers.spectral.numbers import power_iteration as power_iteration
from pullback.solvers.spectral.numbers import rank as rank
from pullback.solvers.spectral.picard import PicardPlot as PicardPlot
from pullback.solvers.spectral.picard import picard as picard
from pullback.solvers.spectral.regularize import tikhonov as tikhonov
from pullback.solvers.spectral.regularize import tsvd as tsvd
