"""Keys and values that lie side by side in virtual memory, with physical pages under what is used of it."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from saccade.errors import positive


class Driver(Protocol):
    """Virtual memory of a device. page: bytes of a physical page, to whose multiples addresses are mapped."""

    page: int

    def reserve(self, size: int) -> int:
        """The address of `size` bytes that nothing lies under."""
        ...

    def tensor(self, address: int, count: int, dtype: torch.dtype) -> Tensor:
        """(count,) at an address that was reserved; what no page lies under must not be touched."""
        ...

    def create(self) -> Any:
        """A physical page."""
        ...

    def map(self, address: int, handle: Any) -> None: ...

    def unmap(self, address: int) -> None: ...

    def release(self, handle: Any) -> None:
        """Give a page back that lies under no address."""
        ...

    def free(self, address: int, size: int) -> None:
        """Give an address range back that no page lies under."""
        ...


class SimulatedDriver:
    """A `Driver` that acts as if, in ordinary memory: what no page lies under is NaN, and pages remember.

    page: bytes. device: any. calls: ("map" or "unmap", address) in order. created: pages that exist. Errors:
    RuntimeError for what a GPU's driver refuses: pages that are mapped twice, addresses that are not there.

    >>> driver = SimulatedDriver(page=64)
    >>> at, page = driver.reserve(128), driver.create()
    >>> x = driver.tensor(at, 16, torch.float64)
    >>> driver.map(at + 64, page)
    >>> x[8:] = 1.0
    >>> driver.unmap(at + 64)
    >>> driver.map(at, page)
    >>> x.nan_to_num(0).view(2, 8).sum(1).tolist()
    [8.0, 0.0]
    """

    def __init__(self, page: int, device: torch.device | str = "cpu") -> None:
        self.page, self.device = positive("page", page), torch.device(device)
        self.calls: list[tuple[str, int]] = []
        self._next = self._handles = 0
        self._ranges: dict[int, int] = {}
        self._memory: dict[int, Tensor] = {}
        self._pages: dict[int, Tensor | None] = {}
        self._under: dict[int, int] = {}

    @property
    def created(self) -> int:
        return len(self._pages)

    def reserve(self, size: int) -> int:
        address = self._next
        if size % self.page:
            raise RuntimeError(f"reserve: got {size} bytes, no multiple of a page of {self.page}")
        self._ranges[address] = size
        self._next += size + self.page
        return address

    def tensor(self, address: int, count: int, dtype: torch.dtype) -> Tensor:
        found = self._memory[address] = torch.full((count,), torch.nan, dtype=dtype, device=self.device)
        return found

    def create(self) -> int:
        handle = self._handles
        self._handles += 1
        self._pages[handle] = None
        return handle

    def map(self, address: int, handle: int) -> None:
        if address in self._under or handle in self._under.values():
            raise RuntimeError(f"map: address {address} or page {handle} is mapped already")
        place, content = self._place(address), self._pages[handle]
        if content is not None:
            place.copy_(content)
        self._under[address] = handle
        self.calls.append(("map", address))

    def unmap(self, address: int) -> None:
        if address not in self._under:
            raise RuntimeError(f"unmap: nothing lies under address {address}")
        place = self._place(address)
        self._pages[self._under.pop(address)] = place.clone()
        place.fill_(torch.nan)
        self.calls.append(("unmap", address))

    def release(self, handle: int) -> None:
        if handle in self._under.values():
            raise RuntimeError(f"release: page {handle} is mapped")
        del self._pages[handle]

    def free(self, address: int, size: int) -> None:
        if self._ranges.pop(address) != size or any(address <= at < address + size for at in self._under):
            raise RuntimeError(f"free: {size} bytes at {address} are not what was reserved, or are mapped")
        self._memory.pop(address, None)

    def _place(self, address: int) -> Tensor:
        """What lies at a page's address; outside of autograd, as physical memory is."""
        first = max((at for at in self._ranges if at <= address), default=-1)
        if first < 0 or address + self.page > first + self._ranges[first] or (address - first) % self.page:
            raise RuntimeError(f"address {address} is none of a page that was reserved")
        x = self._memory[first].detach()
        start, count = (address - first) // x.element_size(), self.page // x.element_size()
        return x[start : start + count]


