"""What the warm parent of :mod:`tests.support.forks` has imported: its children begin with it."""

import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
import torch.testing._internal.distributed.fake_pg  # noqa: F401

import titanlite.checkpoint
import titanlite.launch.launcher
import titanlite.metrics.profiling
import titanlite.plan.compiled_memory
import titanlite.training.build
import titanlite.training.sample
import titanlite.training.validate  # noqa: F401
