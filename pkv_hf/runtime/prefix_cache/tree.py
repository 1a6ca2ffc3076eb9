"""Which blocks of tokens are kept, by what is in them and by all that went before: a tree, its least recently used."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Node:
    """A block of tokens after those of its parent."""

    __slots__ = ("block", "children", "key", "parent")

    def __init__(self, parent: Node | None, key: bytes, block: int) -> None:
        self.parent, self.key, self.block = parent, key, block
        self.children: dict[bytes, Node] = {}


class Tree:
    """Chains of blocks from the beginnings of prompts on. Tokens are compared, not hashes of them alone.

    A key is the tokens of a block; the first one of a chain also says under what they were computed.
    """

    def __init__(self) -> None:
        self._root = Node(None, b"", -1)
        self._order: OrderedDict[Node, None] = OrderedDict()
        """Least recently used first. A parent comes after its children, so that the first has none."""

    def __len__(self) -> int:
        return len(self._order)

    def find(self, keys: Sequence[bytes]) -> list[Node]:
        """The longest chain that is kept of what these keys begin with. It counts as used."""
        chain, node = [], self._root
        for key in keys:
            found = node.children.get(key)
            if found is None:
                break
            chain.append(found)
            node = found
        self.use(chain)
        return chain

    def use(self, chain: Sequence[Node]) -> None:
        """Makes a chain, from its beginning on, the most recently used."""
        for node in reversed(chain):
            self._order.move_to_end(node)

    def add(self, parent: Node | None, key: bytes, block: int) -> Node:
        """Keeps a block after its parent, None for the first of a chain, whose `use` has to follow."""
        parent = parent or self._root
        node = parent.children[key] = Node(parent, key, block)
        self._order[node] = None
        return node

    def evict(self, in_use: set[Node]) -> int | None:
        """Lets the least recently used block go, and returns which; None where it is one of those `in_use`."""
        node = next(iter(self._order), None)
        if node is None or node in in_use:
            return None
        assert node.parent is not None
        del self._order[node], node.parent.children[node.key]
        return node.block
