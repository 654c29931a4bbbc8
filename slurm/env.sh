# Sourced by slurm/finetune.sbatch on the first node, from the folder that sbatch was called in.
# TUNELOOM_ENV names another file.

# The interpreter that every node sees: .venv/bin/python of that folder, or `python` of a container.
# TUNELOOM_PYTHON=/shared/tuneloom/.venv/bin/python

# The command that enters a container on every node, image last.
# TUNELOOM_CONTAINER="apptainer exec --nv /images/tuneloom.sif"

# What your cluster needs goes below: module loads, caches on the shared file system, the network.
# module load cuda/12.8
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# More flags for `ray start` on every node, such as --object-store-memory=1000000000.
# TUNELOOM_RAY_OPTIONS=
