"""Tensor parallelism for float8 layers, with torchao's names."""

from titanlite.quant.tensor_parallel import PrepareQuantInput, QuantColwiseParallel, QuantRowwiseParallel


class Float8ColwiseParallel(QuantColwiseParallel):
    __doc__ = QuantColwiseParallel.__doc__


class Float8RowwiseParallel(QuantRowwiseParallel):
    __doc__ = QuantRowwiseParallel.__doc__


class PrepareFloat8ModuleInput(PrepareQuantInput):
    __doc__ = PrepareQuantInput.__doc__
