"""The controller of a job: what it sees, what it decides, what it writes down, how it is asked."""
