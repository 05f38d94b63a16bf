"""Short tests that use what a job will use: arithmetic, memory, disk, sockets, collectives. Each has a budget of seconds."""
