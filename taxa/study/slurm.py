"""One sbatch script for many commands: an array, a task each."""

SCRIPT = r"""#!/bin/bash
# {title}
# Submit it:  sbatch {file}
#
# One array task per run. Ten minutes before the time limit SLURM sends SIGUSR1: the run saves and
# leaves with status 75, and the task puts itself back into the queue, where it goes on from what
# was saved. After a preemption or a lost node SLURM requeues it. A task whose run is finished ends
# at once, so the file can be submitted again. The commands are in this file, of which SLURM keeps a
# copy.

# ---- your cluster: fill in or take out (a second # makes a line a comment)
##SBATCH --account=YOUR_ACCOUNT
##SBATCH --partition=YOUR_PARTITION
{gpus}#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# ----
#SBATCH --job-name=taxa-study
#SBATCH --array=1-{count}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={processes}
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={folder}/slurm-%a.txt

# ---- your environment: modules, the virtual environment
# module load python cuda
# source .venv/bin/activate
# ----

cd {here} || exit 1
command=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" <<'COMMANDS'
{commands}
COMMANDS
)
eval "out=${{command##* --out }}"
[ -e "$out/metrics.json" ] && exit 0
echo "\$ $command" >> "$out.txt"
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-1}}

# One task per process, on its own GPU, without torchrun, which would turn status 75 into 1.
# exec: the signal must reach python.
srun --kill-on-bad-exit=1 bash -c "
export RANK=\$SLURM_PROCID LOCAL_RANK=\$SLURM_LOCALID WORLD_SIZE=\$SLURM_NTASKS
exec $command" >> "$out.txt" 2>&1
status=$?
echo "exit status $status" >> "$out.txt"
[ $status -eq 75 ] && exec scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
exit $status
"""


def array_script(title, file, commands, *, folder, here, processes, gpus):
    """The text of an sbatch script.

    commands: command lines that end with --out FOLDER; folder: where the tasks write what they
    print; here: the folder in which a command starts, quoted for the shell; processes: of a
    command; gpus: whether each of these processes gets a GPU.
    """
    return SCRIPT.format(
        title=title,
        file=file,
        commands="\n".join(commands),
        count=len(commands),
        folder=folder,
        here=here,
        processes=processes,
        gpus=f"#SBATCH --gpus-per-node={processes}\n" if gpus else "",
    )
