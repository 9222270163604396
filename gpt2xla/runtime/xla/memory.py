"""What XLA says about a device's memory. Imports no torch_xla."""

from __future__ import annotations

from gpt2xla.errors import is_out_of_memory
from gpt2xla.runtime.base import GIB, Memory, Shortage
from gpt2xla.runtime.xla.compiler_messages import compiler_figures

# Messages of XLA's several runtimes; a TPU's compiler gives figures, too.
_IS_FULL = ("RESOURCE_EXHAUSTED", "Out of memory allocating", "Out of memory while trying to allocate")


class XlaMemory(Memory):
    """Knows when a device of this kind is out of memory. Trying what fits would take a compile each time."""

    def __init__(self, device_kind: str, state_split: int = 1) -> None:
        self.device_kind, self.state_split = device_kind, state_split

    def shortage(self, error: Exception) -> Shortage | None:
        if figures := compiler_figures(str(error)):
            needed, memory = figures
            size = f"{memory / GIB:.2f} GiB, of which the program needs {needed / GIB:.2f}"
            return Shortage(f"{self.device_kind} ({size})", memory, needed, self.state_split)
        if any(words in str(error) for words in _IS_FULL) or is_out_of_memory(error):
            return Shortage(self.device_kind, state_split=self.state_split)
        return None
