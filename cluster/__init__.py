"""From a corpus to soft labels: tokenising, teacher workers, and the Ray job that runs them."""
