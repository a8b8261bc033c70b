"""Marks of parameters."""

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
"""A parameter whose test runs with the longer ones."""
nightly = functools.partial(pytest.param, marks=[pytest.mark.slow, pytest.mark.nightly])
"""A parameter whose test runs with the longest ones."""


def sampled(values, *often):
    """All values; those that are not among `often` run with the longest tests."""
    values = list(values)
    assert all(value in values for value in often), f"{often} are not all of {values}"
    return [
        value if value in often else nightly(*value) if isinstance(value, tuple) else nightly(value) for value in values
    ]
