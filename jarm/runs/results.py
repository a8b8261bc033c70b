"""Results of runs on the host, their evaluation and their records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.base import HParams, RewardHead
from jarm.core.files import plain
from jarm.core.status import JarmError, Status, check
from jarm.core.tables import ResponseTable
from jarm.core.types import Params
from jarm.evaluation.metrics import evaluate
from jarm.loop.simulate import RunRecord


@dataclasses.dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
      rule, seed, hparams: of the run.
      records: on the host, with a leading axis over rounds; without the heads.
      params: heads of every round, and of the noise-free refit if there is one.
      failure: sentence of the worst status, or None.
      seconds: wall time of the run, with other runs beside it; an equal share for one of several under `vmap`.
    """

    rule: str
    seed: int
    hparams: HParams
    records: RunRecord
    params: Params
    failure: str | None
    seconds: float

    def lines(self, metrics: Mapping[str, np.ndarray], place: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Flat records, one per round; batch_* describe the batch labelled just before. One line if the run failed.

        The last one also has noise_free_*, the metrics of the noise-free refit: null where that fit failed.

        Args:
          metrics: name -> values for all heads of `params`.
          place: fields that tell the run from those of other settings.
        """
        run = {**place, "rule": self.rule, "seed": self.seed}
        if self.failure:
            return [failed_line(place, self.rule, self.seed, self.failure)]
        lines, records = [], self.records
        noise_free = dict[str, Any]()
        if (status := records.noise_free_status) is not None:
            noise_free = {f"noise_free_{k}": math.nan if status > Status.OK else v[-1] for k, v in metrics.items()}
        for t in range(len(records.labels)):
            line = {
                "kind": "run",
                **run,
                "round": t,
                "labels": records.labels[t],
                "label_error": records.wrong[t] / records.labels[t],
                **{name: values[t] for name, values in metrics.items()},
                **(noise_free if t == len(records.labels) - 1 else {}),
                **{f"batch_{name}": values[t - 1] if t else math.nan for name, values in records.batch.items()},
                "fit_train_nll": records.fit.train_nll[t].mean(),
                "fit_valid_nll": records.fit.valid_nll[t].mean(),
                "fit_steps": records.fit.steps[t].mean(),
                "seconds": self.seconds,
            }
            lines.append({name: plain(value) for name, value in line.items()})
        return lines


def failed_line(place: Mapping[str, Any], rule: str, seed: int, message: str) -> dict[str, Any]:
    """The record of a run that failed; `place` as for `Result.lines`."""
    return {"kind": "failed", **place, "rule": rule, "seed": seed, "message": message}


def failure_of(status: np.ndarray) -> str | None:
    """Sentence of the worst status of a run, or None."""
    try:
        check(status)
    except JarmError as error:
        return str(error)
    return None


def evaluate_runs(
    head: RewardHead, results: Sequence[Result], table: ResponseTable, *, pad: int = 1, **evaluation: Any
) -> list[dict[str, np.ndarray]]:
    """`evaluate` the heads of several runs in one walk through the test table, each with the noise of its labels.

    Args:
      head, table: as for `evaluate`.
      results: runs of one program.
      pad: multiple to which the number of runs is padded, so that few shapes compile.
      evaluation: the other arguments of `evaluate`.

    Returns:
      For each run, name -> values for all heads of its `params`.
    """
    heads = len(jax.tree.leaves(results[0].params)[0])
    padded = [*results, *[results[-1]] * (-len(results) % pad)]
    params = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *[result.params for result in padded])
    noise = np.repeat([np.float32(result.hparams.noise) for result in padded], heads)
    found = evaluate(head, params, table, noise=noise, **evaluation)
    return [{name: values[i * heads : (i + 1) * heads] for name, values in found.items()} for i in range(len(results))]
