import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jarm.core.status import JarmError, Status, check, worst

pytestmark = pytest.mark.core

PAIRS = list(itertools.combinations(Status, 2))


def test_statuses_run_from_harmless_to_worst():
    """Fewer pairs than asked for, a batch of little use, no room, a computation that failed, a rule that is broken."""
    assert [status.name for status in sorted(Status)] == [
        "OK",
        "EXHAUSTED",
        "LIMITED",
        "UNINFORMATIVE",
        "FULL",
        "SINGULAR",
        "DIVERGED",
        "NONFINITE",
        "BROKEN_RULE",
        "BROKEN_SCORES",
        "NO_RULE",
    ]
    assert sorted(Status) == list(Status) == list(range(len(Status)))


def test_the_worse_of_two_statuses_wins():
    better, worse = (jnp.array(each, jnp.int32) for each in zip(*PAIRS, strict=True))
    for one, other in ((better, worse), (worse, better), (worse, worse)):
        found = jax.vmap(worst)(one, other)
        np.testing.assert_array_equal(found, worse)
        assert found.dtype == jnp.int32
    assert worst(jnp.int32(Status.OK), jnp.int32(Status.NONFINITE), jnp.int32(Status.SINGULAR)) == Status.NONFINITE
    assert worst(jnp.int32(0)).dtype == jnp.int32


@pytest.mark.parametrize(("better", "worse"), PAIRS, ids=lambda status: status.name)
def test_check_raises_the_message_of_the_worse_status(better, worse):
    for both in (np.array([better, worse]), np.array([[worse], [better]], np.int32)):
        with pytest.raises(JarmError) as error:
            check(both, "round 3")
        assert str(error.value) == f"round 3: {worse.message}"


def test_check_is_silent_where_all_is_well():
    check(Status.OK)
    check(jnp.zeros((3, 2), jnp.int32), "anywhere")


def test_every_status_has_one_sentence_of_its_own():
    messages = [status.message for status in Status]
    assert len(set(messages)) == len(Status)
    assert all(message.endswith(".") and "\n" not in message for message in messages)


def test_errors_show_control_characters_of_the_input_and_do_not_send_them():
    assert str(JarmError("no column \x1b[2J\u202e\nname: name it")) == r"no column \x1b[2J\u202e\nname: name it"
