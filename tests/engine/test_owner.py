"""One process trains in a folder: a dead one is followed at once or after a while, a live one never."""
import os
import signal
import threading
from pathlib import Path

import pytest

from timm_vpl.engine import owner
from timm_vpl.engine.owner import FILE, Owner
from timm_vpl.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(owner, 'BEAT', 0.1)
    monkeypatch.setattr(owner, 'STALE', 60)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(owner, 'STALE', 0.5)


def elsewhere(folder: Path, machine: str = 'another') -> str:
    """Write the card of a process of another machine, with the id of one that is dead here; return it."""
    card = f'node7 {2 ** 22 + 1} {machine} 0\n'
    (folder / FILE).write_text(card)
    return card


def test_a_killed_owner_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, 'STALE', 10 ** 6)  # it is not waited for
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        Owner().claim(str(tmp_path))
        os.write(writes, b'x')
        signal.pause()
    os.read(reads, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    one = Owner()
    one.claim(str(tmp_path))
    one.check()
    assert (tmp_path / FILE).read_text().split()[1] == str(os.getpid())
    one.release()
    assert not list(tmp_path.iterdir())


def test_a_live_owner_is_not(tmp_path):
    one, two = Owner(), Owner()
    one.claim(str(tmp_path))
    with pytest.raises(UsageError, match=f'--output {tmp_path}: process {os.getpid()} on .* is training there; end it'):
        two.claim(str(tmp_path))
    one.check()
    one.claim(str(tmp_path))  # its own already
    two.release()
    one.check()
    one.release()
    two.claim(str(tmp_path))
    two.release()


@pytest.mark.parametrize('time', [0, 2 ** 33])
def test_a_dead_owner_elsewhere_is_watched_for_a_while(time, tmp_path, impatient):
    card = elsewhere(tmp_path)
    os.utime(tmp_path / FILE, (time, time))  # whatever the clock says
    one = Owner()
    one.claim(str(tmp_path))
    one.check()
    assert (tmp_path / FILE).read_text() != card
    one.release()


def test_a_live_owner_elsewhere_is_not_followed(tmp_path):
    one, card = Owner(), elsewhere(tmp_path)
    os.utime(tmp_path / FILE, (0, 0))
    threading.Timer(0.3, os.utime, [tmp_path / FILE, (1, 1)]).start()
    with pytest.raises(UsageError, match='process 4194305 on node7 is training there'):
        one.claim(str(tmp_path))
    assert (tmp_path / FILE).read_text() == card


@pytest.mark.parametrize('card', ['', 'x', 'a b c d', 'a 1 b c d'])
def test_a_card_that_says_nothing_is_watched(card, tmp_path, impatient):
    (tmp_path / FILE).write_text(card)
    one = Owner()
    one.claim(str(tmp_path))
    one.check()
    one.release()


def test_of_many_that_follow_one_wins(tmp_path):
    elsewhere(tmp_path, machine=owner._machine())
    owners, won = [Owner() for _ in range(8)], []

    def claim(one):
        try:
            one.claim(str(tmp_path))
            won.append(one)
        except UsageError:
            pass
    threads = [threading.Thread(target=claim, args=[one]) for one in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].check()
    won[0].release()


def test_an_owner_that_was_taken_for_dead_leaves(tmp_path):
    one = Owner()
    one.claim(str(tmp_path))
    elsewhere(tmp_path)
    with pytest.raises(RunError, match='process 4194305 on node7 trains there now'):
        one.check()
    one.release()
    assert (tmp_path / FILE).exists()


def test_a_folder_that_was_removed_is_owned_again(tmp_path):
    one = Owner()
    one.claim(str(tmp_path))
    (tmp_path / FILE).unlink()
    one.check()
    assert (tmp_path / FILE).exists()
    one.release()


def test_where_nothing_can_be_written_nobody_owns(tmp_path):
    one = Owner()
    one.claim(str(tmp_path / 'nowhere'))
    (tmp_path / FILE).mkdir()  # no file can be made there
    one.check()
    one.release()
