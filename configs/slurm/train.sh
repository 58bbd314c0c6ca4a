#!/bin/bash
# One run over the nodes of a Slurm job, put back in the queue until it is done:
#   sbatch configs/slurm/train.sh --config configs/sd15_object.yaml --output_dir /shared/my-dog ...
# A table of runs, as one job for each run:
#   sbatch --array=1-8 configs/slurm/train.sh --runs pets.yaml --config configs/sd15_object.yaml --output_dir /shared/pets ...
# Two minutes before the time is up Slurm sends USR1 to this script alone (B:). The script has TERM sent to every
# process of the step: not to srun, which would kill them, and not USR1, which would kill `accelerate launch` and
# leave its processes behind. The run saves its last completed step and ends, and the job is queued again.
#SBATCH --job-name=dreambooth
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

GPUS_PER_NODE=${GPUS_PER_NODE:-4}
ADDRESS=${ADDRESS:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
PORT=$((20000 + SLURM_JOB_ID % 10000))  # jobs may share a node
case " $*" in
*" --runs"*) set -- "$@" --run_number "${SLURM_ARRAY_TASK_ID:?--runs needs sbatch --array=1-N}" ;;
*) set -- --resume_from_checkpoint latest "$@" ;;
esac

stop=0
trap 'stop=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1

# Each node has a SLURM_NODEID of its own, so it is expanded there and not here. A node that has ended does not end
# the others at once: the first one may still be saving.
srun --kill-on-bad-exit=0 --wait=90 bash -c 'exec accelerate launch \
  --config_file configs/accelerate/many_nodes.yaml --num_machines "$SLURM_NNODES" \
  --num_processes "$(('"$GPUS_PER_NODE"' * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$0" --main_process_port "$1" train_dreambooth_lora.py "${@:2}"' "$ADDRESS" "$PORT" "$@" &
step=$!
# the trap ends a wait before srun has ended
while kill -0 "$step" 2>/dev/null; do
  wait "$step"
  status=$?
done
if [ "$stop" = 1 ] && [ "$status" != 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"
