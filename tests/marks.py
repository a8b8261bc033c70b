"""Marks of parameters."""

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
"""A parameter whose test runs with the longer ones."""


def sampled(values, *often):
    """All values; those that are not among `often` run with the longer tests."""
    values = list(values)
    assert all(value in values for value in often), f"{often} are not all of {values}"
    return [value if value in often else slow(*value) if isinstance(value, tuple) else slow(value) for value in values]
