"""What ``verify_plan`` proves with: columns, their rules at once, the order of rings, and the certificate.

Nothing here comes from the planner, which may be wrong. What a plan *means* is shared: ``pieces`` says how a sequence is cut,
``CostModel`` what a micro-batch takes, ``PipelineSchedule`` in which order a pipeline runs.
"""
