#!/usr/bin/env bash
# Everything that needs a Hopper GPU, in at most 9 minutes: tests on the device, NVIDIA's checkers of races and memory,
# results of compiled programs beside the CPU's, the table of attention, and a profile of its slowest row.
#
#     benchmarks/on_gpu.sh                       # results in benchmarks/results, named after the device
#     benchmarks/on_gpu.sh --steps table,profile --out /tmp/results
#     benchmarks/on_gpu.sh --dry-run             # the same steps on a CPU, with tiny shapes, in a temporary folder
#
# Each step has a time limit of its own: a slow one is cut, the reason is recorded, and the next one begins. PYTHON names
# the interpreter; the default is .venv/bin/python, or else python3. It needs jax with CUDA, flax, numpy, jaxtyping,
# absl-py, tyro, rich and matplotlib, and the tests need pytest 9.2 and hypothesis. What other steps and peers need is
# named as absent where it is. In a copy without .git, SEQATTN_COMMIT names the commit for the rows.
set -u -o pipefail
cd "$(dirname "$0")/.."

WHOLE=540 SLOWER=1 # seconds; a dry run has more
ALL="tests racecheck memcheck table picture profile compiled"
dry=0 steps=$ALL out=""
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry=1 ;;
    --steps | --out)
        [ -n "${2:-}" ] || { echo "$1 needs a value" >&2; exit 2; }
        if [ "$1" = --out ]; then out=$2; else steps=${2//,/ }; fi
        shift
        ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift
done
for step in $steps; do
    case " $ALL " in *" $step "*) ;; *) echo "no step '$step': give $ALL" >&2; exit 2 ;; esac
done
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

work=$(mktemp -d)
background=""
# A process that is cut takes its children along: `timeout` signals its whole group.
step_pid=""
trap 'for pid in $step_pid $background; do kill "$pid" 2>/dev/null; done; wait; rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# JAX would take most of the memory of the GPU, and several processes share it with PyTorch.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# What the checks have compiled, the table loads. PyTorch compiles in the process: its pool of workers would fork beside
# the threads of JAX.
export JAX_COMPILATION_CACHE_DIR="$work/programs" TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton"
export TORCHINDUCTOR_COMPILE_THREADS=1
# A dry run has the time of a busy machine with two cores.
[ $dry = 0 ] || { export JAX_PLATFORMS=cpu SEQATTN_INTERPRET=1 && WHOLE=1200 SLOWER=3; }

# A start of jax on a GPU takes seconds, so the machine is asked once.
kind=$("$python" - "$work" 2>"$work/jax" <<'PY'
import json, sys
from pathlib import Path
import jax
from benchmarks.bench import machine, table
folder = Path(sys.argv[1])
(folder / "machine.json").write_text(json.dumps(machine.describe()), "utf-8")
(folder / "machine.txt").write_text(table.measured_on(), "utf-8")
print(jax.default_backend(), jax.devices()[0].device_kind)
PY
) || {
    tail -n 3 "$work/jax" >&2
    echo "$python cannot start jax, or rich is missing" >&2
    exit 2
}
if [ $dry = 0 ] && [ "${kind%% *}" != gpu ]; then
    echo "jax sees no GPU (${kind}); --dry-run runs the steps on a CPU" >&2
    exit 2
fi
device=$(echo "${kind#* }" | tr '[:upper:] ' '[:lower:]-' | sed 's/^nvidia-//; s/[^a-z0-9.-]//g')
: "${out:=$([ $dry = 1 ] && echo "$(mktemp -d)" || echo benchmarks/results)}"
mkdir -p "$out" || exit 2
stem="$out/$device"
rows="$stem.jsonl" checked="$stem-checked.jsonl" compiled="$stem-compiled.jsonl" profile="$stem-profile.jsonl"
log="$stem.log" report="$stem-steps.jsonl"
# A part of the steps adds to what an earlier call has found.
[ "$steps" != "$ALL" ] || rm -f "$log" "$report"
say() { printf '%s\n' "$*" | tee -a "$log"; }
has() { "$python" -c "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }

# record STEP STATUS SECONDS LIMIT REASON
record() {
    say "== $1: $2, $3 s${5:+: $5}"
    "$python" - "$work/machine.json" "$report" "$@" <<'PY'
import json, sys
machine, path, step, status, seconds, limit, reason = sys.argv[1:]
line = {"step": step, "status": status, "seconds": int(seconds), "limit_seconds": int(limit), "reason": reason[:300]}
with open(machine, encoding="utf-8") as file:
    line |= json.load(file)
with open(path, "a", encoding="utf-8") as file:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
PY
}

wanted() { case " $steps " in *" $1 "*) return 0 ;; *) return 1 ;; esac }
least() { [ "$1" -lt "$2" ] && echo "$1" || echo "$2"; }

