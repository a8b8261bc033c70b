"""Checks of the arguments of `jarm.select`, one by one: whatever NumPy can read, or a sentence that says what to do."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from jarm.core.base import Limits
from jarm.core.status import JarmError


def as_array(name: str, value: Any) -> np.ndarray:
    """A value as a NumPy array of numbers, copied only where NumPy has to.

    Raises:
      JarmError: NumPy cannot read the value, or reads no numbers.
    """
    if np.ma.is_masked(value):
        raise JarmError(
            f"{name} has masked entries, which would be read as numbers: fill them, or leave their rows out."
        )
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever another library's arrays raise
        raise JarmError(
            f"{name} cannot be read as a NumPy array ({error}): give numbers, such as `x.detach().float().cpu()` of a "
            "PyTorch tensor."
        ) from error
    if array.dtype.names is None and (
        array.dtype.kind == "V" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    ):
        array = array.astype(np.float32)  # NumPy cannot compute with the types of ml_dtypes
    if array.dtype.kind not in "biuf":
        raise JarmError(f"{name} holds {array.dtype} and not numbers in equal rows: give an array of numbers.")
    return array


def finite(name: str, value: Any, shape: tuple[int | str, ...]) -> np.ndarray:
    """A value as an array of finite floats, with the shape given in numbers; float16 and wider keep their type.

    Raises:
      JarmError: another shape, or a value that is not finite, with its row.
    """
    array = as_array(name, value)
    array = array if array.dtype.kind == "f" else array.astype(np.float64)
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or 0 in array.shape:
        wanted = ", ".join(map(str, shape))
        raise JarmError(f"{name} has shape {array.shape}, and [{wanted}] is due: check which axis is which.")
    bad = ~np.isfinite(array)
    if bad.any():
        row, *column = np.argwhere(bad)[0].tolist()
        rows = int(bad.any(axis=1).sum()) if array.ndim > 1 else int(bad.sum())
        place = f" (column {column[0]})" if column else ""
        raise JarmError(
            f"Row {row} of {name} is NaN or infinite, the first of {rows:,}{place}: repair it, or leave it out."
        )
    return array


def single(name: str, array: np.ndarray) -> np.ndarray:
    """An array in float32; of a wider one first the mean is taken off, which costs digits and no difference contains.

    Raises:
      JarmError: squares of its values overflow.
    """
    if array.dtype.itemsize > 4:
        array = array - array.mean(axis=0)
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32, copy=False)
    # Squares of differences are summed.
    if not np.abs(narrow).max() < 1e18:
        raise JarmError(f"{name} holds values of {np.abs(array).max():.1g}, whose squares overflow: scale them down.")
    return narrow


def refuse_large(name: str, array: np.ndarray) -> None:
    """Refuse values whose differences have squares that overflow float32."""
    with np.errstate(over="ignore"):
        spread = float(np.ptp(array, axis=0).max())
    if not spread < 1e18:
        raise JarmError(f"{name} holds values of {np.abs(array).max():.1g}, whose squares overflow: scale them down.")


def whole(name: str, value: Any, minimum: int = 1) -> int:
    """A whole number of at least `minimum`.

    Raises:
      JarmError: another number, or no number.
    """
    try:
        number = operator.index(value)
        if "bool" in f"{type(value).__name__} {getattr(value, 'dtype', '')}" or getattr(value, "shape", ()) != ():
            raise TypeError("no whole number")
    except Exception:  # whatever another library raises
        raise JarmError(f"{name} is {shown(value)}: give a whole number, {minimum} or more.") from None
    if number < minimum:
        raise JarmError(f"{name} is {number}: give {minimum} or more.")
    return number


def real(name: str, value: Any, advice: str) -> float:
    """A finite number.

    Raises:
      JarmError: no number, or none that is finite; `advice` says what to give.
    """
    array = as_array(name, value)
    if array.ndim or array.dtype.kind == "b" or not np.isfinite(array):
        raise JarmError(f"{name} is {shown(value)}: {advice}.")
    return float(array)


def truth(name: str, value: Any) -> bool:
    """True or False.

    Raises:
      JarmError: anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise JarmError(f"{name} is {shown(value)}: give True or False.")
    return bool(value)


