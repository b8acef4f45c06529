#!/bin/bash
# A training run on several nodes of a SLURM cluster that requeues itself when its time is up. From the repository's root,
# with your environment activated:
#
#   sbatch --nodes 2 recipes/accelerate/slurm.sh --config RECIPE.yaml --output_dir /shared/run
#
# One launcher per node starts one process per GPU. Five minutes before the time limit SLURM sends SIGUSR1 to this script
# (B: below), which passes it on to the training processes of all nodes; they finish their update, save and exit, and
# the job goes back into the queue. When it starts again it resumes from its latest checkpoint; the first time there is
# none, so it starts from the beginning. A run that fails is not requeued. --output_dir has to be on a file system that
# all nodes share. The time limit must be longer than five minutes, and an update shorter.
#SBATCH --job-name=ham
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -uo pipefail

export ADDRESS PROCESSES
ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))

# On every node. SLURM signals this shell alone, which passes it to the training processes: the launcher would not, and
# ignores the signal itself, as it would end and take them with it.
on_node='
  (
    trap "" USR1
    exec accelerate launch --config_file recipes/accelerate/multi_node.yaml \
      --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
      --main_process_ip "$ADDRESS" --main_process_port 29500 \
      recipes/train_ham.py "$@" --resume_from_checkpoint latest
  ) &
  launcher=$!
  trap "pkill -USR1 --parent $launcher" USR1
  # A signal interrupts wait; only the status of a launcher that has ended counts.
  while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher"
    status=$?
  done
  exit "$status"
'

stopped=false
stop() {
  stopped=true
  scancel --signal=USR1 "$SLURM_JOB_ID" # the steps of the job, not this script
}

# Since SLURM 22.05 srun does not take over the job's --cpus-per-task by itself.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c "$on_node" ham "$@" &
step=$!
trap stop USR1
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done

if [ "$stopped" = true ] && [ "$status" -ne 0 ]; then
  echo "stopped before the end; back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
