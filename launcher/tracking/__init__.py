"""Experiment trackers: what a run tells of its steps and events, passed on to TensorBoard, W&B or MLflow.

A process beside the job reads the files that the run writes anyway: a tracker that is slow, away or broken costs no step.
"""
