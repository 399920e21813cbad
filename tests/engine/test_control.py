"""Batches that are awaited: told when they do not come, left when the run is to stop."""
import os
import signal
import time

import pytest

from timm_vpl.engine import control
from timm_vpl.engine.control import STOP, Control, Stalled


def reads():
    return ', while worker 3 reads x.png'


def test_batches_pass():
    with Control() as one:
        assert list(one.awaited(iter('abc'))) == ['a', 'b', 'c'] and one.waited >= 0


def test_a_batch_that_does_not_come_is_a_line_once(monkeypatch, caplog):
    monkeypatch.setattr(control, '_STALL', 0.1)

    def late():
        while not caplog.messages:
            time.sleep(0.01)
        time.sleep(1)  # for a second one
        yield 'a'

    with Control() as one:
        assert list(one.awaited(late(), reads)) == ['a']
    (line,) = caplog.messages
    assert line.startswith('No batch for ') and line.endswith(reads())


@pytest.mark.skipif(not hasattr(signal, 'pthread_kill'), reason='no signal to a thread')
def test_a_signal_ends_the_waiting(monkeypatch):
    def never():
        yield 'a'
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    with Control() as one:
        batches = one.awaited(never(), reads)
        assert next(batches) == 'a'
        with pytest.raises(Stalled, match=reads()):
            next(batches)
        assert one.decide_here() == STOP + signal.SIGTERM


def test_what_no_signal_interrupts_is_given_up(monkeypatch):
    monkeypatch.setattr(control, '_LATE', 0.1)
    monkeypatch.setattr(control, '_PATIENCE', 0)
    given_up = []

    def deaf():
        os.kill(os.getpid(), signal.SIGTERM)
        while not given_up:  # as in a system call
            try:
                time.sleep(0.01)
            except Stalled:
                pass
        yield 'a'

    with Control(give_up=lambda *what: given_up.append(what)) as one:
        assert list(one.awaited(deaf(), reads)) == ['a']
    assert given_up[0] == (signal.SIGTERM, reads())
