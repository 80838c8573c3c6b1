#!/usr/bin/env bash
# Explain a data set with N processes on this machine, each with a share of its rows, and merge what they found.
#
# usage: scripts/run_llm_sharded.sh DATASET N [options of `llm-analysis explain run`]
#        scripts/run_llm_sharded.sh stanfordnlp/sst2 4 --model Qwen/Qwen2.5-0.5B-Instruct --tol 0.05
#
# All of them write into one folder (outputs/insights/LLM/DATASET, or --output-dir). Run it again to go on where it was
# stopped. Where there are GPUs, the processes take turns among them; cores are shared equally unless OMP_NUM_THREADS
# says otherwise. LLM_ANALYSIS names another command than llm-analysis, LOGS another folder for what they say.
set -euo pipefail

if (($# < 2)) || [[ ! $2 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 DATASET N [options of \`llm-analysis explain run\`]" >&2
  exit 2
fi
dataset=$1 n=$2
shift 2

folder=$dataset exports=() previous=
for word in "$@"; do
  case $previous in --output-dir | --output_dir | --output) folder=$word ;; --top-k | --top_k) exports+=(--top-k "$word") ;; esac
  case $word in
    --output-dir=* | --output_dir=* | --output=*) folder=${word#*=} ;;
    --top-k=* | --top_k=*) exports+=("$word") ;;
    --no-raw | --no_raw | --pickle) exports+=("$word") ;;
    --num-shards* | --num_shards* | --shard-index* | --shard_index*)
      echo "$0: leave $word out: the number after DATASET says how many shards" >&2
      exit 2
      ;;
  esac
  previous=$word
done

command=${LLM_ANALYSIS:-llm-analysis}
logs=${LOGS:-logs/token_shap-$(date +%Y%m%d-%H%M%S)-$$}
mkdir -p "$logs"
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / n > 1 ? cores / n : 1))}
gpus=()
if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif [[ -z ${CUDA_VISIBLE_DEVICES+set} ]] && command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
fi

pids=()
stop() {
  trap - INT TERM
  echo "$0: stopping; what is finished is kept" >&2
  kill -TERM "${pids[@]}" 2>/dev/null || true
  wait || true
  exit 130
}
trap stop INT TERM

echo "$n shards of $dataset; what they say is in $logs/shard*.log" >&2
for ((i = 0; i < n; i++)); do
  (
    ((${#gpus[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${gpus[i % ${#gpus[@]}]}
    exec "$command" explain run "$dataset" "$@" --num-shards "$n" --shard-index "$i"
  ) >"$logs/shard$i.log" 2>&1 &
  pids+=($!)
done

failed=0
for ((i = 0; i < n; i++)); do
  code=0
  wait "${pids[i]}" || code=$?
  if ((code)); then
    failed=1
    echo "$0: shard $i failed with exit code $code: $(tail -n 1 "$logs/shard$i.log")" >&2
  fi
done
((failed == 0)) || { echo "$0: nothing was merged; run the same again to go on" >&2; exit 1; }
exec "$command" explain merge "$folder" "${exports[@]}"
