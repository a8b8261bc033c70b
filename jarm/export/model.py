"""A reward model on frozen embeddings as one object and one folder; `docs/models.md` has the format.

    reward_k(e) = head_k(((e - mean) / deviation) @ metric) - offset_k

in logits: the difference of two rewards is the log odds that the first response is preferred. The folder holds
`config.json`, `weights.safetensors` and the model card `README.md`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jarm.core.files import PathLike, plain_tree, refuse_link, there, whole_folder, write_whole
from jarm.core.outside import integer, mapping, maybe, read_json, string, struct
from jarm.core.status import JarmError
from jarm.core.types import Array, Float, Params
from jarm.core.version import __version__
from jarm.export.aggregate import MEAN, Aggregate, read_aggregate
from jarm.reward.config import HeadConfig

if TYPE_CHECKING:
    from jarm.embedding.embedder import Embedder

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "weights.safetensors", "README.md"
CHUNK = 4096
"""Rows that are scored at a time; fewer are padded to a power of two, so that few programs are compiled."""
_MAPS = ("mean", "deviation", "metric")
_CURE = "copy the whole folder again from where it was made"
_SCHEMA = struct(
    {
        "format": integer(1),
        "jarm": string(100),
        "head": string(1000),
        "width": integer(1),
        "members": integer(1),
        "aggregate": string(100),
        "made_by": maybe(mapping()),
        "training": mapping(),
        "weights": string(64),
        "seal": string(64),
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
    """An ensemble of K reward heads and all that stands between an embedding and a reward.

    Attributes:
      head: kind of the heads; a laplace head is a linear one here.
      params: parameters of the members, each leaf with a leading axis K, float32.
      mean, deviation: `[d]`, subtracted from and dividing embeddings, or None.
      metric: `[d, r]`, by which they are multiplied after that, or None.
      offset: `[K]`, reward of each member that counts as 0: its mean over the training responses.
      made_by: how the embeddings were made, as a store says it; None where that is not known.
      training: what the model was trained on and how well it does, by name; for the model card.
      aggregate: how `score` makes one reward of those of the members.

    Example:
      >>> head = HeadConfig(hidden=())
      >>> params = {"out": {"kernel": np.array([[[1.0], [2.0]]], np.float32)}}  # one member, d = 2
      >>> model = RewardModel(head, params, offset=np.ones(1, np.float32))
      >>> model.score(np.array([[1.0, 1.0], [0.0, 3.0]]))
      array([2., 5.], dtype=float32)
    """

    head: HeadConfig
    params: Params
    offset: np.ndarray
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    metric: np.ndarray | None = None
    made_by: Mapping[str, Any] | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aggregate: Aggregate = MEAN

    @property
    def members(self) -> int:
        """K, heads in the ensemble."""
        return len(self.offset)

    @property
    def width(self) -> int:
        """d, numbers in an embedding."""
        for array in (self.mean, self.metric):
            if array is not None:
                return len(array)
        return int(self.params["hidden"][0]["kernel"].shape[1] if self.head.hidden else self._kernel.shape[1])

    @property
    def _kernel(self) -> np.ndarray:
        return self.params["out"]["kernel"]

    def member_scores(self, embeddings: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "K n"]:
        """Rewards of each member, in logits.

        Raises:
          JarmError: embeddings of another width, or that are not finite.
        """
        embeddings = self._checked(embeddings)
        out = np.empty((self.members, len(embeddings)), np.float32)
        for start in range(0, len(embeddings), CHUNK):
            rows = embeddings[start : start + CHUNK].astype(np.float32)
            room = max(8, 1 << (len(rows) - 1).bit_length())
            padded = np.pad(rows, [(0, room - len(rows)), (0, 0)])
            found = _rewards(self.head, self.params, self._maps, self.offset, padded)
            out[:, start : start + len(rows)] = np.asarray(found)[:, : len(rows)]
        return out

    def score(
        self, embeddings: Float[np.ndarray, "n d"], aggregate: Aggregate | str | None = None
    ) -> Float[np.ndarray, "n"]:
        """Reward of each response, in logits, 0 for the average training response; larger is better.

        Args:
          embeddings: as the model was trained on, before any standardising.
          aggregate: in the place of the model's own: `mean`, `worst`, `lower:C` or `quantile:LEVEL`.

        Raises:
          JarmError: as `member_scores`, or an unknown aggregate.
        """
        if aggregate is None:
            aggregate = self.aggregate
        return (read_aggregate(aggregate) if isinstance(aggregate, str) else aggregate)(self.member_scores(embeddings))

    def score_texts(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        *,
        llm: str | None = None,
        dtype: str | None = None,
        aggregate: Aggregate | str | None = None,
    ) -> Float[np.ndarray, "n"]:
        """Reward of each response, embedded now as the training texts were; the language model stays loaded.

        Args:
          prompts, responses: `n` of each, texts or, under a chat template, lists of messages.
          llm: folder of the language model, or its id on the hub; by default the name that the embeddings came with.
          dtype: of the language model, `float32` or `bfloat16`; by default that of the training embeddings.
          aggregate: as for `score`.

        Raises:
          JarmError: how the embeddings were made is not known, another language model, or texts that it cannot embed.
        """
        return self.score(self.embedder(llm, dtype)(prompts, responses), aggregate)

    def embedder(self, llm: str | None = None, dtype: str | None = None) -> Embedder:
        """What embeds texts for this model; see `score_texts`."""
        from jarm.embedding.embedder import loaded_embedder  # transformers come with it

        if self.made_by is None:
            raise JarmError(
                "How the embeddings of this reward model were made is not known, as they came from an .npy: embed "
                "texts as those were, and score the embeddings."
            )
        return loaded_embedder(self.made_by, llm, dtype)

    def deviations(self, embeddings: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
        """Standard deviation of each response's reward over members, in logits; 0 where there is one member."""
        return self.member_scores(embeddings).std(axis=0)

    def with_aggregate(self, text: str | None) -> RewardModel:
        """The model with another aggregate: `mean`, `worst`, `lower:C` or `quantile:LEVEL`; None for its own.

        Raises:
          JarmError: an unknown one.
        """
        return self if text is None else dataclasses.replace(self, aggregate=read_aggregate(text))

    def scaled(self, factor: float) -> RewardModel:
        """The model whose rewards are `factor` times these."""
        size = np.float32(factor)
        params = {**self.params, "out": {"kernel": self._kernel * size}}
        return dataclasses.replace(self, params=params, offset=self.offset * size)

    @property
    def _maps(self) -> dict[str, np.ndarray]:
        found = {"mean": self.mean, "deviation": self.deviation, "metric": self.metric}
        return {name: array for name, array in found.items() if array is not None}

    def _checked(self, embeddings: Any) -> np.ndarray:
        embeddings = np.asarray(embeddings)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.width:
            raise JarmError(
                f"The embeddings have shape {embeddings.shape}, and this model takes (n, {self.width}): embed the "
                f"texts as its training texts were{_said(self.made_by)}."
            )
        finite = np.isfinite(embeddings.astype(np.float32)).all(axis=1)
        if not finite.all():
            raise JarmError(
                f"Embedding {int(np.argmin(finite))} holds a number that is NaN or infinite: embed that text again."
            )
        return embeddings

    def tensors(self) -> dict[str, np.ndarray]:
        """Every array by its name in `weights.safetensors`: `hidden.0.kernel` `[K, d, F]`, `out.kernel` `[K, F, 1]`."""
        found: dict[str, np.ndarray] = {"offset": self.offset, "out.kernel": self._kernel, **self._maps}
        for at in range(len(self.head.hidden)):
            for part in ("kernel", "bias"):
                found[f"hidden.{at}.{part}"] = self.params["hidden"][at][part]
        return {name: np.ascontiguousarray(array, np.float32) for name, array in sorted(found.items())}

    def config(self) -> dict[str, Any]:
        """All that `config.json` says but for the checksums."""
        return {
            "format": FORMAT,
            "jarm": __version__,
            "head": str(self.head),
            "width": self.width,
            "members": self.members,
            "aggregate": str(self.aggregate),
            "made_by": None if self.made_by is None else dict(self.made_by),
            "training": plain_tree(dict(self.training)),
        }

    def save(self, folder: PathLike, card: str = "") -> None:
        """Write the folder of the model, which `load_model` reads.

        Args:
          folder: a new or empty one.
          card: text of `README.md`; empty for none.

        Raises:
          JarmError: something stands there already, or it cannot be written.
        """
        import safetensors.numpy  # when a model is written or read: `import jarm` loads what all of it needs

        folder = Path(folder)
        refuse_taken(folder)
        weights = safetensors.numpy.save(self.tensors())
        config = {**self.config(), "weights": hashlib.sha256(weights).hexdigest()}
        with whole_folder(folder) as draft:
            write_whole(draft / WEIGHTS, weights)
            if card:
                write_whole(draft / CARD, card)
            write_whole(draft / CONFIG, json.dumps({**config, "seal": _seal(config)}, indent=1) + "\n")