# outcome STEP CODE SECONDS LIMIT LOG
outcome() {
    local last
    last=$(grep -v '^[[:space:]]*$' "$5" | tail -n 1 | cut -c 1-300)
    case $2 in
    0) record "$1" passed "$3" "$4" "$last" ;;
    124 | 137) record "$1" cut "$3" "$4" "cut after $4 s; its last line: $last" ;;
    *) record "$1" failed "$3" "$4" "exit status $2; its last line: $last" ;;
    esac
}

# run STEP LIMIT COMMAND...
run() {
    local step=$1 limit begun code shown
    wanted "$step" || return 0
    limit=$(least $((SLOWER * $2)) $((WHOLE - SECONDS)))
    shift 2
    if [ "$limit" -lt 5 ]; then
        record "$step" "not run" 0 0 "the $WHOLE s of the whole are over"
        return 0
    fi
    say "" "== $step (at most $limit s)"
    begun=$SECONDS
    # In the background, as a signal would else wait for the end of the step, and leave it running.
    timeout --kill-after=5 "$limit" "$@" >"$work/$step.log" 2>&1 &
    step_pid=$!
    tail -n +1 -f --pid="$step_pid" "$work/$step.log" | tee -a "$log" &
    shown=$!
    wait "$step_pid"
    code=$?
    step_pid=""
    wait "$shown"
    outcome "$step" "$code" $((SECONDS - begun)) "$limit" "$work/$step.log"
}

skip() { ! wanted "$1" || record "$1" skipped 0 0 "$2"; }

# Sizes: those of a GPU, and those of a dry run.
shape=hopper-t8192 masks="causal documents alibi cap window-512" directions="fwd bwd" rounds=5 product=8192
programs="" length=8192 only="" workers=$(least 8 $((($(nproc) + 1) / 2)))
peers="seqattn:chunked seqattn:cudnn seqattn:tokamax jax.nn:cudnn jax.nn:xla tokamax tokamax:mosaic torch:flex torch:flash-2"
peers="$peers torch:flash-3"
small=b1-t256-n2-d64
if [ $dry = 1 ]; then
    shape=b1-t128-n2-d64 masks="causal cap" rounds=1 product=64 workers=0
    programs="attention/reference/causal kernel/hopper/cap" length=128
    # The interpreter takes half a minute for one call.
    only="chunked-cap or (hopper and documents and h64 and bfloat16)"
fi
attention="$python -m benchmarks.attention --shapes $shape --pass $directions --baseline seqattn:chunked"

say "$(cat "$work/machine.txt")"
say "steps: $steps; results: $out"
for module in absl tyro rich matplotlib pytest xdist hypothesis optax datasets tokamax torch flash_attn flash_attn_interface; do
    has "$module" || say "absent: $module"
done

# Beside the tests: every mask is compiled and checked in a process of its own, and the CPU computes its results. The
# table begins when both are over, on a quiet machine.
# The kernel for Hopper has a process of its own: what it does to the memory of the GPU, or a wait without end, must not
# reach others.
check_masks() {
    local pids="" mask code=0 pid
    export OMP_NUM_THREADS=3 OPENBLAS_NUM_THREADS=3
    for mask in $masks; do
        $attention --implementations $peers --masks "$mask" --rounds 0 --json "$checked" >"$work/check-$mask.log" 2>&1 &
        pids="$pids $!"
        $attention --implementations seqattn:hopper --masks "$mask" --rounds 0 --json "$work/hopper-$mask.jsonl" \
            >"$work/check-hopper-$mask.log" 2>&1 &
        pids="$pids $!"
    done
    for pid in $pids; do wait "$pid" || code=$?; done
    tail -q -n 1 "$work"/check-*.log
    return $code
}
export -f check_masks
export masks attention checked work peers
beside_limit=$((SLOWER * 200))

# beside STEP COMMAND...: runs in the background, and leaves its exit status and its seconds in a file.
beside() {
    local step=$1
    shift
    {
        local begun=$SECONDS child code
        timeout --kill-after=5 $beside_limit "$@" >"$work/$step.log" 2>&1 &
        child=$!
        trap 'kill $child 2>/dev/null' TERM
        wait $child
        code=$?
        echo "$code $((SECONDS - begun))" >"$work/$step.end"
    } &
    background="$background $!"
}

# joined STEP: waits for it, and records it.
joined() {
    [ -e "$work/$1.log" ] || return 0
    while [ ! -e "$work/$1.end" ]; do
        wait -n
        [ $? != 127 ] || break # no process is left: it was killed
    done
    outcome "$1" $(cat "$work/$1.end" 2>/dev/null || echo "137 $SECONDS") $beside_limit "$work/$1.log"
    cat "$work/$1.log" >>"$log"
}

