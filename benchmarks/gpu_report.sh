#!/usr/bin/env bash
# Everything there is to know of natten2 on one GPU, without a network, in under ten minutes.
#
#   benchmarks/gpu_report.sh [--no-gpu] [--fresh] [OUT_DIR]
#
# Builds natten2 in place, runs the GPU's tests, measures, and watches memory accesses, the most valuable first. OUT_DIR,
# by default benchmarks/results/<device>, gets the numbers and pictures of natten2 against others (gpu-<device>.json,
# .png) and against FlexAttention (gpu-<device>-flex.json, .png), every part's output (log.txt), and report.txt, which is
# printed. A part that fails does not stop the next; one that was fine in OUT_DIR is not run again, unless --fresh. The
# exit status is 1 if any part failed.
#
# --no-gpu tries this script on the processor with small stand-ins; what it measures means nothing.
#
# Environment: PYTHON, the interpreter with torch, by default python3; DEADLINE, the seconds for all parts.
set -uo pipefail

PYTHON=${PYTHON:-python3}
DEADLINE=${DEADLINE:-555}
REPOSITORY=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
}

parse_options() {
    gpu=1 fresh=0 out=""
    for argument in "$@"; do
        case $argument in
            --no-gpu) gpu=0 ;;
            --fresh) fresh=1 ;;
            -h | --help) usage && exit 0 ;;
            -*) echo "unknown option $argument" >&2 && usage >&2 && exit 2 ;;
            *) out=$argument ;;
        esac
    done
}

# The last word on a part in this folder: ok, failed, skipped, or nothing.
state_of() {
    awk -F '\t' -v part="$1" '$1 == part { state = $2 } END { print state }' "$status_file"
}

note() { # part state seconds remark
    printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$4" >>"$status_file"
    printf '%-10s %-8s %4s s  %s\n' "$1" "$2" "$3" "$4"
    rows+=("$(printf '%-10s %-8s %4s s  %s' "$1" "$2" "$3" "$4")")
}

# part NAME SECONDS COMMAND...: runs a command for at most as many seconds, with its output in OUT_DIR/NAME.log.
part() {
    local name=$1 limit=$2 left=$((DEADLINE - SECONDS)) start=$SECONDS status
    shift 2
    if [[ $(state_of "$name") == ok ]]; then
        rows+=("$(printf '%-10s %-8s %4s    %s' "$name" ok - "earlier, kept")")
        return
    fi
    if ((left < 5)); then
        note "$name" skipped 0 "no time was left"
        return
    fi
    printf '\n== %s\n' "$name" >>"$log"
    log_start=$(wc -c <"$log")
    export log_start
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" >>"$log" 2>&1
    status=$?
    case $status in
        0) note "$name" ok "$((SECONDS - start))" "$(remark "$name")" ;;
        124 | 137) note "$name" failed "$((SECONDS - start))" "ran out of time" && failures=1 ;;
        77) note "$name" skipped "$((SECONDS - start))" "$(last_line)" ;;
        *) note "$name" failed "$((SECONDS - start))" "exit status $status: $(last_line)" && failures=1 ;;
    esac
}

# What the part that ran last has written.
part_log() {
    tail -c +"$((log_start + 1))" "$log"
}

last_line() {
    part_log | tail -n 1 | cut -c 1-100
}

# What to say of a part that was fine.
remark() {
    case $1 in
        tests | cuda-tests | warm) last_line | tr -d '=' | sed 's/^ *//;s/ *$//' ;;
        bench | flex) part_log | grep -m 1 'matrix product' ;;
        memcheck | racecheck | cuda-mem | cuda-race) part_log | grep -h 'SUMMARY' | tail -n 1 ;;
    esac
}

build() {
    if ((gpu)); then
        "$PYTHON" -m pip install --no-build-isolation --no-deps --editable . -C "cmake.define.NATTEN2_CUDA=${NATTEN2_CUDA:-AUTO}"
    else
        "$PYTHON" -c 'from natten2 import _extension; print(_extension.library_path())'
    fi
}

about() {
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi || true
    fi
    "$PYTHON" -m natten2
}

run_tests() {
    local options=(tests/test_gpu.py -q -m "not long" -p no:cacheprovider)
    if ((!gpu)); then
        NATTEN2_TEST_DEVICE=cpu "$PYTHON" -m pytest "${options[@]}" -k 'strided or hidden or bad_input'
        return
    fi
    # Most of the time goes into compiling a few kernels per problem, on one core each.
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        options+=(-n "$(nproc)" --dist worksteal)
    fi
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest "${options[@]}"
}

