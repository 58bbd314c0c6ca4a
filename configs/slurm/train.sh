#!/bin/bash
# One run over the nodes of a Slurm job, put back in the queue until it is done:
#   sbatch configs/slurm/train.sh --config configs/sd15_object.yaml --output_dir /shared/my-dog ...
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
ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stop=0
trap 'stop=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1

# Each node has a SLURM_NODEID of its own, so it is expanded there and not here. A node that has ended does not end
# the others at once: the first one may still be saving.
srun --kill-on-bad-exit=0 --wait=90 bash -c 'exec accelerate launch \
  --config_file configs/accelerate/many_nodes.yaml --num_machines "$SLURM_NNODES" \
  --num_processes "$(('"$GPUS_PER_NODE"' * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
  --main_process_ip "$0" train_dreambooth_lora.py --resume_from_checkpoint latest "$@"' "$ADDRESS" "$@" &
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
