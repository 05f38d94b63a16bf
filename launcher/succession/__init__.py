"""Who controls a job when the node of its controller is lost: copies of the journal, terms, and the change of office."""
