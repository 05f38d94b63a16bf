"""The process of a node that owns snapshots. Loads neither torch nor numpy nor pydantic."""
