"""The base weights of a stored model with adapters, with the adapters added to them: W + scale * B A."""

from __future__ import annotations

from torch import Tensor

from w1train.config.schema_adapters import LORA_A, LORA_B, AdaptersConfig, is_adapter
from w1train.conversion.sources import TensorSource


class MergedSource:
    """The tensors of a source without its adapters, whose products are added to the weights as these are read."""

    def __init__(self, source: TensorSource, adapters: AdaptersConfig) -> None:
        """Keep the source, which has two more tensors for each linear layer with an adapter.

        Args:
            adapters: the adapters of the stored model. With those of rank 0 nothing is added, and the tensors are those of the base.
        """
        self._source, self._scale = source, adapters.scale if adapters.rank else 0.0
        self.tensors = {name: shape for name, shape in source.tensors.items() if not is_adapter(name)}

    @property
    def is_merged(self) -> bool:
        """Tell whether there are adapters that are added to weights."""
        return self._scale > 0

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """Return a box of a tensor (see TensorSource). The sum is made in fp32 and rounded once, to the stored dtype."""
        weight = self._source.read(name, box)
        linear = name.removesuffix(".weight")
        if not self._scale or linear + LORA_A not in self._source.tensors:
            return weight
        rows, columns = box
        rank = slice(0, self._source.tensors[linear + LORA_A][0])
        product = self._source.read(linear + LORA_B, (rows, rank)).float() @ self._source.read(linear + LORA_A, (rank, columns)).float()
        return weight.float().add_(product, alpha=self._scale).to(weight.dtype)
