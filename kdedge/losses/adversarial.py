"""Adversarial lessons on the dense vector: a discriminator for each member learns to tell it from its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kdedge.losses.lesson import FromList, Lesson, Part, Shape, Weight

if TYPE_CHECKING:
    from torch import Tensor

Width = Annotated[int, Field(ge=1, le=65_536)]


class Adversarial(Lesson):
    """A discriminator D for each chunk says how real it is, and reconstructs the teacher's chunk d from what it sees.

    The student's term is BCE(D(s), 1) plus MSE(s, d), as the text of Malik et al. 2021 has it (`reading: paper`), or plus
    MSE(rec(D(s)), d), as the authors' code has it (`code`): then s need not be in the teacher's coordinates, and its head
    needs fine-tuning. D's own term, which leaves the student as it is, is [BCE(D(d), 1) + MSE(rec(D(d)), d)] +
    [BCE(D(s), 0) + MSE(rec(D(s)), d)]. Both are means over the members, and both learn in the same step.

    The authors' D has `layers` of 64, 128, 256, 512 and 1024, without the last for some students. A layer is linear with a
    LeakyReLU of 0.2, and from the second on batch norm, here always with the mean and variance of the batch.
    """

    has_parts = True
    what: Literal["dense"] = "dense"
    loss: Literal["adversarial"] = "adversarial"
    reading: Literal["paper", "code"] = "paper"
    layers: Annotated[tuple[Width, ...], FromList, Field(min_length=1, max_length=16)] = Field(
        (64, 128, 256, 512), description="widths of the discriminator's layers", examples=[[64, 128]]
    )
    discriminator_lr: Weight = Field(1.0, description="factor of the learning rate for the discriminators")

    @property
    def parts_lr(self) -> float:
        """Factor of the learning rate for the discriminators."""
        return self.discriminator_lr

    def parts(self, members: int, student: Shape, target: Shape) -> dict[str, Part]:
        """The weights of all discriminators, members first; `gain` is what a factor of batch norm exceeds 1 by."""
        chunk = target[0] // members
        parts, inputs = {}, chunk
        for n, width in enumerate(self.layers):
            parts[f"weight{n}"], parts[f"bias{n}"] = Part((members, width, inputs), inputs), Part((members, width, 1))
            if n > 0:
                parts[f"gain{n}"], parts[f"shift{n}"] = Part((members, width, 1)), Part((members, width, 1))
            inputs = width
        for name, width in (("real", 1), ("rec", chunk)):
            parts[f"{name}_weight"] = Part((members, width, inputs), inputs)
            parts[f"{name}_bias"] = Part((members, width, 1))
        return parts

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor, **weights: Tensor) -> Tensor:
        """Scalar from student and target, float [batch, width]; `labels` are not looked at."""
        from torch import cat  # not above: `check` and `plan` read this file without torch

        s, d = (_chunks(vectors, len(weights["bias0"])) for vectors in (student, target))
        logit, rec = self._discriminate(s, {name: weight.detach() for name, weight in weights.items()})
        loss = _softplus(-logit).mean() + ((s if self.reading == "paper" else rec) - d).square().mean()
        # Both batches in one pass, as the discriminators' matrices are small: up to a third less time.
        logit, rec = self._discriminate(cat((d, s.detach()), 2), weights)
        real, fake = logit.unbind(2)
        return loss + _softplus(-real).mean() + _softplus(fake).mean() + 2 * (rec - d).square().mean()

    def _discriminate(self, x: Tensor, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of chunks, float [members, width, batches, batch]: the logits of being real, with a width of 1, and the
        reconstruction.
        """
        from torch.nn import functional as F  # its fused layers take little more than half the time

        batches = x.shape[2:]
        x = x.flatten(2)
        for n in range(len(self.layers)):
            x = F.leaky_relu(weights[f"bias{n}"].baddbmm(weights[f"weight{n}"], x), 0.2)
            if n > 0:
                x = F.layer_norm(x.view(len(x), -1, *batches), batches[1:]).flatten(2)  # each unit over each batch
                x = weights[f"shift{n}"].addcmul(x, 1 + weights[f"gain{n}"])
        logit, rec = (weights[f"{name}_bias"].baddbmm(weights[f"{name}_weight"], x) for name in ("real", "rec"))
        return logit.view(len(x), -1, *batches), rec.view(len(x), -1, *batches)


def _chunks(vectors: Tensor, members: int) -> Tensor:
    """[batch, width] to [members, width / members, 1, batch]."""
    return vectors.reshape(len(vectors), members, -1).permute(1, 2, 0).unsqueeze(2)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)): the cross-entropy of a logit -x with 1, and of a logit x with 0."""
    return x.logaddexp(x.new_zeros(()))
