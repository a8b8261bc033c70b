"""Options of comparisons have a text each, which is their help on the command line."""

import dataclasses
import re

import pytest

from jarm.loop.config import LoopConfig
from jarm.reward.config import unread
from jarm.runs.config import CompareConfig, documented_by

pytestmark = pytest.mark.core


def test_every_option_has_help_in_the_order_of_the_fields():
    _, _, attributes = CompareConfig.__doc__.partition("Attributes:\n")
    texts = dict(re.findall(r"^  (\w+): (\S.*)$", attributes, re.M))
    assert list(texts) == [field.name for field in dataclasses.fields(CompareConfig)]
    assert texts["rounds"] == "batches labelled after the initial one."


def test_an_option_without_help_is_refused():
    @dataclasses.dataclass
    class Config:
        """Attributes:
        own: text.
        """

        rounds: int = 1
        unheard_of: int = 2

    with pytest.raises(TypeError, match="Config has no text for unheard_of"):
        documented_by(LoopConfig)(Config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"prior_variance": 2.0}, ""),
        ({"ridge": 2.0, "steps": 7}, "A laplace head does not read `ridge` and `steps`, which changes nothing."),
        ({"prior_weight": 2.0}, "A laplace head does not read `prior_weight`, which changes nothing."),
        ({"head": "linear", "prior_variance": 2.0}, "A linear head does not read `prior_variance`, which changes noth"),
        ({"head": "mlp:4", "steps": 7, "prior_weight": 2.0}, ""),
    ],
)
def test_options_that_the_head_does_not_read_are_named(options, said):
    assert unread(CompareConfig(**options)).startswith(said)
    assert bool(unread(CompareConfig(**options))) == bool(said)