if wanted table; then
    rm -f "$checked"
    beside checks bash -c check_masks
fi
if wanted compiled; then
    beside cpu env JAX_PLATFORMS=cpu nice -n 10 "$python" -m benchmarks.compile.execution --write "$work/cpu" \
        --length $length --seconds $((beside_limit - 20)) ${programs:+--programs $programs}
fi

# 1. The tests that need a GPU. Without -W a warning of a library for GPUs would be an error.
parallel=""
[ "$workers" = 0 ] || ! has xdist || parallel="-n $workers --dist worksteal"
run tests 160 "$python" -m pytest -m gpu $parallel -W default -p no:cacheprovider -o minversion=7.0 \
    -o addopts="--import-mode=importlib -p tests.plugin" -rA --tb=short --durations=5 \
    ${only:+-k "$only"} $(grep -rlE 'mark\.gpu' tests --include='test_*.py')

# 2. NVIDIA's checkers, on a small call of the kernel, forward and backward. The filter leaves other kernels alone, and
# without XLA's allocator each array has its own bounds.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
for tool in racecheck memcheck; do
    if [ $dry = 1 ]; then
        skip $tool "there is no GPU in a dry run"
    elif [ -z "$sanitizer" ]; then
        skip $tool "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    else
        XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" \
            run $tool 50 "$sanitizer" --tool $tool --kernel-name kns=seqattn_hopper --error-exitcode 9 \
            "$python" -m benchmarks.attention --shapes $small --masks documents --pass bwd \
            --implementations seqattn:hopper --rounds 0
    fi
done

# What ran beside the tests.
joined checks
if wanted table; then
    cat "$work"/check-*.log >>"$log"
    cat "$work"/hopper-*.jsonl >>"$checked" 2>/dev/null
fi
joined cpu
background=""

# 3. The table and its picture, which is drawn from the rows: also where the table was cut. A mask whose check of the
# kernel for Hopper crashed, or did not end, has a table without it.
whole="" without=""
if wanted table; then
    rm -f "$rows"
    for mask in $masks; do
        # One line for each pass, and none that failed.
        lines=$(grep -c '"implementation"' "$work/hopper-$mask.jsonl" 2>/dev/null)
        if [ "${lines:-0}" = "$(echo $directions | wc -w)" ] && ! grep -q '"status": "failed"' "$work/hopper-$mask.jsonl"; then
            whole="$whole $mask"
        else
            without="$without $mask"
            record "hopper, $mask" failed 0 0 "its check crashed or did not end, so the table of $mask is without it"
        fi
    done
fi
timed="$attention --rounds $rounds --product-size $product --json $rows"
[ -z "$whole" ] || run table 230 $timed --implementations seqattn:hopper $peers --masks $whole
[ -z "$without" ] || run table 120 $timed --implementations $peers --masks $without
run picture 20 "$python" -c '
import sys
from pathlib import Path
from benchmarks.attention.chart import speeds
from benchmarks.bench.record import read
print(*speeds(read(Path(sys.argv[1])), sys.argv[2]), sep=", ")' "$rows" "$stem.png"

# 4. Where the time of the slowest row of this library goes.
if wanted profile; then rm -f "$profile"; fi
run profile 45 "$python" -m benchmarks.attention.profile "$rows" --json "$profile"

# 5. The compiled programs of one device, with the results of the CPU that are there.
if wanted compiled; then rm -f "$compiled"; fi
# Those with the kernel for Hopper have a process of their own, too.
compare() {
    local pids="" group code=0 pid number=0
    for group in "kernel attention/hopper" "attention/cudnn attention/chunked" \
        "attention/xla attention/reference decode update"; do
        [ -z "$programs" ] || group=$programs
        number=$((number + 1))
        $execution --json "$compiled" --programs $group >"$work/compare-$number.log" 2>&1 &
        pids="$pids $!"
        [ -z "$programs" ] || break
    done
    for pid in $pids; do wait "$pid" || code=$?; done
    cat "$work"/compare*.log
    return $code
}
rest=$(least $((SLOWER * 150)) $((WHOLE - SECONDS)))
execution="$python -m benchmarks.compile.execution --against $work/cpu --length $length"
execution="$execution --seconds $((rest > 60 ? rest - 30 : rest / 2))"
export -f compare
export execution compiled programs
run compiled 150 bash -c compare

say "" "in $SECONDS s:"
"$python" - "$report" <<'PY' | tee -a "$log"
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
for line in lines:
    print(f"{line['step']:20} {line['status']:8} {line['seconds']:4} s  {line['reason'][:150]}")
sys.exit(any(line["status"] in ("failed", "cut") for line in lines))
PY
exit "${PIPESTATUS[0]}"
