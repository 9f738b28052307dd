"""From a store of soft labels to students: batches, losses, the DeepSpeed trainer, reports."""