def shown(value: Any) -> str:
    """A value in a sentence, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def index_pairs(name: str, value: Any, size: int) -> np.ndarray:
    """`[M, 2]` int64 pairs of two different responses; M = 0 for None.

    Raises:
      JarmError: another shape or type, an index that is no response, or a response with itself, with the row.
    """
    if value is None:
        return np.zeros((0, 2), np.int64)
    array = as_array(name, value)
    if array.shape in ((0,), (0, 2)):
        return np.zeros((0, 2), np.int64)
    if array.ndim != 2 or array.shape[1] != 2 or (array.dtype.kind not in "iu" and array.size):
        raise JarmError(
            f"{name} has shape {array.shape} and type {array.dtype}: give pairs of indices, [M, 2] whole numbers."
        )
    outside = ((array < 0) | (array >= size)).any(axis=1)
    if outside.any():
        row = int(outside.argmax())
        raise JarmError(
            f"Row {row} of {name} is {tuple(array[row].tolist())}, and responses are numbered 0 to {size - 1}: give "
            "indices of responses."
        )
    array = array.astype(np.int64)
    same = array[:, 0] == array[:, 1]
    if same.any():
        row = int(same.argmax())
        raise JarmError(
            f"Row {row} of {name} pairs response {array[row, 0]} with itself: leave such rows out, they tell nothing."
        )
    return array


def read_costs(costs: Any, size: int, num_listed: int | None) -> np.ndarray | None:
    """`[N]` costs of responses, or `[M]` of the listed pairs, float64.

    Raises:
      JarmError: another shape, or a cost that is not positive, with its row.
    """
    if costs is None:
        return None
    array = finite("costs", costs, ("N",)).astype(np.float64)
    if len(array) not in (size, num_listed):
        pairs = "" if num_listed is None else f", or one for each of the {num_listed:,} listed pairs"
        raise JarmError(f"costs has {len(array):,} entries: give one for each of the {size:,} responses{pairs}.")
    if not (array > 0).all():
        row = int((array <= 0).argmax())
        raise JarmError(f"Entry {row} of costs is {array[row]:g}: give positive costs, whatever the unit.")
    beyond = ~((array > 1e-30) & (array < 1e30))
    if beyond.any():
        row = int(beyond.argmax())
        raise JarmError(f"Entry {row} of costs is {array[row]:g}, beyond float32: give costs in another unit.")
    return array


def read_limits(per_prompt: Any, per_response: Any, similarity: Any, *, prompts: bool) -> Limits:
    """The limits on a batch.

    Raises:
      JarmError: a limit out of range, or a limit per prompt without prompts.
    """
    if per_prompt is not None and not prompts:
        raise JarmError("per_prompt limits pairs per prompt, and there are no prompts: give prompts=.")
    cosine = "give a cosine above 0, and 1 at most, such as .95"
    similarity = None if similarity is None else real("similarity", similarity, cosine)
    if similarity is not None and not 0 < similarity <= 1:
        raise JarmError(f"similarity is {similarity}: {cosine}.")
    counts = {"per_prompt": per_prompt, "per_response": per_response}
    given = {name: min(whole(name, value), 2**31 - 1) for name, value in counts.items() if value is not None}
    return Limits(**given, similarity=similarity)


def read_prior(value: Any, width: int) -> np.ndarray:
    """The prior precision `[F, F]`, float64, from a number or a matrix.

    Raises:
      JarmError: neither, or a matrix that is not symmetric, or negative in some direction.
    """
    array = as_array("prior_precision", value)
    if array.ndim == 0:
        if array.dtype.kind == "b" or not 0 <= array < np.inf:
            raise JarmError(
                f"prior_precision is {array}: give a positive number, or None for one that suits the space."
            )
        return float(array) * np.eye(width)
    matrix = finite("prior_precision", array, (width, width)).astype(np.float64)
    size = np.abs(matrix).max()
    if np.abs(matrix - matrix.T).max() > 1e-5 * size:
        raise JarmError("prior_precision is not symmetric: give a precision matrix, such as (P + P.T) / 2.")
    matrix = (matrix + matrix.T) / 2
    smallest = np.linalg.eigvalsh(matrix)[0]
    if smallest < -1e-6 * size:
        raise JarmError(f"prior_precision is not positive definite (eigenvalue {smallest:.2g}): add to its diagonal.")
    return matrix


def check_definite(information: np.ndarray, prior: Any, num_labelled: int) -> None:
    """Refuse information that float32 cannot factor.

    Raises:
      JarmError: prior and labelled pairs leave a direction without information.
    """
    try:
        if np.isfinite(np.linalg.cholesky(information)).all():
            return
    except np.linalg.LinAlgError:
        pass
    if prior is not None and np.ndim(prior) == 0 and float(prior) == 0:
        rank = np.linalg.matrix_rank(information)
        raise JarmError(
            f"With prior_precision=0 the {num_labelled:,} labelled pairs tell of {rank} of {len(information)} "
            "directions only: give a positive prior_precision, or None for one that suits the space."
        )
    raise JarmError(
        "The information to start from, prior and labelled pairs, is not positive definite in float32: give a larger "
        "prior_precision, or check the features for one direction that dwarfs all others."
    )
