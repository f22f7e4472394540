"""Operators, their algebra, the autograd bridge and the conformance kit."""

from pullback.core import algebra as algebra
