"""How much memory the tensors that are alive take, operation by operation. Counts bytes; the tensors may be fake.

What torch's own allocator would call active: every storage counts once, from the operation that made it until nothing
holds it. `fully_shard` frees and fills storages without an operation, so `UntypedStorage.resize_` is watched as well.
Two things that only seem to take memory are left out: tensors of whole shapes by which DTensor finds out the shape of a
result, and copies that a fake group makes where a real one gives back the tensor that was waited for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Within `with LiveMemory() as live:`, `live.bytes` are alive now, `live.peak` at most since `reset_peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self._ignored = 0
        self._sizes: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def reset_peak(self) -> int:
        """Forget the peak so far. Returns the bytes that are alive."""
        self.peak = self.bytes
        return self.bytes

    def track(self, item: Any) -> None:
        """Count the tensors in `item`, a tensor or nested lists and tuples of them."""
        for tensor in _plain_tensors(item):
            self._count(tensor.untyped_storage())

    def __enter__(self) -> LiveMemory:
        self._resize: Any = torch.UntypedStorage.resize_
        self._find_shape: Any = ShardingPropagator._propagate_tensor_meta_non_cached

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._count(storage)
            return result

        def find_shape(propagator: ShardingPropagator, *args: Any, **kwargs: Any) -> Any:
            self._ignored += 1
            try:
                return self._find_shape(propagator, *args, **kwargs)
            finally:
                self._ignored -= 1

        self._patch(resize, find_shape)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch(self._resize, self._find_shape)

    @staticmethod
    def _patch(resize: Any, find_shape: Any) -> None:
        """torch tells nobody of either: its own functions are wrapped while this looks."""
        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010 - a type checker does not let it be assigned
        setattr(ShardingPropagator, "_propagate_tensor_meta_non_cached", find_shape)  # noqa: B010

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own dispatch first: the plain tensors come by here
        if operation is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        result = operation(*args, **(kwargs or {}))
        if not self._ignored:
            self.track(result)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None or known[1]() is None:
            self._sizes[key] = (size, weakref.ref(storage, lambda ref: self._freed(key, ref)))
            self._add(size - (known[0] if known else 0))
        elif known[0] != size:
            self._sizes[key] = (size, known[1])
            self._add(size - known[0])

    def _add(self, size: int) -> None:
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _freed(self, key: int, ref: Any) -> None:
        known = self._sizes.get(key)
        if known is not None and known[1] is ref:
            del self._sizes[key]
            self.bytes -= known[0]


def _plain_tensors(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, DTensor):
        yield item.to_local()
    elif isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for one in item:
            yield from _plain_tensors(one)
