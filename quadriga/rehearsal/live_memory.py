"""Tracks the bytes of live tensors, operation by operation. The tensors may be fake.

It counts active memory as torch's allocator does: every storage once, from the operation that allocates it until no
reference is left. `fully_shard` frees and allocates storages without an operation, so `UntypedStorage.resize_` is
wrapped too. Two kinds of tensors are not counted, because a real run does not allocate them: tensors of full shapes,
with which DTensor computes the shape of a result, and copies that a fake process group makes in `wait_tensor`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from quadriga.tensors import tensors_in, to_local


class LiveMemory(TorchDispatchMode):
    """In `with LiveMemory() as live:`, `live.bytes` is the live memory, and `live.peak` its peak since `reset_peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self._ignored = 0
        self._sizes: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def reset_peak(self) -> int:
        """Set the peak to the bytes that are alive, and return them."""
        self.peak = self.bytes
        return self.bytes

    def track(self, item: Any) -> None:
        """Count the tensors in `item`, a tensor or nested lists and tuples of them."""
        for tensor in map(to_local, tensors_in(item)):
            if is_traceable_wrapper_subclass(tensor):  # such as float8: it holds tensors, and no storage of its own
                self.track([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]])
            else:
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
        """torch has no hooks for these two functions, so they are wrapped while this mode is active."""
        setattr(torch.UntypedStorage, "resize_", resize)  # noqa: B010 - the type checker forbids an assignment
        setattr(ShardingPropagator, "_propagate_tensor_meta_non_cached", find_shape)  # noqa: B010

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor dispatches first, and calls this again with plain tensors
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
