"""Marks of parameters."""

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
"""A parameter whose test runs with the longer ones."""
