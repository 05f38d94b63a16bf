"""What carries a job to where it runs: a batch script for Slurm, an image and services for Docker, manifests for Kubernetes.

``launcher`` fills a ``Deployment`` from a job file; everything here is text made of it. Imports no other room.
"""

from evermesh.deploy.docker import render_docker
from evermesh.deploy.kubernetes import render_kubernetes
from evermesh.deploy.model import Deployment
from evermesh.deploy.slurm import render_slurm

__all__ = ["Deployment", "render_docker", "render_kubernetes", "render_slurm"]
