"""`mean_positives`: what makes a loss that several processes share the loss of one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from triton_mgiou.arguments import check_one_number


def mean_positives(num_positives: Tensor) -> Tensor:
    """The mean over the processes of their numbers of positive samples: the `avg_factor` of each.

    DistributedDataParallel averages the gradients of the W processes. If each process divides its sum by the mean T / W
    of all processes, T being the number of positives of the global batch, the average is the gradient of the global
    sum over T: that of one process with the whole batch, however the positives are spread. If each divided by
    its own number, a positive in a process that has few would count more.

    Nothing here waits for a GPU. Without an initialised process group W is 1.

    Args:
        num_positives: This process's number of positives, or the sum of their weights: one element, on a device that
            the process group's backend takes, such as `(labels >= 0).sum()`. It may be 0; every process has to call.

    Returns:
        T / W, a floating scalar on the same device. A T below 1 counts as 1.

    Raises:
        TypeError: `num_positives` is not a tensor of real numbers.
        ValueError: `num_positives` has not one element.
    """
    check_one_number("num_positives", num_positives)
    total = num_positives.detach().reshape(()).to(torch.promote_types(num_positives.dtype, torch.float32), copy=True)
    if not (dist.is_available() and dist.is_initialized()):
        return total.clamp_(min=1)
    dist.all_reduce(total)
    return total.clamp_(min=1) / dist.get_world_size()
