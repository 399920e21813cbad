"""Two machines that train together, as network namespaces; `python tests/faults/nodes.py CASE FOLDER`, as root.

Each case is a function that raises if a run does not end as it should. The machines are real torchrun processes that
reach each other over a virtual cable and share the file system. All of it ends with the script, see `isolate`.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from disk import isolate  # noqa: E402
from kill import SLOW, check_equal, prepare  # noqa: E402
from signals import alone  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / 'train_vpl.py'
ADDRESSES = ['10.99.0.1', '10.99.0.2']
STATIC = ['--master-addr', ADDRESSES[0], '--master-port', '29400']
C10D = ['--rdzv-backend', 'c10d', '--rdzv-endpoint', f'{ADDRESSES[0]}:29400', '--rdzv-id', 'faults']
LIMIT = 150 * SLOW  # seconds for a run
LOST = 'another process ended or cannot be reached'


def ip(*words) -> str:
    """Run the command `ip`."""
    return subprocess.run(['ip', *map(str, words)], check=True, stdout=subprocess.PIPE, text=True).stdout


class Nodes:
    """Two machines, the run that they do together, and its log on each.

    Args:
        scenario: What they train.
        rendezvous: Options of torchrun.
    """

    def __init__(self, scenario, rendezvous=STATIC):
        self.scenario = scenario
        self.rendezvous = rendezvous
        self.torchrun: list[subprocess.Popen | None] = [None, None]
        self.logs = [scenario.folder / f'node{i}.log' for i in range(2)]

    def start(self, node: int, *options, data: Path | None = None, **environ) -> None:
        """Start torchrun on a machine."""
        argv = [*self.scenario.argv('run'), *options]
        argv[0] = str(data or argv[0])
        rendezvous = [*self.rendezvous, '--local-addr', ADDRESSES[node]]
        if self.rendezvous is not STATIC:
            rendezvous += ['--rdzv-conf', f'is_host={int(node == 0)}']
        with open(self.logs[node], 'a') as log:
            self.torchrun[node] = subprocess.Popen(
                ['ip', 'netns', 'exec', f'node{node}', sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2',
                 '--nproc-per-node', '1', '--node-rank', str(node), *rendezvous, str(SCRIPT), *argv],
                stdout=log, stderr=log,
                env={**os.environ, 'PYTHONPATH': str(SCRIPT.parent), 'GLOO_SOCKET_IFNAME': 'cable', **environ})

    def start_both(self, *options, **environ) -> None:
        """Start torchrun on both machines."""
        for node in range(2):
            self.start(node, *options, **environ)

    def check(self, condition, what: str) -> None:
        """End this script with the logs, unless the condition holds."""
        if not condition:
            tails = '\n'.join(f'--- {log.name}\n{log.read_text()[-4000:]}' for log in self.logs if log.exists())
            raise SystemExit(f'{sys.argv[1]} failed: {what}\n{tails}')

    def until(self, pattern: str) -> None:
        """Wait until the log of the first machine has this pattern."""
        deadline = time.monotonic() + LIMIT
        while not (self.logs[0].exists() and re.search(pattern, self.text(0))):
            self.check(time.monotonic() < deadline, f'no {pattern} within {LIMIT} s')
            self.check(None in [process and process.poll() for process in self.torchrun], f'ended before {pattern}')
            time.sleep(0.005)

    def wait(self, node: int, seconds: float = LIMIT) -> int:
        """Return how torchrun ended on a machine."""
        try:
            return self.torchrun[node].wait(seconds)
        except subprocess.TimeoutExpired:
            self.check(False, f'node {node} is still there after {seconds} s')

    def pids(self, node: int) -> list[int]:
        """Return the ids of all processes of a machine."""
        return list(map(int, ip('netns', 'pids', f'node{node}').split()))

    def worker(self, node: int) -> int:
        """Return the id of the training process of a machine."""
        agent = self.torchrun[node].pid
        return int(Path(f'/proc/{agent}/task/{agent}/children').read_text().split()[-1])

    def text(self, node: int) -> str:
        """Return what a machine has logged."""
        return self.logs[node].read_text()

    def finish(self) -> None:
        """Start both machines and check that the run ends as the one on a single machine."""
        self.start_both()
        self.check([self.wait(0), self.wait(1)] == [0, 0], 'the run should end well')
        check_equal(self.scenario.folder / 'alone', self.scenario.folder / 'run')


def connect() -> None:
    """Make two machines and the cable between them."""
    Path('/run/netns').mkdir(parents=True, exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', '/run/netns'], check=True)  # in the mount namespace of this script
    for node in range(2):
        ip('netns', 'add', f'node{node}')
    ip('link', 'add', 'cable', 'netns', 'node0', 'type', 'veth', 'peer', 'name', 'cable', 'netns', 'node1')
    for node, address in enumerate(ADDRESSES):
        ip('-n', f'node{node}', 'addr', 'add', f'{address}/24', 'dev', 'cable')
        for device in ('lo', 'cable'):
            ip('-n', f'node{node}', 'link', 'set', device, 'up')


def late(folder):
    """The second machine comes 10 s late; both ways of finding each other."""
    nodes = Nodes(alone(folder, 'vpl', 2))
    for name, nodes.rendezvous in (('static', STATIC), ('c10d', C10D)):
        nodes.start(0)
        time.sleep(10)
        nodes.start(1)
        nodes.check([nodes.wait(0), nodes.wait(1)] == [0, 0], f'{name}: the run should end well')
        check_equal(folder / 'alone', folder / 'run')
        shutil.rmtree(folder / 'run')


def killed(folder):
    """One machine dies: the other says so and ends; started again, the run goes on exactly."""
    nodes = Nodes(alone(folder, 'vpl', 2))
    nodes.start_both()
    nodes.until(r'Train: 1 \[ *2/')
    for pid in nodes.pids(1):
        os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    nodes.check(nodes.wait(0, 30 * SLOW) == 1, 'the other machine should fail')
    print(f'the other ended after {time.monotonic() - begin:.1f} s')
    nodes.wait(1)
    nodes.check(f'error: {LOST}' in nodes.text(0), 'no line')
    nodes.finish()
    nodes.check(re.search(r'continues with epoch 1, batch [2-4] of 6', nodes.text(0)), 'it did not go on')


def cut_off(folder):
    """The cable is pulled, which nobody notices but the watchdog; started again, the run goes on exactly."""
    nodes = Nodes(alone(folder, 'vpl', 2))
    nodes.start_both('--hang-timeout', '8')
    nodes.until(r'Train: 1 \[ *2/')
    ip('-n', 'node1', 'link', 'set', 'cable', 'down')
    begin = time.monotonic()
    for node in range(2):
        nodes.check(nodes.wait(node, 30 * SLOW) != 0, 'both machines should fail')
        print(f'node {node} ended after {time.monotonic() - begin:.1f} s')
        nodes.check('Timeout (0:00:08)!' in nodes.text(node) and 'train_one_epoch' in nodes.text(node), 'no stacks')
    ip('-n', 'node1', 'link', 'set', 'cable', 'up')
    nodes.finish()
    nodes.check('continues with epoch 1, batch' in nodes.text(0), 'it did not go on')


def uneven(folder):
    """The machines see different data: the run is refused before it begins."""
    nodes = Nodes(alone(folder, 'vpl', 2))
    fewer = folder / 'fewer'
    shutil.copytree(folder / 'data', fewer)
    next((fewer / 'train' / '0').iterdir()).unlink()
    nodes.start(0)
    nodes.start(1, data=fewer)
    nodes.check(0 not in [nodes.wait(0, 60 * SLOW), nodes.wait(1, 60 * SLOW)], 'both should fail')
    for node in range(2):
        lines = re.findall('error: data: processes 0 and 1 do not see the same', nodes.text(node))
        nodes.check(len(lines) == 1 and 'Train: ' not in nodes.text(node), 'no line, or it began')
    nodes.check(not (folder / 'run').exists(), 'it began')


def mistaken(folder):
    """One machine has an option that can't be: both say so and end, though the other waits to begin."""
    nodes = Nodes(prepare('vpl', 2, folder))
    for nodes.rendezvous in (STATIC, C10D):
        for wrong in range(2):
            for node in range(2):
                nodes.logs[node].unlink(missing_ok=True)
                nodes.start(node, *(['--lr', 'x'] if node == wrong else []))
            nodes.check(0 not in [nodes.wait(0), nodes.wait(1)], 'both should fail')
            for node in range(2):
                line = rf"error: --lr: 'x' is not a number > 0 \(process {wrong} on "
                nodes.check(len(re.findall(line, nodes.text(node))) == 1, f'no line on machine {node}')


