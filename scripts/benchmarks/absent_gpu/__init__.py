"""PyTorch's compiler for a GPU that is not there, and what the compiled code would launch, read and write.

Dynamo, AOTAutograd, the partitioner and inductor run on tensors without data, for a GPU of a given architecture, on a
CPU build of PyTorch. The generated code runs too: its launches are recorded instead of made (:mod:`recorder`), and the
memory accesses of each Triton kernel are counted by Triton's interpreter (:mod:`accesses`). Nothing is timed.
"""
