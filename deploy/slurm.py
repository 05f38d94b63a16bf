"""A batch script for Slurm."""

import shlex

from evermesh.deploy.model import Deployment, how_to_watch


def render_slurm(deployment: Deployment, *, time_limit: str = "12:00:00") -> dict[str, str]:
    """By file name: a script for ``sbatch`` that goes on by itself until the job is done."""
    gpus = f"#SBATCH --gpus-per-node={deployment.workers}\n" if deployment.device == "cuda" else ""
    job = shlex.quote(deployment.job_file)
    return {
        f"{deployment.name}.sbatch": f"""#!/bin/bash
#SBATCH --job-name={deployment.name}
#SBATCH --nodes={deployment.nodes + deployment.spares}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={deployment.cpus}
{gpus}#SBATCH --time={time_limit}
#SBATCH --output={deployment.name}-%j.out
#SBATCH --open-mode=append
#SBATCH --no-kill
#SBATCH --requeue
# {deployment.nodes} nodes train, {deployment.spares} wait to replace a lost one, which --no-kill lets the job survive.
# Before the time limit the job saves and puts itself back into the queue; its next start goes on with the same run.
# {how_to_watch(deployment.runs)}
# exec: signals that Slurm sends to the batch script reach the launcher.
exec evermesh launch {job} --on slurm --nodes {deployment.nodes} --set requeue=true
"""
    }
