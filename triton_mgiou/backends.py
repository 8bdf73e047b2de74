"""Choose between the kernels and eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

are_transforms_active = torch._C._are_functorch_transforms_active


def takes_kernel(backend: str, tensor: Tensor, missing: str | None = None) -> bool:
    """Whether to launch a kernel; `missing` is what there is none for.

    Raises:
        RuntimeError: `backend` is "triton" where the kernels cannot run.
    """
    if backend == "eager" or (backend == "auto" and not tensor.is_cuda):
        return False
    anywhere = None if missing is None else f"there is no kernel for {missing}"
    if forward_ad._current_level >= 0:  # whether or not a tensor carries a tangent, which the kernels would drop
        anywhere = "forward-mode differentiation is active, and the kernels know only the reverse mode"
    if are_transforms_active():
        anywhere = "a torch.func transform is active, and the kernels know only autograd"
    reason = anywhere or kernels_unavailable(tensor.device)
    if reason is not None and backend == "triton":
        remedy = "" if anywhere else "a GPU that can, or "
        raise RuntimeError(f'backend="triton" cannot run: {reason}; expected {remedy}backend "auto" or "eager"')
    return reason is None


def is_empty(size: int, *, unknown: bool = False) -> bool:
    """Whether a size is 0; `unknown` of one that no compiler knows, as that of `boxes[mask]`."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true  # noqa: PLC0415 - slow

        return (guard_or_true if unknown else guard_or_false)(size == 0)
    return size == 0


_reasons: dict[torch.device, str | None] = {}


def kernels_unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, or None if they can."""
    if device not in _reasons:
        _reasons[device] = _find_reason(device)
    return _reasons[device]


# What torch.compiler.assume_constant_result does, without its import of the compiler, which takes a second.
kernels_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_version() -> tuple[int, int]:
    """Major and minor number of the installed Triton: as text, 3.10 would come before 3.6.

    Raises:
        ImportError: There is none.
    """
    import triton  # noqa: PLC0415 - not everywhere, and slow

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _find_reason(device: torch.device) -> str | None:
    try:
        import triton  # noqa: PLC0415 - not everywhere, and slow
    except ImportError:
        return "Triton is not installed"
    version = triton_version()
    if version < (3, 4):
        return f"the kernels need Triton 3.4, and {triton.__version__} is installed"
    from triton_mgiou import launch, ops, pairs  # noqa: F401, PLC0415 - from here on the package has them

    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        return f"PyTorch finds {torch.cuda.device_count()} NVIDIA GPUs, and the device is {device}"
    if launch.INTERPRETED and device.type in ("cpu", "cuda"):
        if version < (3, 8):  # its tl.minimum is NaN where a side is NaN, and so is what masks leave out
            return f"the kernels need Triton 3.8 in Triton's interpreter, and {triton.__version__} is installed"
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels need an NVIDIA GPU"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the kernels need an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    return None
