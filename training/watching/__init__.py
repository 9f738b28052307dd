"""What people see of a run: figures, trackers, held-out evaluation, arithmetic done."""
