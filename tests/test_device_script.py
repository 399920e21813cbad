"""The script for a machine with a device, tried without one: what it runs, and what it gathers."""
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / 'benchmarks' / 'device.sh'
SMALL = '--steps 1 --repeats 1 --warmup 0 --batch-size 4 --img-size 32 --model-a test_resnet --model-b test_vit'


def device(*argv, **environ):
    environ = {**os.environ, 'DEVICE': 'cpu', 'COMPILER': 'eager', 'PATIENCE': '9', **environ}
    return subprocess.run(
        ['sh', str(SCRIPT), *map(str, argv)], env=environ, capture_output=True, text=True, timeout=5000)


def test_calls_end_within_9_minutes_and_all_within_28():
    calls = re.split(r'^(?:tests|rates|study)\)$', SCRIPT.read_text(), flags=re.MULTILINE)[1:]
    seconds = [sum(map(int, re.findall(r'^    limit \S+ (\d+)', call, re.MULTILINE))) for call in calls]
    assert len(seconds) == 3 and all(0 < each <= 540 for each in seconds) and sum(seconds) <= 28 * 60


def test_usage(tmp_path):
    assert device().returncode == 2 and 'benchmarks/device.sh tests OUT' in device().stdout
    end = device('other', tmp_path)
    assert end.returncode == 2 and 'other: expected pack, tests, rates or study' in end.stderr


@pytest.mark.slow
def test_rates_and_tests_without_a_device(tmp_path):
    assert device('rates', tmp_path, OPTIONS=SMALL).returncode == 0
    device('tests', tmp_path, TESTS='-k host_read')
    gathered = json.loads((tmp_path / 'device.json').read_text())
    assert gathered['ends'] == dict.fromkeys(['bounds', 'solo', 'solo-compiled', 'dml', 'memory', 'tests'], 0)
    assert len(gathered['tests']) == 6 and set(gathered['tests'].values()) == {'PASSED'}
    assert gathered['found']['solo']['questions']['solo']['ratios']['pair / (solo a + solo b)']['median'] > 0
    assert set(gathered['share of bounds, solo-compiled']) >= {'memory ms, H200 SXM', 'each operation ms, H100 SXM'}
