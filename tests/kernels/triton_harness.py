"""What the tests of Triton kernels share: honest bfloat16, checked memory, and copies with a planted error.

Everything here works on Triton's interpreter (TRITON_INTERPRET=1, set by `tests/conftest.py`), in which a
kernel runs on CPU tensors one program after another.
"""

import contextlib
import importlib
import importlib.util
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

GUARD = 4096  # bytes around every storage that belong to no tensor
NOBODY, SEVERAL = -1, -2  # in place of a program's number

_mutants = itertools.count(1)


class MemoryViolation(AssertionError):  # noqa: N818 - a failed assertion, as its base says
    """A kernel touched memory that is not its own, or that another program of the launch touches."""


@contextlib.contextmanager
def bf16_rounding() -> Iterator[None]:
    """Inside, the interpreter rounds float32 to bfloat16 to nearest even, as GPUs do; else it truncates."""
    builder = interpreter.InterpreterBuilder
    cast_impl, create_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def narrows(src: Any, dst_type: Any) -> bool:
        return src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        return _to_bf16(src) if narrows(src, dst_type) else cast_impl(self, src, dst_type)

    def fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if narrows(src, dst_type):
            return _to_bf16(src)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    with (
        mock.patch.object(builder, "cast_impl", cast),
        mock.patch.object(builder, "create_fp_to_fp", fp_to_fp),
    ):
        yield


def _to_bf16(src: Any) -> Any:
    values = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
    return interpreter.TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)


