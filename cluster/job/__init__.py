"""A job of teacher workers: what is done next, by whom, when to give up, and what is seen of it."""
