#!/usr/bin/env bash
# What one GPU of the Hopper generation can show of Quadriga, the most telling first.
#
#   benchmarks/gpu_check.sh --first           probe, debug run, trace, 8B's width in bfloat16; at most 240 s
#   benchmarks/gpu_check.sh --rest            compiled, float8, float32 weights, resume, NVSHMEM, gpu tests; at most 360 s
#   benchmarks/gpu_check.sh --only STEP ...   these steps; `modes` (11 modes of the debug model) is in none of the above
#   benchmarks/gpu_check.sh --dry [STEP ...]  without a GPU: each training line as a dry run that must fit DEVICE, each
#                                             Python line with its arguments checked; exit code 1 if one is refused
#
# Each step has a limit of its own, and a step that fails does not stop the next. At the end comes a table: target,
# figure, met or missed. $OUT gets summary.txt, table.txt, gpu.txt and all.tgz (logs, and metrics.jsonl and
# estimate.json of each run). A further call with the same $OUT adds to them.
#
# OUT            folder of the results (default ./gpu_results)
# LAYERS         layers of the wide model (default 6; 32 is 8B, which needs 141 GB and ROWS=1)
# ROWS           its sequences per step, one per micro-batch (default 4)
# DEVICE         the device of the dry runs (default h100-80gb; `quadriga estimate --help` lists the names)
# LIMIT_FACTOR   multiplies the limits, for slow machines (default 1)
# PYTHON         the interpreter (default python3)
#
# A bare image with torch 2.11 and Python 3.12 lacks these wheels, 6 MB in all. `pip install --no-deps` installs them:
#   pydantic 2.14.4, pydantic_core 2.50.5, annotated_types 0.8.0, typing_inspection 0.4.5, typing_extensions 4.16.0,
#   tomli_w 1.2.0, torchao 0.18.0
# The step `tests` also needs pytest and hypothesis.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
first="probe debug trace wide_bf16"
rest="wide_compiled wide_float8 wide_mixed resume nvshmem tests"
mode="${1:-}"
shift || true
case "$mode" in
    --first) budget=235 wanted="$first" ;;
    --rest) budget=355 wanted="$rest" ;;
    --only) budget=540 wanted="$*" ;;
    --dry) budget=540 wanted="${*:-$first $rest modes}" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "benchmarks/gpu_check.sh" && exit 2 ;;
esac
for name in $wanted; do
    [[ " $first $rest modes " == *" $name "* ]] && continue
    echo "no step is named $name; there are: $first $rest modes" >&2
    exit 2
done

