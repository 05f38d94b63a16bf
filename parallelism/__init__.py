"""Topology, layouts, batch plans, the cost model, the planner, and what applies parallelism to a model."""
