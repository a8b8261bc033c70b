import concurrent.futures
import os
import signal
import threading
import time

import pytest

from jarm.core import interrupts
from jarm.core.interrupts import STOP, ahead, leavable, stoppable, wait_some, was_left

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Patience of a tenth of a second; threads that are left in a test are let go at its end."""
    monkeypatch.setattr(interrupts, "GRACE", 0.1)
    monkeypatch.setattr(interrupts, "LOOK", 0.02)
    monkeypatch.setattr(interrupts, "_left", threading.Event())
    yield
    STOP.clear()


@pytest.fixture
def compilation():
    """Something that holds its thread, as a compilation does."""
    end = threading.Event()
    yield lambda: end.wait(20)
    end.set()


def signal_soon(number, after=0.1):
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


def test_a_command_gives_its_result_or_its_error():
    assert leavable(lambda: 3) == 3
    with pytest.raises(KeyError, match="why"):
        leavable(lambda: {}["why"])
    assert leavable(lambda: leavable(threading.current_thread)) is not threading.main_thread()
    assert not was_left()


@SIGNALS
def test_a_command_that_compiles_is_left(number, compilation):
    before = signal.getsignal(number)
    signal_soon(number)
    with pytest.raises(KeyboardInterrupt):
        leavable(compilation)
    assert "jarm" in [thread.name for thread in threading.enumerate()]  # at work still
    assert was_left()
    assert signal.getsignal(number) is before


def test_a_second_signal_does_not_wait(compilation, monkeypatch, capsys):
    monkeypatch.setattr(interrupts, "GRACE", 30)
    signal_soon(signal.SIGINT)
    signal_soon(signal.SIGTERM, 0.3)
    with pytest.raises(KeyboardInterrupt):
        leavable(compilation)
    assert "jarm" in [thread.name for thread in threading.enumerate()]  # at work still
    assert "again to stop at once" in capsys.readouterr().err


@SIGNALS
def test_what_came_before_a_compilation_is_put_away(number, compilation):
    """The loop over `ahead` has time for that, however long; nothing of it is cut off."""
    kept = []

    def items():
        yield from range(3)
        compilation()
        yield 3

    def command():
        try:
            for item in ahead(items()):
                kept.append(item)
        except KeyboardInterrupt:
            time.sleep(0.1)
            kept.append("put away")
            raise

    signal_soon(number, 0.2)
    with pytest.raises(KeyboardInterrupt):
        leavable(command)
    assert kept == [0, 1, 2, "put away"]
    assert was_left()


def test_items_that_come_in_time_are_taken_after_a_signal():
    def items():
        for number in range(100):
            if STOP.is_set():
                return
            yield number
            time.sleep(0.02)

    def command():
        return list(ahead(items()))

    signal_soon(signal.SIGINT, 0.3)
    taken = leavable(command)
    assert 0 < len(taken) < 100
    assert taken == list(range(len(taken)))
    assert not was_left()


def test_errors_and_ends_of_items_arrive():
    def breaks():
        yield 1
        raise ValueError("here")

    items = ahead(breaks())
    assert next(items) == 1
    with pytest.raises(ValueError, match="here"):
        next(items)
    many = ahead(iter(range(100)), 3)
    assert next(many) == 0
    many.close()
    assert not was_left()


def test_futures_under_way_are_waited_for_and_others_are_cancelled(compilation):
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        quick, never = executor.submit(time.sleep, 0.05), executor.submit(compilation)
        with stoppable():
            os.kill(os.getpid(), signal.SIGINT)
            done = wait_some({quick, never})
            assert never in done
            assert never.cancelled()
            assert wait_some({quick}) == {quick}
    assert not was_left()