export mode PYTHON="${PYTHON:-python3}" DEVICE="${DEVICE:-h100-80gb}" PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 NO_COLOR=1 NGPU=1
export OUT="${OUT:-$OLDPWD/gpu_results}" factor="${LIMIT_FACTOR:-1}" runs
[[ "$OUT" == /* ]] || OUT="$OLDPWD/$OUT"
mkdir -p "$OUT"
[[ -f "$OUT/all.tgz" ]] && tar xzf "$OUT/all.tgz" -C "$OUT"
runs="$(mktemp -d)"
trap 'rm -rf "$runs"' EXIT

# train NAME KEYS ...: a run in a folder of that name. With --dry its dry run, which fails if the run does not fit DEVICE.
train() {
    local name=$1 code
    shift
    if [[ "$mode" == --dry ]]; then
        DRY_RUN=1 ./run_train.sh --job.dump_folder "$runs/$name" --estimate.device "$DEVICE" "$@" >"$runs/dry" 2>&1
        code=$?
        cat "$runs/dry"
        grep -q '^  verdict *fits' "$runs/dry" && return $code
        return 1
    fi
    ./run_train.sh --job.dump_folder "$runs/$name" "$@"
    code=$?
    cp "$runs/$name/metrics.jsonl" "$OUT/$name.jsonl"
    cp "$runs/$name/estimate.json" "$OUT/$name.estimate.json"
    return $code
}

plain="--metrics.log_freq 1 --metrics.enable_tensorboard false --checkpoint.enable false --profiling.enable_profiling false"

# The debug model. Its 4 rows per step keep the run short on a CPU, where the losses to compare with come from.
debug() { # name, keys
    train "$1" $plain --training.global_batch_size 4 "${@:2}"
}

# 8B's width at 8,192 tokens, computed in bfloat16.
wide() { # name, keys
    CONFIG_FILE=configs/llama3_8b/llama3_8b.toml train "$1" $plain --model.hf_assets_path builtin:bytes \
        --training.dataset builtin --model.n_layers "${LAYERS:-6}" --training.seq_len 8192 --training.local_batch_size 1 \
        --training.global_batch_size "${ROWS:-4}" --training.steps 8 --training.mixed_precision_param bfloat16 --optimizer.lr 1e-4 \
        "${@:2}"
}

# All in bfloat16, without recompute.
half() { # name, keys
    wide "$1" --training.dtype bfloat16 --training.mixed_precision_reduce bfloat16 --activation_checkpoint.mode none "${@:2}"
}

# Saves at steps 2, 4 and 6. Then the newer two are removed, and the same command trains steps 3 to 6 again.
resume() {
    local keys="--training.steps 6 --checkpoint.enable true --checkpoint.interval 2 --debug.deterministic true"
    debug resume $keys || return
    [[ "$mode" == --dry ]] && return
    rm -r "$runs"/resume/checkpoint/step-{4,6}
    debug resume $keys
}

# A script that reports that it found no GPU has accepted its arguments.
nvshmem() {
    if [[ "$mode" == --dry ]]; then
        CUDA_VISIBLE_DEVICES="" "$PYTHON" benchmarks/nvshmem_one_gpu.py | tee "$runs/nvshmem"
        grep -q "not measured: no CUDA device" "$runs/nvshmem"
    else
        "$PYTHON" benchmarks/nvshmem_one_gpu.py
    fi
}

run_step() {
    local dry=""
    [[ "$mode" == --dry ]] && dry=--dry
    case "$1" in
        probe) "$PYTHON" benchmarks/gpu_probe.py $dry --out "$OUT/probe.json" ;;
        debug) debug debug --training.steps 20 ;;
        trace)
            debug trace --training.steps 12 --profiling.enable_profiling true --profiling.profile_freq 12 &&
                "$PYTHON" -m quadriga.cli trace "$runs/trace" ${dry:+--help}
            ;;
        wide_bf16) half wide_bf16 ;;
        wide_compiled) half wide_compiled --compile.enable ;;
        wide_float8)
            half wide_float8 --compile.enable --model.converters quantize.linear.float8 \
                --quantize.linear.float8.filter_fqns output
            ;;
        wide_mixed)
            wide wide_mixed --optimizer.state_dtype bfloat16 --activation_checkpoint.mode full --training.loss_chunks 8
            ;;
        resume) resume ;;
        nvshmem) nvshmem ;;
        tests) "$PYTHON" -m pytest $(grep -rl --include='*.py' mark.gpu tests/unit) -m gpu -p no:cacheprovider ${dry:+--collect-only} ;;
        modes) "$PYTHON" benchmarks/modes.py --models debug $dry ;;
    esac
}

# step NAME SECONDS: runs a step that is wanted, within its limit and what is left of the whole time.
step() {
    local name=$1 limit=$(($2 * factor)) left=$((budget * factor - SECONDS)) start=$SECONDS code
    [[ " $wanted " == *" $name "* ]] || return 0
    ((left < limit)) && limit=$left
    if ((limit < 15)); then
        echo "$name: not run, no time is left" | tee -a "$OUT/summary.txt"
        failed=1
        return
    fi
    timeout -k 5 "$limit" bash -c "run_step $name" >"$OUT/$name.log" 2>&1
    code=$?
    echo "$name: exit code $code, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
    echo "{\"step\": \"$name\", \"code\": $code, \"seconds\": $((SECONDS - start))}" >>"$OUT/steps.jsonl"
    ((code == 0)) || { failed=1 && tail -n 12 "$OUT/$name.log"; }
}

export plain
export -f train debug wide half resume nvshmem run_step
failed=0
[[ "$mode" == --dry ]] || nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv >"$OUT/gpu.txt"
step probe 90
step debug 50
step trace 60
step wide_bf16 80
step wide_compiled 110
step wide_float8 110
step wide_mixed 60
step resume 60
step nvshmem 50
step tests 60
step modes 400
[[ "$mode" == --dry ]] && exit $failed
"$PYTHON" benchmarks/gpu_table.py "$OUT" | tee "$OUT/table.txt"
cd "$OUT" && tar czf all.tgz --exclude all.tgz ./*.log ./*.json* && rm -f ./*.log ./*.json*
exit 0
