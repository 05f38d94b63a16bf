"""What Prometheus asks for: numbers of a job, of its nodes, or of a machine without a job."""
