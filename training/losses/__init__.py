"""The losses of a student on cached labels: what is compared, with which treatment of the tail, in which chunks.

- `targets.py`: a teacher's labels as tensors, and the ids they name.
- `divergences.py`: forward and reverse KL, generalised JSD, total variation distance.
- `tails.py`: what becomes of the mass outside the head; which pairs are legal, and what they cost.
- `temperatures.py`: A_T between stored temperatures.
- `objective.py`: alpha · T² · D(teacher ‖ student) + (1 − alpha) · cross-entropy + z-loss.
- `rest.py`, `rest_triton.py`: the log-sum-exp of all ids that no teacher names; in torch, and as GPU kernels.
- `fused.py`: all of that, and its gradients, from hidden states and LM head in chunks.
"""

from training.losses.divergences import DIVERGENCES
from training.losses.fused import linear_losses
from training.losses.objective import LossSums, Objective, soft_losses
from training.losses.tails import LEGAL_TAILS, TAILS
from training.losses.targets import SparseTargets, WeightedTargets

__all__ = [
    "DIVERGENCES",
    "LEGAL_TAILS",
    "TAILS",
    "LossSums",
    "Objective",
    "SparseTargets",
    "WeightedTargets",
    "linear_losses",
    "soft_losses",
]
