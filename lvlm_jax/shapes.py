"""The glossary of dimension letters that every public signature speaks.

| letter | dimension                        | letter | dimension                   |
| ------ | -------------------------------- | ------ | --------------------------- |
| B      | text rows of a batch             | D      | width of a model or tower   |
| T      | text positions of a row          | F      | hidden width of an MLP      |
| S      | key positions                    | H      | query heads                 |
| G      | groups (rows of one data shard)  | K      | key/value heads             |
| N      | vision rows of a group           | E      | width of one head           |
| P      | patches of a vision row          | V      | vocabulary                  |
| C      | values of one patch              | L      | layers                      |
| Q      | visual tokens of a vision row    | R      | query heads per key head    |

Annotations are jaxtyping's (``Float[Array, "B T D"]``); einsum strings use the same letters. The tests check them with
jaxtyping's import hook; at run time they cost nothing.
"""

from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "Params"]

Params = dict
"""A plain nested dict of arrays: the only form in which parameters cross a public boundary."""
