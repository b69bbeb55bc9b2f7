"""RICES: the demonstrations of a few-shot prompt are those whose pictures are nearest to the question's.

Pure functions over feature vectors; whose they are is the caller's choice (OpenFlamingo takes its own CLIP's). Source:
Yang et al. (arXiv 2109.05014); Flamingo (arXiv 2204.14198), appendix A.2; OpenFlamingo's repository, rices.py.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from lvlm_jax.processing.schema import Example, Segment, Text, Turn
from lvlm_jax.shapes import Float, Int


def index(features: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Feature vectors of the demonstrations' pictures as `nearest` searches them: of length one, float32.

    Raises:
      ValueError: a vector of zeros or one that is not finite, which has no direction.
    """
    features = np.asarray(features, np.float32)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(length) & (length > 0))[:, 0]).tolist():
        raise ValueError(
            f"features {bad[:5]} are zero or not finite, so they have no direction; leave their pictures out"
        )
    return features / length


def nearest(
    query: Float[np.ndarray, "B F"], indexed: Float[np.ndarray, "N D"], shots: int, leave_out: Sequence[int] = ()
) -> Int[np.ndarray, "B S"]:
    """The numbers of the `shots` demonstrations nearest to each query by cosine similarity, the most similar last.

    Of equals the one with the lower number counts as nearer.

    Args:
      query: feature vectors of the questions' pictures, of any length.
      indexed: from `index`.
      leave_out: for each query the demonstration that it is itself, -1 for none: a picture is no example of itself.

    Raises:
      ValueError: fewer demonstrations than `shots`, vectors of another width, or a list of another length.
    """
    if query.shape[1] != indexed.shape[1]:
        raise ValueError(f"queries are {query.shape[1]} wide and the index {indexed.shape[1]}; use one tower for both")
    if len(leave_out) not in (0, len(query)):
        raise ValueError(f"leave_out names {len(leave_out)} demonstrations for {len(query)} queries; one each, or none")
    own = np.asarray(leave_out if len(leave_out) else [-1] * len(query), np.int64)
    room = len(indexed) - int((own >= 0).any())
    if not 0 <= shots <= room:
        raise ValueError(f"shots={shots}, but there are {room} demonstrations to choose from")
    similarity = index(query) @ indexed.T
    rows = np.flatnonzero(own >= 0)
    similarity[rows, own[rows]] = -np.inf
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :shots]
    return order[:, ::-1]


def prompt(demonstrations: Iterable[tuple[Iterable[Segment], str]], question: Iterable[Segment]) -> Example:
    """Demonstrations, each its segments and its answer, then the question: an example whose answer is to be written.

    Each is a turn of its own, for templates of documents; ``flamingo`` marks where it ends.
    """
    shown = [Turn(role="user", segments=(*segments, Text(answer))) for segments, answer in demonstrations]
    return Example(turns=(*shown, Turn(role="user", segments=tuple(question))))
