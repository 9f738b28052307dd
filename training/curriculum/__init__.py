"""Which rows a step trains on and how long they are, while the curriculum grows."""
