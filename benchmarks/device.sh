#!/bin/sh
# What a CUDA device can tell of this project, the most telling first, in calls of at most 9 minutes, 28 in all:
#
#   benchmarks/device.sh pack WHEELS [PIP OPTION...]  here: fetch as wheels what the machine may lack
#   benchmarks/device.sh tests OUT [WHEELS]           there: pytest -m cuda
#   benchmarks/device.sh rates OUT [WHEELS]           there: the pair against a and b alone, DML, memory
#   benchmarks/device.sh study OUT [WHEELS]           there: what 8 minutes give of the study's plan ($PLAN, $DATA)
#
# OUT/device.json gathers what all calls found. Without a device: DEVICE=cpu, with OPTIONS (of the benchmarks), TESTS (of
# pytest) and COMPILER to make it short, and PATIENCE, by which all limits are multiplied.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} device=${DEVICE:-cuda} compiler=${COMPILER:-inductor} call=${1:-} out=${2:-} wheels=${3:-}
[ -n "$call" ] && [ -n "$out" ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
if [ "$call" = pack ]; then
    shift 2
    exec "$python" -m pip download --no-deps --only-binary=:all: -d "$out" "$@" \
        timm huggingface-hub safetensors pyyaml pytest pytest-xdist hypothesis sortedcontainers iniconfig pluggy execnet
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$out/site" "$wheels"/*.whl || exit 1
    export PYTHONPATH="$out/site:${PYTHONPATH:-}"
fi
export PYTHONPATH="$PWD:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 TIMM_VPL_DEVICE="$device"

# limit NAME SECONDS COMMAND...: run a command for so long, its output in OUT/NAME.log, its end in OUT/NAME.end.
limit() {
    name=$1 seconds=$2
    shift 2
    echo "== $name, at most $seconds s: $*"
    timeout "$((seconds * ${PATIENCE:-1}))" "$@" >"$out/$name.log" 2>&1
    echo "$?" >"$out/$name.end"
    tail -n 25 "$out/$name.log"
}

# shellcheck disable=SC2086  # OPTIONS and TESTS are several words
case $call in
tests)
    limit tests 520 "$python" -m pytest -n 0 -vv -m cuda tests/engine/test_cuda.py ${TESTS:-}
    ;;
rates)
    set -- --device "$device" ${OPTIONS:-}
    limit bounds 60 "$python" benchmarks/bounds.py --json "$out/bounds.json" ${OPTIONS:-}
    limit solo 100 "$python" benchmarks/step.py --question solo "$@" --json "$out/solo.json"
    limit solo-compiled 170 "$python" benchmarks/step.py --question solo "$@" --torchcompile "$compiler" \
        --json "$out/solo-compiled.json"
    limit dml 100 "$python" benchmarks/step.py --question dml "$@" --json "$out/dml.json"
    limit memory 90 "$python" benchmarks/memory.py "$@" --json "$out/memory.json"
    ;;
study)
    limit study 520 "$python" -m timm_vpl study "${PLAN:-benchmarks/study/first_block.yaml}" --data-dir "${DATA:-}" \
        --output "$out/study" --limit-minutes 8
    ;;
*)
    echo "$0: $call: expected pack, tests, rates or study" >&2
    exit 2
    ;;
esac
exec "$python" - "$out" <<'END'
"""Gather what lies in the folder as one JSON, with the share of each card's bound that a step reached."""
import json
import re
import statistics
import sys
from pathlib import Path

out = Path(sys.argv[1])
found = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob('*.json')) if path.stem != 'device'}
gathered = {'ends': {path.stem: int(path.read_text()) for path in sorted(out.glob('*.end'))}, 'found': found}
if (out / 'tests.log').exists():
    lines = re.findall(r'^(?:\S+::)(.+?) (PASSED|FAILED|ERROR|SKIPPED)', (out / 'tests.log').read_text(), re.MULTILINE)
    gathered['tests'] = dict(lines)
if {'bounds', 'solo'} <= found.keys():
    table = found['bounds']['questions']['whole steps']
    [bound] = [dict(zip(table['header'], row)) for row in table['rows'] if row[0] == 'pair']
    for name in ('solo', 'solo-compiled'):
        seconds = found.get(name, {}).get('questions', {}).get('solo', {}).get('seconds', {}).get('pair')
        if seconds:
            taken = 1e3 * statistics.median(seconds)
            gathered[f'share of bounds, {name}'] = {
                key: float(value) / taken for key, value in bound.items() if key.endswith(('H100 SXM', 'H200 SXM'))}
(out / 'device.json').write_text(json.dumps(gathered, indent=1) + '\n')
print(json.dumps({key: value for key, value in gathered.items() if key != 'found'}, indent=1))
END
