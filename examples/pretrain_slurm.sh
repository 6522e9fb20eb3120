#!/bin/bash
#SBATCH --job-name=samoe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@300
#SBATCH --requeue
# One torchrun agent per node, a rank for each GPU. SIGTERM five minutes before the limit makes the agents pass it on; ranks save and
# leave within the 30 seconds that torchrun grants them, and the requeued job goes on from there. Where saving takes longer,
# give --exit-duration-in-mins instead. A node that is lost costs the steps since the last checkpoint: the others go on in the
# nearest layout (--elastic, which needs --global-batch-size) and take a node that comes back. docs/cluster.md tells what
# survives what. Its commands were run on hosts made of namespaces (tests/hosts), the script never under Slurm.
# Usage: sbatch examples/pretrain_slurm.sh examples/configs/gpt_1.3b_samoe128.yaml RUN_DIR [flags]
set -euo pipefail
CONFIG=$1 RUN_DIR=$2
shift 2
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun --kill-on-bad-exit=0 .venv/bin/torchrun \
    --nnodes "1:$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 100 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$MASTER:29400" \
    --rdzv-conf read_timeout=600 \
    -m megatron_samoe.cli.pretrain --config "$CONFIG" --run-dir "$RUN_DIR" --save-interval 500 --keep-last 2 --elastic "$@"
