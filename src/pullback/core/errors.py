"""What can go wrong, by kind. Every message names the argument, what was expected, what came, and the fix."""

from __future__ import annotations


class PullbackError(Exception):
    """Base of every error that this library raises for a mistake in its use."""


class ShapeError(PullbackError, ValueError):
    """A tensor's shape does not fit the operator."""


class DtypeError(PullbackError, TypeError):
    """A tensor's element type is outside the operator's domain."""


class DeviceError(PullbackError, RuntimeError):
    """An operator and its input lie on different devices."""


class ArgumentError(PullbackError, ValueError):
    """An argument has a value that the function does not accept."""


class NotDifferentiableError(PullbackError, RuntimeError):
    """A derivative was asked for that cannot be computed. Raised instead of returning None or zero."""


class FileFormatError(PullbackError, ValueError):
    """A file does not hold what its format promises."""