def stopped(folder):
    """One torchrun gets SIGTERM: the run stops on both machines at one place, saved, and goes on exactly."""
    nodes = Nodes(alone(folder, 'vpl', 2))
    nodes.start_both()
    nodes.until(r'Train: 1 \[ *2/')
    begin = time.monotonic()
    nodes.torchrun[1].send_signal(signal.SIGTERM)
    nodes.check(0 not in [nodes.wait(0, 30 * SLOW), nodes.wait(1, 30 * SLOW)], 'both should say that they did not end')
    print(f'both ended after {time.monotonic() - begin:.1f} s')
    nodes.check(re.search(r'stopped by SIGTERM after epoch 1, batch [3-6] of 6', nodes.text(0)), 'no line')
    nodes.check(LOST not in nodes.text(0) + nodes.text(1), 'one did not wait for the other')
    place = re.search(r'after epoch 1, batch (\d+)', nodes.text(0))[1]
    nodes.finish()
    nodes.check(f'continues with epoch 1, batch {place} of 6' in nodes.text(0), 'it did not go on there')


def restarted(folder):
    """Under --max-restarts the run of a worker that is killed goes on by itself, exactly."""
    scenario = alone(folder, 'vpl', 2)
    scenario.options = ['--resume', '']  # not auto
    nodes = Nodes(scenario, [*C10D, '--max-restarts', '1'])
    nodes.start_both(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')
    nodes.until(r'Train: 1 \[ *2/')
    begin = time.monotonic()
    # The first machine is in the midst of something: torchrun starts it again before it notices.
    worker = nodes.worker(0)
    os.kill(worker, signal.SIGSTOP)
    os.kill(nodes.worker(1), signal.SIGKILL)
    time.sleep(2)
    os.kill(worker, signal.SIGCONT)
    nodes.check([nodes.wait(0), nodes.wait(1)] == [0, 0], 'the run should end well')
    print(f'ended {time.monotonic() - begin:.1f} s after the kill')
    nodes.check('continues with epoch 1, batch' in nodes.text(0) + nodes.text(1), 'it did not go on')
    check_equal(folder / 'alone', folder / 'run')


if __name__ == '__main__':
    isolate()
    connect()
    import timm_vpl.engine.train  # noqa: F401  for the run on a single machine
    globals()[sys.argv[1]](Path(sys.argv[2]))