class CudaDriver:
    """A `Driver` of a CUDA device, through the driver's calls for virtual memory (`pip install saccade[vmm]`).

    page: bytes, a multiple of the device's least, which is the default (2 MiB on what is sold today; the paper's
    smaller pages need its authors' kernel module). device: which. Unmapping waits for the device, for a kernel that
    reads what is gone fails. Errors: ImportError without the package; RuntimeError with the driver's own word.
    """

    def __init__(self, page: int | None = None, device: torch.device | str = "cuda") -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ImportError("CudaDriver needs the package cuda-bindings: pip install 'saccade[vmm]'") from error
        device = torch.device(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        self._driver, self.device = driver, torch.device("cuda", index)
        torch.zeros(1, device=self.device)  # the context that torch computes in, made current
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = index
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._kind.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        size = self._call("cuMemGetAllocationGranularity", self._kind, least)
        self.page = size if page is None else positive("page", page)
        if self.page % size:
            raise ValueError(f"page: got {page} bytes; pass a multiple of {size}, the least that this device maps")

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *found = getattr(self._driver, name)(*arguments)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: the driver says {status.name}")
        return found[0] if found else None

    def reserve(self, size: int) -> int:
        return int(self._call("cuMemAddressReserve", size, self.page, 0, 0))

    def tensor(self, address: int, count: int, dtype: torch.dtype) -> Tensor:
        class Bytes:
            __cuda_array_interface__: ClassVar[dict[str, Any]] = {
                "shape": (count * dtype.itemsize,),
                "typestr": "|u1",
                "data": (address, False),
                "version": 3,
            }

        # Whose memory a pointer is, torch asks the driver, which knows only what is mapped.
        handle = self.create()
        self.map(address, handle)
        found = torch.as_tensor(Bytes(), device=self.device).view(dtype)
        self.unmap(address)
        self.release(handle)
        return found

    def create(self) -> Any:
        return self._call("cuMemCreate", self.page, self._kind, 0)

    def map(self, address: int, handle: Any) -> None:
        self._call("cuMemMap", address, self.page, 0, handle, 0)
        self._call("cuMemSetAccess", address, self.page, [self._access], 1)

    def unmap(self, address: int) -> None:
        torch.cuda.synchronize(self.device)
        self._call("cuMemUnmap", address, self.page)

    def release(self, handle: Any) -> None:
        self._call("cuMemRelease", handle)

    def free(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", address, size)


class VirtualCache:
    """Keys and values of many requests, each contiguous in virtual memory: vAttention's allocator (arXiv 2405.04437).

        2 L tensors (slots, length, Hkv, D); a request has a slot of each, which begins at a page's border

    A slot is as long as the longest request, and costs addresses alone. Pages come in sets of 2 L, one for each tensor
    at the same offset. `open` and `extend` map what is needed before they return; `ahead` maps for the next steps, to
    be called where nobody waits for it. A request that ends leaves its pages mapped (unless eager), and the next one
    takes the free slot whose pages fit it best; where pages run out, those above need are unmapped, from the highest
    slot down. Whatever reads contiguous keys and values reads these.

    driver: see `Driver`. num_layers: L. kv_heads: Hkv. dim: D. slots, length: requests, and tokens of each, at most.
    sets: physical sets that there may be (default: for all slots). eager: unmap when a request ends (False). steps:
    how far `ahead` looks (10). burst: sets that it maps for later steps than the next (2). Errors: ValueError for a
    request that is too long; RuntimeError once slots or sets run out.

    >>> cache = VirtualCache(SimulatedDriver(page=256), 1, 2, 4, slots=3, length=40, dtype=torch.float32)
    >>> slot = cache.open(9)
    >>> cache.write(0, slot, 0, *torch.randn(2, 2, 9, 4))
    >>> cache.view(0, slot)[0].shape, cache.mapped
    (torch.Size([1, 2, 9, 4]), [2, 0, 0])
    """

    def __init__(
        self,
        driver: Driver,
        num_layers: int,
        kv_heads: int,
        dim: int,
        *,
        slots: int,
        length: int,
        dtype: torch.dtype,
        sets: int | None = None,
        eager: bool = False,
        steps: int = 10,
        burst: int = 2,
    ) -> None:
        self.driver, self.num_layers = driver, positive("num_layers", num_layers)
        self.slots, self.length = positive("slots", slots), positive("length", length)
        self.eager, self.steps, self.burst = eager, positive("steps", steps), positive("burst", burst)
        self.token = positive("kv_heads", kv_heads) * positive("dim", dim) * dtype.itemsize  # bytes
        self.slot = self.pages(length) * driver.page
        self.sets = slots * self.pages(length) if sets is None else positive("sets", sets)
        self.addresses = [driver.reserve(self.slot * slots) for _ in range(2 * num_layers)]
        shape, strides = (slots, length, kv_heads, dim), (self.slot // dtype.itemsize, kv_heads * dim, dim, 1)
        count = self.slot * slots // dtype.itemsize
        flat = [driver.tensor(address, count, dtype) for address in self.addresses]
        self.k, self.v = ([x.as_strided(shape, strides) for x in half] for half in (flat[::2], flat[1::2]))
        self.lengths: list[int | None] = [None] * slots  # None: no request
        self._under: list[list[list[Any]]] = [[] for _ in range(slots)]  # sets of each slot, by offset
        self._free: list[list[Any]] = []
        self._made = 0

    def pages(self, tokens: int) -> int:
        """Pages a tensor under `tokens` tokens."""
        return -(-tokens * self.token // self.driver.page)

    @property
    def mapped(self) -> list[int]:
        """Sets under each slot."""
        return [len(sets) for sets in self._under]

    @property
    def nbytes(self) -> int:
        """Bytes of physical memory."""
        return self._made * len(self.addresses) * self.driver.page

    def waste(self, slot: int) -> int:
        """Bytes under a slot of one tensor that hold no token."""
        return len(self._under[slot]) * self.driver.page - (self.lengths[slot] or 0) * self.token

    # -- requests --------------------------------------------------------------------------------------------------

    def open(self, length: int) -> int:
        """A slot for a request of `length` tokens, with pages under them: the best fit, of free ones.

        That is the least that is enough; where none is, the one that lacks least.
        """
        self._check(length)
        idle = [slot for slot in range(self.slots) if self.lengths[slot] is None]
        if not idle:
            raise RuntimeError(f"slots: all {self.slots} have requests; close one, or make more slots")
        mapped, needed = self.mapped, self.pages(length)
        enough = [slot for slot in idle if mapped[slot] >= needed]
        slot = min(enough, key=mapped.__getitem__) if enough else max(idle, key=mapped.__getitem__)
        self.lengths[slot] = length
        try:
            self._map(slot, needed)
        except RuntimeError:
            self.lengths[slot] = None
            raise
        return slot

    def extend(self, slot: int, length: int) -> None:
        """A request has `length` tokens now."""
        self._check(length)
        if self.lengths[slot] is None:
            raise ValueError(f"slot: {slot} has no request; open one")
        self._map(slot, self.pages(length))
        self.lengths[slot] = length

    def close(self, slot: int) -> None:
        """A request has ended."""
        self.lengths[slot] = None
        if self.eager:
            self._unmap(slot, 0)

    def ahead(self) -> None:
        """Map what the next steps need: for the next one all of it, for later ones `burst` sets, if there are any."""
        mapped = 0
        for step in range(1, self.steps + 1):
            for slot in self._active():
                short = self._after(slot, step) - len(self._under[slot])
                if step == 1:
                    self._reclaim(short)
                elif mapped >= self.burst:
                    return
                if 0 < short <= self._spare():
                    self._map(slot, self._after(slot, step))
                    mapped += short

    def release(self) -> None:
        """Give all memory and all addresses back; nothing of this cache may be used after that."""
        for slot in range(self.slots):
            self._unmap(slot, 0)
        for handles in self._free:
            for handle in handles:
                self.driver.release(handle)
        for address in self.addresses:
            self.driver.free(address, self.slot * self.slots)
        self._free, self.addresses, self.k, self.v, self._made = [], [], [], [], 0

    # -- tokens ----------------------------------------------------------------------------------------------------

    def write(self, index: int, slot: int, first: int, k: Tensor, v: Tensor) -> None:
        """k, v (Hkv, n, D) of a layer's tokens first .. first + n - 1, which the request has."""
        last = first + k.shape[1]
        if last > (self.lengths[slot] or 0):
            raise ValueError(f"first: got tokens up to {last} of a request of {self.lengths[slot]}; extend it first")
        self.k[index][slot, first:last], self.v[index][slot, first:last] = k.transpose(0, 1), v.transpose(0, 1)

    def view(self, index: int, slot: int) -> tuple[Tensor, Tensor]:
        """k, v (1, Hkv, tokens, D) of a request in a layer: no copy."""
        count = self.lengths[slot]
        k, v = (x[index][slot, :count].transpose(0, 1)[None] for x in (self.k, self.v))
        return k, v

    # -- pages -----------------------------------------------------------------------------------------------------

    def _check(self, length: int) -> None:
        if not 0 <= length <= self.length:
            raise ValueError(f"length: got {length} tokens; a slot has room for 0 .. {self.length}")

    def _active(self) -> list[int]:
        return [slot for slot in range(self.slots) if self.lengths[slot] is not None]

    def _after(self, slot: int, steps: int) -> int:
        """Pages that a request needs once it has had some more tokens."""
        return self.pages(min(self.length, (self.lengths[slot] or 0) + steps))

    def _spare(self) -> int:
        """Sets that are under no slot."""
        return len(self._free) + self.sets - self._made

    def _map(self, slot: int, pages: int) -> None:
        """Pages under the first `pages` of a slot."""
        short = pages - len(self._under[slot])
        if short <= 0:
            return
        self._reclaim(short)
        if self._spare() < short:
            raise RuntimeError(
                f"sets: {short} more are needed, {self._spare()} of {self.sets} are free; close a request"
            )
        for _ in range(short):
            if self._free:
                handles = self._free.pop()
            else:
                handles = [self.driver.create() for _ in self.addresses]
                self._made += 1
            for address, handle in zip(self._at(slot, len(self._under[slot])), handles, strict=True):
                self.driver.map(address, handle)
            self._under[slot].append(handles)

    def _reclaim(self, count: int) -> None:
        """Unmap what is above need until `count` sets are spare, from the highest slot down."""
        for slot in reversed(range(self.slots)):
            while self._spare() < count and len(self._under[slot]) > self.pages(self.lengths[slot] or 0):
                self._unmap(slot, len(self._under[slot]) - 1)

    def _unmap(self, slot: int, pages: int) -> None:
        """Leave pages under the first `pages` of a slot alone."""
        while len(self._under[slot]) > pages:
            self._free.append(self._under[slot].pop())
            for address in self._at(slot, len(self._under[slot])):
                self.driver.unmap(address)

    def _at(self, slot: int, page: int) -> list[int]:
        """Where a slot's page lies in each tensor."""
        return [address + slot * self.slot + page * self.driver.page for address in self.addresses]
