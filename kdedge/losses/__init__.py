"""The shelf of losses: each is the recipe's lesson and its formula in one class, one family a file.

A lesson's fields are the keys that the recipe may write; calling it gives the loss. No file here imports torch at its
top: formulas are methods of the tensors they are given, so `kdedge check` knows every key and its range without torch.
"""

from kdedge.losses.adversarial import Adversarial
from kdedge.losses.dense import MSE
from kdedge.losses.lesson import Lesson
from kdedge.losses.logits import DIST, DKD, KD, CrossEntropy
from kdedge.losses.relations import PKT, RKD, SP

__all__ = ["LOSSES", "OF_CHUNKS", "OF_MEMBERS", "Lesson"]

LOSSES: dict[str, type[Lesson]] = {
    "adversarial": Adversarial,
    "cross_entropy": CrossEntropy,
    "dist": DIST,
    "dkd": DKD,
    "kd": KD,
    "mse": MSE,
    "pkt": PKT,
    "rkd": RKD,
    "sp": SP,
}

# By these each member of a group learns its own chunk of the dense vector, whatever the others do.
OF_CHUNKS = [name for name, loss in LOSSES.items() if loss.model_fields["what"].default == "dense" and loss.same_width]
# Of those, the losses that a finished member has of its own; what a lesson has learned itself ends with the stage.
OF_MEMBERS = [name for name in OF_CHUNKS if not LOSSES[name].has_parts]