@contextlib.contextmanager
def checked_memory(seed: int) -> Iterator[None]:
    """Inside, every launch is checked, and a violation raises an AssertionError that names the kernel.

    - Programs run in an order shuffled by `seed`.
    - Every lane whose mask is true lies inside the storage of a tensor passed to the launch. Storages are
      moved apart for the launch, so that a step past the end of one never lands in its neighbour.
    - No two programs store to one address in one launch, and none loads what another stores. Atomic
      operations may meet each other, but not plain loads and stores.
    - `torch.empty` is filled with NaN: an element that no program stores shows in the result.
    """
    check = _Check(np.random.default_rng(seed))
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    patches = [
        mock.patch.object(executor, "__call__", check.call(executor.__call__)),
        mock.patch.object(executor, "_init_args_hst", check.to_host),
        mock.patch.object(executor, "_restore_args_dev", check.from_host),
        mock.patch.object(builder, "set_grid_dim", check.set_grid_dim(builder.set_grid_dim)),
        mock.patch.object(builder, "set_grid_idx", check.set_grid_idx(builder.set_grid_idx)),
        mock.patch.object(builder, "create_masked_load", check.load(builder.create_masked_load)),
        mock.patch.object(builder, "create_masked_store", check.store(builder.create_masked_store)),
        mock.patch.object(builder, "create_atomic_rmw", check.atomic(builder.create_atomic_rmw, 3)),
        mock.patch.object(builder, "create_atomic_cas", check.atomic(builder.create_atomic_cas, None)),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(_poisoned_empty())
        for patch in patches:
            stack.enter_context(patch)
        yield


@contextlib.contextmanager
def _poisoned_empty() -> Iterator[None]:
    """`torch.empty` fills floating tensors with NaN, integer ones with their largest value."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class _Storage:
    """One storage as a launch sees it: a guarded copy, and for every byte who loaded and who stored it."""

    def __init__(self, original: torch.UntypedStorage) -> None:
        self.original = original
        self.size = original.nbytes()
        self.buffer = torch.empty(self.size + 2 * GUARD, dtype=torch.uint8)
        self.bytes = self.buffer[GUARD : GUARD + self.size]
        self.bytes.copy_(torch.empty(0, dtype=torch.uint8).set_(original))
        self.start = self.bytes.data_ptr()
        self.loaded = np.full(self.size, NOBODY, dtype=np.int32)
        self.stored = np.full(self.size, NOBODY, dtype=np.int32)
        self.combined = np.zeros(self.size, dtype=bool)  # by an atomic operation

    def view(self, tensor: Tensor) -> Tensor:
        offset = tensor.storage_offset() + GUARD // tensor.element_size()
        guarded = tensor.new_empty(0, device="cpu")
        return guarded.set_(self.buffer.untyped_storage(), offset, tensor.size(), tensor.stride())

    def restore(self) -> None:
        torch.empty(0, dtype=torch.uint8, device=self.original.device).set_(self.original).copy_(self.bytes)


class _Check:
    """The state of the launch that is running, and the replacements for the interpreter's methods."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self.kernel = ""
        self.storages: dict[int, _Storage] = {}
        self.grid: tuple[int, ...] = ()
        self.order = np.empty(0, dtype=np.int64)
        self.program = 0

    def call(self, original: Any) -> Any:
        def __call__(executor: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            self.kernel, self.storages = executor.fn.__name__, {}
            try:
                original(executor, *args, **kwargs)
            except InterpreterError as error:
                raise _violation(error) or error from None
            finally:
                self.storages = {}

        return __call__

    def to_host(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return [self._guarded(arg) for arg in args], {
            name: self._guarded(arg) for name, arg in kwargs.items()
        }

    def from_host(self, *_: Any) -> None:
        for storage in self.storages.values():
            storage.restore()

    def _guarded(self, arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(self._guarded(item) for item in arg)
        if not hasattr(arg, "data_ptr"):
            if hasattr(arg, "block_shape"):
                raise NotImplementedError("memory of tensor descriptors is not checked")
            return arg
        storage = arg.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages[storage.data_ptr()] = _Storage(storage)
        return self.storages[storage.data_ptr()].view(arg)

    def set_grid_dim(self, original: Any) -> Any:
        def set_grid_dim(builder: Any, *grid: int) -> None:
            self.grid, self.order = grid, self.generator.permutation(math.prod(grid))
            original(builder, *grid)

        return set_grid_dim

    def set_grid_idx(self, original: Any) -> Any:
        def set_grid_idx(builder: Any, *index: int) -> None:
            self.program = int(self.order[np.ravel_multi_index(index, self.grid)])
            original(builder, *(int(i) for i in np.unravel_index(self.program, self.grid)))

        return set_grid_idx

    def load(self, original: Any) -> Any:
        def create_masked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            for storage, places in self._touched(pointers, mask, "loads"):
                self._no_conflict(storage, places, storage.stored, "loads what program {} stores")
                seen = storage.loaded[places]
                storage.loaded[places] = np.where(
                    (seen == NOBODY) | (seen == self.program), self.program, SEVERAL
                )
            return original(builder, pointers, mask, *rest)

        return create_masked_load

    def store(self, original: Any) -> Any:
        def create_masked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._record_store(pointers, mask)
            return original(builder, pointers, value, mask, *rest)

        return create_masked_store

    def atomic(self, original: Any, mask_index: int | None) -> Any:
        def create_atomic(builder: Any, *args: Any) -> Any:
            pointers = args[0] if mask_index is None else args[1]
            mask = None if mask_index is None else args[mask_index]
            self._record_store(pointers, mask, combine=True)
            return original(builder, *args)

        return create_atomic

    def _record_store(self, pointers: Any, mask: Any, combine: bool = False) -> None:
        for storage, places in self._touched(pointers, mask, "stores"):
            plain = places[~storage.combined[places]] if combine else places
            self._no_conflict(storage, plain, storage.stored, "stores where program {} stores")
            self._no_conflict(storage, places, storage.loaded, "stores what program {} loads")
            seen = storage.stored[places]
            storage.stored[places] = np.where(
                (seen == NOBODY) | (seen == self.program), self.program, SEVERAL
            )
            storage.combined[places] |= combine

    def _touched(self, pointers: Any, mask: Any, does: str) -> Iterator[tuple[_Storage, np.ndarray]]:
        """The bytes behind the lanes whose mask is true, by storage; raises when one is in none."""
        addresses = pointers.data.astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
        addresses = addresses.ravel()
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(len(addresses), dtype=bool)
        for storage in self.storages.values():
            here = (addresses >= storage.start) & (addresses + width <= storage.start + storage.size)
            if here.any():
                inside |= here
                first = np.unique(addresses[here] - storage.start)
                yield storage, (first[:, None] + np.arange(width)).ravel()
        if not inside.all():
            raise MemoryViolation(
                f"{self._where()} {does} outside the tensors: {self._nearest(addresses, inside)}"
            )

    def _nearest(self, addresses: np.ndarray, inside: np.ndarray) -> str:
        outside = addresses[~inside]
        ends = [(abs(outside[0] - s.start), outside[0] - s.start, s.size) for s in self.storages.values()]
        if not ends:
            return f"{len(outside)} lanes, and no tensor was passed"
        _, offset, size = min(ends)
        return f"{len(outside)} lanes, the first {offset} bytes from the start of a storage of {size}"

    def _no_conflict(self, storage: _Storage, places: np.ndarray, owners: np.ndarray, what: str) -> None:
        found = owners[places]
        other = found[(found != NOBODY) & (found != self.program)]
        if len(other):
            name = "other" if other[0] == SEVERAL else self._index(int(other[0]))
            raise MemoryViolation(f"{self._where()} {what.format(name)}")

    def _where(self) -> str:
        return f"{self.kernel}: program {self._index(self.program)} of {self.grid}"

    def _index(self, program: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(program, self.grid))


def _violation(error: BaseException | None) -> MemoryViolation | None:
    """The violation that the interpreter wrapped, once for every device function on the way."""
    while error is not None and not isinstance(error, MemoryViolation):
        error = error.__cause__
    return error


@contextlib.contextmanager
def mutated(module_name: str, old: str, new: str, importers: Sequence[str] = ()) -> Iterator[ModuleType]:
    """A copy of a module whose source has `new` in place of `old`, which must occur exactly once.

    The copy lives in a file of its own, where Triton finds its source, and registers its operators in a
    namespace of its own. Inside the `with` block every import of its name gives the copy: the public function
    with backend="triton" runs it, if it imports its module when it is called. `importers` names the modules
    between the mutated one and the one to test, the innermost first: they are copied too and import the
    copies; the last one is what is returned. So with kernels in a module that `wkv/triton.py` launches:

        kernels, host = "spikescale.kernels.wkv.triton_chunked", "spikescale.kernels.wkv.triton"
        with mutated(kernels, "t + 1", "t", [host]) as module:
            module.wkv_triton(...)
    """
    source = _source(module_name)
    if source.count(old) != 1:
        raise ValueError(f"{module_name}: {old!r} occurs {source.count(old)} times, not once")
    number = next(_mutants)
    sources = {module_name: source.replace(old, new), **{name: _source(name) for name in importers}}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, text in sources.items():
            text = text.replace("spikescale::", f"spikescale_mutant_{number}::")
            text = text.replace("torch.ops.spikescale.", f"torch.ops.spikescale_mutant_{number}.")
            path = Path(folder) / f"{name.replace('.', '_')}_{number}.py"
            path.write_text(text, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            stack.enter_context(_replaced(name, module))
            spec.loader.exec_module(module)
        yield module


@contextlib.contextmanager
def _replaced(name: str, module: ModuleType) -> Iterator[None]:
    """Inside, importing `name` gives `module`. Other modules imported meanwhile stay imported."""
    package_name, _, attribute = name.rpartition(".")
    package = importlib.import_module(package_name) if package_name else None
    absent = object()
    before, before_attribute = sys.modules.get(name), getattr(package, attribute, absent)
    sys.modules[name] = module
    if package is not None:
        setattr(package, attribute, module)
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        if package is not None and before_attribute is absent:
            delattr(package, attribute)
        elif package is not None:
            setattr(package, attribute, before_attribute)


def _source(module_name: str) -> str:
    spec = importlib.util.find_spec(module_name)
    assert spec is not None and spec.origin is not None, module_name
    return Path(spec.origin).read_text(encoding="utf-8")
