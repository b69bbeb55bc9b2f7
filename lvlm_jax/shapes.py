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
| A      | axes that count a position       |        |                             |

Annotations are jaxtyping's (``Float[Array, "B T D"]``); einsum strings use the same letters. The tests check them with
jaxtyping's import hook; at run time they cost nothing.
"""

import dataclasses
from typing import Any, TypeVar

import jax
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

__all__ = ["Array", "Bool", "DTypeLike", "Float", "Int", "Params", "pytree"]

Class = TypeVar("Class")

Params = dict
"""A plain nested dict of arrays: the only form in which parameters cross a public boundary."""


def pytree(cls: type[Class]) -> type[Class]:
    """Registers a dataclass as a pytree; fields with ``metadata={"static": True}`` are part of its structure.

    Unlike `jax.tree_util.register_dataclass` it does not call the constructor to put a value together: jax may put
    objects of its own in the leaves' places (0.7 does in `device_put`), which a check of the fields would refuse.
    """
    static = [field.name for field in dataclasses.fields(cls) if field.metadata.get("static")]
    leaves = [field.name for field in dataclasses.fields(cls) if field.name not in static]

    def flatten(value: Any) -> tuple:
        return tuple(getattr(value, name) for name in leaves), tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: Any) -> tuple:
        children, structure = flatten(value)
        return tuple(zip(map(jax.tree_util.GetAttrKey, leaves), children)), structure

    def unflatten(structure: tuple, children: Any) -> Any:
        value = object.__new__(cls)
        for name, child in (*zip(leaves, children), *zip(static, structure)):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
