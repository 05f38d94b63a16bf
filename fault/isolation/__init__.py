"""What to do about a node that something speaks against: pure functions from evidence and costs to a decision."""
