"""What is known of nodes beyond one job: evidence and cordons, in a folder or an object store that all jobs share."""
