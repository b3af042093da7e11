#!/bin/bash
# Try study.py's array script on a SLURM that is here, with three tiny runs on the CPU:
#
#   bash experiments/slurm_trial.sh [FOLDER]
#
# The second run is requeued in the middle. At the end its numbers, and those of the other two, must
# be those of the local queue, and so must the report, but for the speed. Options that sbatch needs
# on your cluster go into the environment: SBATCH_ACCOUNT, SBATCH_PARTITION.
set -euo pipefail
trial=${1:-runs/slurm-trial}
mkdir -p "$trial"
[ -e "$trial/data" ] || python prepare.py --demo --demo-sequences 400 --out "$trial/data"
export OMP_NUM_THREADS=1
study=(python study.py --grid experiments/slurm_trial.csv --data "$trial/data"
       --set '--device cpu --batch-size 16 --save-every 5 --log-every 1')

"${study[@]}" --out "$trial/slurm" --slurm "$trial/study.sbatch"
job=$(sbatch --parsable --cpus-per-task=1 --time=30 "$trial/study.sbatch")
second=$trial/slurm/tiny-nt-ia3-lr0.03-max-steps30-seed42
until [ "$(cat "$second/log.jsonl" 2> /dev/null | wc -l)" -ge 8 ]; do sleep 0.2; done
squeue --job "$job" --array
scontrol requeue "${job}_2"
echo "requeued ${job}_2 after $(wc -l < "$second/log.jsonl") lines of its log"
until [ -z "$(squeue --noheader --job "$job" 2> /dev/null)" ]; do sleep 2; done
grep -h "resumed\|saved" "$second.txt"
"${study[@]}" --out "$trial/slurm" --status

"${study[@]}" --out "$trial/local" --jobs 2
for run in "$trial"/local/*; do
    [ ! -d "$run" ] || cmp "$run/metrics.json" "$trial/slurm/$(basename "$run")/metrics.json"
done
for kind in slurm local; do
    python report.py "$trial/$kind" --out "$trial/report-$kind"
    # without epoch_seconds
    cut -d, -f1-14 "$trial/report-$kind/table.csv" > "$trial/table-$kind.csv"
done
cmp "$trial"/table-slurm.csv "$trial"/table-local.csv
cat "$trial/table-slurm.csv"
echo "equal: three metrics.json to the last byte, and the report's table"
