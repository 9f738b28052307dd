"""In the way of MLflow, in processes that tests start.

DeepSpeed imports MLflow wherever it is installed (for its autotuner), which takes as long as DeepSpeed itself, and a
launch imports DeepSpeed three times. Nothing but our own tests of the tracker, which are in pytest's process, uses it.
"""

raise ImportError("not in processes that tests start: see tests/without_mlflow/mlflow.py")
