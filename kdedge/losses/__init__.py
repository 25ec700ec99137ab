"""The shelf of losses: each is the recipe's lesson and its formula in one class, one family a file.

A lesson's fields are the keys that the recipe may write; calling it gives the loss. No file here imports torch at its
top: formulas are methods of the tensors they are given, so `kdedge check` knows every key and its range without torch.
"""

from kdedge.losses.adversarial import Adversarial
from kdedge.losses.dense import MSE
from kdedge.losses.features import VID, Attention, FitNet
from kdedge.losses.lesson import Lesson
from kdedge.losses.logits import DIST, DKD, KD, CrossEntropy
from kdedge.losses.relations import CRD, PKT, RKD, SP

__all__ = ["LOSSES", "OF_CHUNKS", "OF_LAYERS", "OF_MEMBERS", "Lesson"]

LOSSES: dict[str, type[Lesson]] = {
    "adversarial": Adversarial,
    "attention": Attention,
    "crd": CRD,
    "cross_entropy": CrossEntropy,
    "dist": DIST,
    "dkd": DKD,
    "fitnet": FitNet,
    "kd": KD,
    "mse": MSE,
    "pkt": PKT,
    "rkd": RKD,
    "sp": SP,
    "vid": VID,
}

# By these each member of a group learns its own chunk of the dense vector, whatever the others do.
OF_CHUNKS = [name for name, loss in LOSSES.items() if loss.model_fields["what"].default == "dense" and loss.same_width]
# Of those, the losses that a finished member has of its own; what a lesson has learned itself ends with the stage.
OF_MEMBERS = [name for name in OF_CHUNKS if not LOSSES[name].has_parts]

# These compare what a layer inside the student gives with what a layer inside its source gives.
OF_LAYERS = [name for name, loss in LOSSES.items() if loss.model_fields["what"].default == "features"]
