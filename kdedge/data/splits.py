"""How the training set is cut: what is trained on, what selects and gates, and what calibrates int8."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdedge.errors import DataError


@dataclass(frozen=True, eq=False)
class Splits:
    """Sample numbers of the training set, int64, ascending; no number is in two of them."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    calibration: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the three arrays."""
        digest = hashlib.sha256()
        for indices in (self.train, self.validation, self.calibration):
            digest.update(f"{len(indices)};".encode())
            digest.update(indices.astype("<i8").tobytes())
        return digest.hexdigest()


def split(n_train: int, seed: int, validation: int, calibration: int, limit: int | None = None) -> Splits:
    """Cut 0..n_train-1 by seed. `limit` keeps that many of the train part and leaves the other two as they are.

    Raises DataError when nothing is left to train on.
    """
    held_out = validation + calibration
    if min(validation, calibration) < 0 or held_out >= n_train or (limit is not None and limit < 1):
        raise DataError(
            f"Cannot cut {n_train:,} training samples into {validation:,} for validation, {calibration:,} for "
            f"calibration and {'the rest' if limit is None else f'{limit:,}'} to train on: every number must be 0 or "
            f"more, and at least one sample must be left to train on"
        )
    order = np.random.default_rng(seed).permutation(n_train).astype(np.int64)
    return Splits(
        train=np.sort(order[held_out:][:limit]),
        validation=np.sort(order[:validation]),
        calibration=np.sort(order[validation:held_out]),
    )
