"""Options of comparisons have a text each, which is their help on the command line."""

import dataclasses
import re

import pytest

from jarm.loop.config import LoopConfig
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
