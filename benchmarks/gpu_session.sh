#!/usr/bin/env bash
# Everything that waits for a GPU, in under twelve minutes:
#
#     benchmarks/gpu_session.sh FOLDER [--machine NAME] [--smollm2 WEIGHTS] [--only PART,PART] [--dry-run]
#
# FOLDER (default: $OUT) gets a CSV a benchmark, summary.csv with a line a part, and session.log. Each part has a time
# budget and is ended when it is spent; one that fails does not stop the others. Exits with 1 if a part failed.
#
#   --machine NAME    what the files of results are called after; default: gpu
#   --smollm2 WEIGHTS folder of SmolLM2-135M's weights for its training step, in transformers' form; default: random
#   --only PARTS      some of the parts
#   --dry-run         every part with tiny sizes on the CPU. Its files are called dry-run, and each row says that it is
#                     no measurement.
#
# PYTHON names the interpreter, default python: one with torch for CUDA, Triton and the packages of `pip install -e
# ".[test]"`.
set -u -o pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
PYTHON="${PYTHON:-python}"
folder="${OUT:-}" machine=gpu weights="" only="" dry_run=""

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case "$1" in
    --machine|--smollm2|--only) [ $# -ge 2 ] || { echo "$1 needs a value." >&2; usage; } ;;&
    --machine) machine="$2"; shift 2 ;;
    --smollm2) weights="$2"; shift 2 ;;
    --only) only="$2"; shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    -*) echo "$1 is no option of this script." >&2; usage ;;
    *) folder="$1"; shift ;;
  esac
done
[ -n "$folder" ] || { echo "Name the folder for the results." >&2; usage; }
mkdir -p "$folder" && folder="$(cd "$folder" && pwd)" || exit 2
if [ -z "$dry_run" ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch finds no GPU: pass --dry-run to try the script on the CPU." >&2
  exit 2
fi

mark="" how=measured suffix=""
[ -n "$dry_run" ] && mark="tiny sizes on a CPU: no measurement" how="dry run" suffix=_dry-run
summary="$folder/summary$suffix.csv" log="$folder/session$suffix.log" failed=0
echo "part,kind,outcome,seconds,budget_seconds,note" >"$summary"
: >"$log"

# part NAME BUDGET COMMAND...: run a part, at most BUDGET seconds, and note what came of it.
part() {
  local name="$1" budget="$2" began status outcome=passed
  shift 2
  case ",$only," in ",,"|*",$name,"*) ;; *) return ;; esac
  echo "== $name (at most $budget s)"
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  began=$SECONDS
  timeout --kill-after=5 "$budget" "$@" >>"$log" 2>&1
  status=$?
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then outcome="out of time"; elif [ $status -ne 0 ]; then outcome=failed; fi
  if [ $status -ne 0 ]; then failed=1; tail -n 5 "$log"; fi
  echo "$name,$how,$outcome,$((SECONDS - began)),$budget,$mark" >>"$summary"
}

bench() { local name="$1" budget="$2" script="$3"; shift 3; part "$name" "$budget" "$PYTHON" "benchmarks/$script.py" "$@"; }

# Without a GPU the budgets are those of a slow machine; with one they are at most 690 s together.
if [ -n "$dry_run" ]; then
  common=(--results "$folder" --dry_run --repeats 1)
  gpt2=(--num_layers 1 --hidden_size 64 --vocab_size 400)
  tiny=(--batch 2 --prompt 8 --latents 2 --answer 4)
  [ -n "$weights" ] || tiny+=(--tiny)
  bench kernel_tests 300 kernel_tests "$folder" --dry_run
  bench step 300 bench_latent_step "${common[@]}" "${gpt2[@]}" --batch 2 --prompts 8 --latents 0 2
  bench ragged_step 300 bench_ragged_step "${common[@]}" "${gpt2[@]}" --batch 2
  bench attention 300 bench_attention "${common[@]}" --prefixes 8 --tails 1
  bench generate 300 bench_generate "${common[@]}" "${gpt2[@]}" --prompt 24 --latents 2 --new_tokens 2 --batch 2 --prefix 8
  bench smollm2_step 300 bench_pretrained_step smollm2_135m "${common[@]}" "${tiny[@]}" ${weights:+--weights "$weights"}
  bench qwen2_step 300 bench_pretrained_step qwen2_1_5b "${common[@]}" --batch 2 --prompt 8 --latents 2 --answer 4 --tiny
else
  common=(--results "$folder" --machine "$machine" --gpu)
  bench kernel_tests 150 kernel_tests "$folder"
  bench step_64 60 bench_latent_step "${common[@]}" --prompts 64 --latents 0 4 8 16 32
  bench step_300 60 bench_latent_step "${common[@]}" --prompts 300 --latents 0 8 16
  bench step_3300 60 bench_latent_step "${common[@]}" --prompts 3300 --latents 0 8 --repeats 2
  bench ragged_step 40 bench_ragged_step "${common[@]}"
  bench attention 60 bench_attention "${common[@]}"
  bench smollm2_step 60 bench_pretrained_step smollm2_135m "${common[@]}" ${weights:+--weights "$weights"}
  bench qwen2_step 80 bench_pretrained_step qwen2_1_5b "${common[@]}"
  bench generate 120 bench_generate "${common[@]}" --repeats 1 --num_layers 12 --hidden_size 768
fi

echo
column -s, -t "$summary" 2>/dev/null || cat "$summary"
[ -n "$mark" ] && echo "Dry run: $mark."
ran=$(($(wc -l <"$summary") - 1))
[ "$ran" -gt 0 ] || { echo "--only $only names no part." >&2; exit 2; }
echo "$ran parts, results in $folder$([ $failed -eq 0 ] || echo '; SOME FAILED, see session'"$suffix"'.log')"
exit $failed