# The kernels in CUDA C++: numbers, and then the tests of a GPU with them on.
run_cuda_tests() {
    if ((!gpu)); then
        "$PYTHON" -m pytest tests/test_cuda.py -q -m "not long" -p no:cacheprovider -k 'has_a_reason or without_nvcc'
        return
    fi
    if ! "$PYTHON" -c 'import sys; from natten2 import _extension; sys.exit(_extension.cuda_library_path() is None)'; then
        echo "natten2 was built without nvcc"
        return 77
    fi
    local options=(-q -p no:cacheprovider)
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        options+=(-n 8)
    fi
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest tests/test_cuda.py "${options[@]}" &&
        NATTEN2_CUDA_KERNELS=1 "$PYTHON" -m pytest tests/test_gpu.py -q -m "not long" -p no:cacheprovider \
            -k 'opcheck or same_bits or graph or hidden or strided or stream or two_to_the_31 or not_finite'
}

warm() {
    if ((gpu)); then
        "$PYTHON" -m benchmarks.gpu_warm
    else
        "$PYTHON" -m benchmarks.gpu_warm --device cpu --processes 1
    fi
}

# bench NAME SECONDS IMPLEMENTATION...: into OUT_DIR/NAME.json and NAME.png.
bench() {
    local -x PYTHONWARNINGS=ignore
    local options=(--json "$out/$1.json" --plot "$out/$1.png" --implementation "${@:3}")
    if ((!gpu)); then
        "$PYTHON" -m benchmarks gpu --no-gpu "${options[@]}" --case nat-tiny-1-b128 volume nat-tiny-4-b1-latency
        return
    fi
    "$PYTHON" -m benchmarks gpu "${options[@]}" --budget-seconds "$2"
    local status=$?
    # An illegal memory access loses the device for its process alone: a new one takes up where it ended.
    if ((status > 1)); then
        "$PYTHON" -m benchmarks gpu "${options[@]}" --budget-seconds "$(($2 / 4))" --resume
        return
    fi
    return "$status"
}

sanitize() { # tool, whether on kernels in CUDA C++
    local -x NATTEN2_CUDA_KERNELS=${2:-0}
    if ((!gpu)); then
        "$PYTHON" -m benchmarks.sanitize --device cpu
        return
    fi
    local -x PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not installed"
        return 77
    fi
    compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes application-only \
        "$PYTHON" -m benchmarks.sanitize
    local status=$?
    if part_log | grep -q 'Device not supported'; then
        echo "compute-sanitizer does not support this device"
        return 77
    fi
    return "$status"
}

report() {
    local files=("$out/gpu-$slug.json" "$out/gpu-$slug-flex.json") there=()
    for file in "${files[@]}"; do
        [[ -s $file ]] && there+=("$file")
    done
    if ((${#there[@]})); then
        "$PYTHON" -m benchmarks gpu --show "${there[@]}"
    fi
    echo
    printf '%-10s %-8s %6s  %s\n' part state seconds remark
    printf '%s\n' "${rows[@]}"
    echo "all parts: $SECONDS s, in $out"
}

main() {
    parse_options "$@"
    cd "$REPOSITORY" || exit 1
    slug=no-gpu
    if ((gpu)); then
        slug=$("$PYTHON" -c '
import re, torch
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') || {
            echo "there is no GPU; --no-gpu tries this script without one" >&2
            exit 1
        }
        out=${out:-benchmarks/results/$slug}
    else
        out=${out:-build/gpu-report}
    fi
    mkdir -p "$out"
    out=$(cd -- "$out" && pwd)
    status_file=$out/status.tsv log=$out/log.txt
    ((fresh)) && rm -f "$status_file" "$log"
    touch "$status_file" "$log"
    failures=0 rows=()
    export PYTHON REPOSITORY gpu out slug log PYTHONUNBUFFERED=1
    export -f build about run_tests run_cuda_tests warm bench sanitize part_log
    part build 120 bash -c build
    part about 60 bash -c about
    part cuda-tests 60 bash -c run_cuda_tests
    part tests 170 bash -c run_tests
    part warm 50 bash -c warm
    part bench 130 bash -c 'bench "gpu-$slug" 90 natten2 natten2-cuda swin natten-hopper natten-cutlass'
    part memcheck 60 bash -c 'sanitize memcheck'
    part cuda-mem 40 bash -c 'sanitize memcheck 1'
    # FlexAttention compiles for many seconds per case, which would keep natten2's later cases waiting.
    part flex 100 bash -c 'bench "gpu-$slug-flex" 70 natten2 flex-tiled flex'
    part racecheck 60 bash -c 'sanitize racecheck'
    part cuda-race 40 bash -c 'sanitize racecheck 1'
    report 2>&1 | tee "$out/report.txt"
    exit "$failures"
}

main "$@"
