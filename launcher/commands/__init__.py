"""The commands of ``evermesh``, one module per group. What a command needs is imported when it runs: help stays fast."""