def load_model(folder: PathLike) -> RewardModel:
    """The model of a folder that `RewardModel.save` wrote.

    Raises:
      JarmError: it is none, of an unknown format version, or cut or altered since it was written.

    Example:
      >>> import tempfile
      >>> params = {"out": {"kernel": np.ones((1, 2, 1), np.float32)}}
      >>> folder = Path(tempfile.mkdtemp()) / "model"
      >>> RewardModel(HeadConfig(hidden=()), params, np.zeros(1, np.float32)).save(folder)
      >>> load_model(folder).score(np.eye(2))
      array([1., 1.], dtype=float32)
    """
    import safetensors.numpy

    folder = Path(folder)
    if not there(folder / CONFIG) or not there(folder / WEIGHTS):
        raise JarmError(f"{folder} holds no reward model of jarm ({CONFIG} and {WEIGHTS}): give what `--out` named.")
    config = read_json(folder / CONFIG, cure=_CURE)
    version = config.get("format") if isinstance(config, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise JarmError(
            f"{folder} has format {version}, and this jarm {__version__} reads up to {FORMAT}: install a newer jarm."
        )
    config = read_json(folder / CONFIG, _SCHEMA, cure=_CURE)
    seal = config.pop("seal")
    if seal != _seal(config):
        raise JarmError(f"{folder / CONFIG} is not as it was written (its checksum differs): {_CURE}.")
    data = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(data).hexdigest() != config["weights"]:
        raise JarmError(f"{folder / WEIGHTS} is not as it was written (its checksum differs): {_CURE}.")
    try:
        tensors = safetensors.numpy.load(data)
    except Exception as error:
        raise JarmError(f"{folder / WEIGHTS} holds no tensors ({error}): {_CURE}.") from error
    head = HeadConfig.parse(config["head"])
    layers = range(len(head.hidden))
    hidden = {at: {part: tensors[f"hidden.{at}.{part}"] for part in ("kernel", "bias")} for at in layers}
    return RewardModel(
        head,
        {"out": {"kernel": tensors["out.kernel"]}, **({"hidden": hidden} if hidden else {})},
        made_by=config["made_by"],
        training=config["training"],
        aggregate=read_aggregate(config["aggregate"]),
        offset=tensors["offset"],
        **{name: tensors.get(name) for name in _MAPS},
    )


def refuse_taken(folder: Path) -> None:
    """Refuse to write a folder where something stands.

    Raises:
      JarmError: a link, a file, or a folder that is not empty.
    """
    refuse_link(folder)
    if there(folder) and not folder.is_dir():
        raise JarmError(f"{folder} is a file, where a folder is wanted: give another --out.")
    if folder.is_dir() and any(folder.iterdir()):
        raise JarmError(f"{folder} holds files already, and they stay: give another --out.")


def refuse_unmade(model: RewardModel) -> None:
    """Refuse to write a language model with a head whose embeddings are not known.

    Raises:
      JarmError: they came from an .npy.
    """
    if model.made_by is None:
        raise JarmError(
            "How the embeddings of this reward model were made is not known, as they came from an .npy: train on a "
            "store of `jarm embed`, or use `--to numpy` or `--to onnx`, which read embeddings."
        )


@functools.partial(jax.jit, static_argnums=0)
def _rewards(
    head: HeadConfig, params: Params, maps: dict[str, Any], offset: Any, embeddings: Any
) -> Float[Array, "K n"]:
    with jax.default_matmul_precision("highest"):
        embeddings = jnp.asarray(embeddings, jnp.float32)
        if "mean" in maps:
            embeddings = embeddings - maps["mean"][None]
        if "deviation" in maps:
            embeddings = embeddings / maps["deviation"][None]
        if "metric" in maps:
            embeddings = embeddings @ maps["metric"]
        return jax.vmap(lambda params: head.head().rewards(params, embeddings))(params) - offset[:, None]


def _seal(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _said(made_by: Mapping[str, Any] | None) -> str:
    return f", with {made_by['model']}" if made_by and "model" in made_by else ""
