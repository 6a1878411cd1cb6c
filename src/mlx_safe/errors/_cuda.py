"""CUDA's failures: its error numbers and the exceptions made of them.

MLX's CUDA backend (0.30 to 0.32) raises them on the thread that asked, as
``CALL failed: TEXT``, where TEXT is what ``cudaGetErrorString`` or
``cuGetErrorString`` says of the number, and as ``CALL failed with code: N.`` for
cuBLAS, cuFFT and CUTLASS (``backend/cuda/utils.cpp``, ``cublas_utils.cpp``,
``fft.cu``, ``cudnn_utils.cpp``). The texts are those of CUDA 12 and 13; NVIDIA has
one for each number and does not translate them.

A failed kernel leaves the context in an error that every later call returns ("sticky",
CUDA C++ Programming Guide, "Error Checking"): only a new process computes again.
"""

from __future__ import annotations

from ._base import DeviceLostError, FaultKind, GPUError, OutOfMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .._fault import Fault

__all__ = [
    "CUDA_FAULT_KINDS",
    "CudaDeviceLostError",
    "CudaError",
    "CudaOutOfMemoryError",
    "cuda_kind_of",
    "cuda_text",
    "from_message",
]


class CudaError(GPUError):
    """A call of CUDA, or of one of its libraries, failed."""

    def __init__(
        self, message: str, *, code: int = -1, faults: Sequence[Fault] = ()
    ) -> None:
        super().__init__(message, kind=cuda_kind_of(code), faults=faults)


class CudaOutOfMemoryError(CudaError, OutOfMemoryError):
    """2: the card has too little free memory for an array, a graph or a workspace."""


class CudaDeviceLostError(CudaError, DeviceLostError):
    """A sticky error: no call of this process succeeds from now on."""


_REPLACE = "Start the process again: no call of CUDA succeeds in it any more."
_KERNEL = f"{_REPLACE} Suspect a custom kernel or a defect of MLX."
_DRIVER = (
    "Look whether `nvidia-smi` answers; the driver must be as new as the CUDA that "
    "MLX was built with."
)


def _lost(code: int, name: str, text: str, advice: str) -> tuple[FaultKind, str]:
    kind = FaultKind(
        code,
        name,
        CudaDeviceLostError,
        "cuda_device_lost",
        retryable=False,
        fatal=True,
        advice=advice,
    )
    return kind, text


def _refused(code: int, name: str, text: str) -> tuple[FaultKind, str]:
    kind = FaultKind(
        code, name, CudaError, "cuda_error", retryable=False, advice=_DRIVER
    )
    return kind, text


# Number, name and text of CUDA 13.0's driver_types.h.
_ROWS = (
    (
        FaultKind(
            2,
            "cudaErrorMemoryAllocation",
            CudaOutOfMemoryError,
            "cuda_out_of_memory",
            retryable=True,
            advice="Less prompt cache, shorter prompts, or fewer programs on the card.",
        ),
        "out of memory",
    ),
    _refused(3, "cudaErrorInitializationError", "initialization error"),
    _lost(4, "cudaErrorCudartUnloading", "driver shutting down", _REPLACE),
    _refused(
        35,
        "cudaErrorInsufficientDriver",
        "CUDA driver version is insufficient for CUDA runtime version",
    ),
    _refused(
        46,
        "cudaErrorDevicesUnavailable",
        "CUDA-capable device(s) is/are busy or unavailable",
    ),
    _refused(100, "cudaErrorNoDevice", "no CUDA-capable device is detected"),
    _lost(201, "cudaErrorDeviceUninitialized", "invalid device context", _REPLACE),
    _refused(
        209,
        "cudaErrorNoKernelImageForDevice",
        "no kernel image is available for execution on the device",
    ),
    _lost(
        214,
        "cudaErrorECCUncorrectable",
        "uncorrectable ECC error encountered",
        f"{_REPLACE} The card's memory is damaged: see `nvidia-smi -q -d ECC`.",
    ),
    _lost(
        220,
        "cudaErrorNvlinkUncorrectable",
        "uncorrectable NVLink error detected during the execution",
        _REPLACE,
    ),
    _lost(
        226,
        "cudaErrorContained",
        "Invalid access of peer GPU memory over nvlink or a hardware error",
        _REPLACE,
    ),
    _lost(
        700,
        "cudaErrorIllegalAddress",
        "an illegal memory access was encountered",
        _KERNEL,
    ),
    _lost(
        702,
        "cudaErrorLaunchTimeout",
        "the launch timed out and was terminated",
        f"{_REPLACE} A card that drives a display ends kernels that run for long.",
    ),
    _lost(709, "cudaErrorContextIsDestroyed", "context is destroyed", _REPLACE),
    _lost(710, "cudaErrorAssert", "device-side assert triggered", _KERNEL),
    _lost(714, "cudaErrorHardwareStackError", "hardware stack error", _KERNEL),
    _lost(
        715,
        "cudaErrorIllegalInstruction",
        "an illegal instruction was encountered",
        _KERNEL,
    ),
    _lost(716, "cudaErrorMisalignedAddress", "misaligned address", _KERNEL),
    _lost(
        717,
        "cudaErrorInvalidAddressSpace",
        "operation not supported on global/shared address space",
        _KERNEL,
    ),
    _lost(718, "cudaErrorInvalidPc", "invalid program counter", _KERNEL),
    _lost(719, "cudaErrorLaunchFailure", "unspecified launch failure", _KERNEL),
    _lost(
        721, "cudaErrorTensorMemoryLeak", "tensor memory not completely freed", _KERNEL
    ),
    _refused(
        803,
        "cudaErrorSystemDriverMismatch",
        "system has unsupported display driver / cuda driver combination",
    ),
    _lost(
        806,
        "cudaErrorMpsRpcFailure",
        "the remote procedural call between the MPS server and the MPS client failed",
        _REPLACE,
    ),
    _lost(
        810,
        "cudaErrorMpsClientTerminated",
        "the MPS client has been terminated by the server",
        _REPLACE,
    ),
    _lost(
        911,
        "cudaErrorExternalDevice",
        "an async error has occured in external entity outside of CUDA",
        _REPLACE,
    ),
)

CUDA_FAULT_KINDS: Mapping[int, FaultKind] = {kind.code: kind for kind, _ in _ROWS}
_CODES = {text: kind.code for kind, text in _ROWS}

# The numbers of the libraries are their own: those that mean "no memory" (cublas_api.h,
# cufft.h, cutlass.h), and cuBLAS's for a kernel that failed (cudaErrorLaunchFailure).
_LIBRARY_CODES = {
    ("cublas", 3): 2,
    ("cublas", 13): 719,
    ("cufft", 2): 2,
}

# What the names of the calls begin with; the longer ones first.
_LIBRARIES = ("cublas", "cufft", "cudnn", "nvrtc", "cuda", "cu")


def cuda_kind_of(code: int) -> FaultKind:
    """The table's row for CUDA's error number ``code`` (``cudaError_t``).

    One that is not in the table is taken for retryable: the number of attempts is
    bounded, and a context that is lost says so with the next call.
    """
    kind = CUDA_FAULT_KINDS.get(code)
    if kind is not None:
        return kind
    return FaultKind(
        code,
        f"cudaError({code})" if code >= 0 else "cudaError(unknown)",
        CudaError,
        "cuda_error",
        retryable=True,
        advice="Please report this message, with the versions of driver and MLX.",
    )


def cuda_text(code: int) -> str:
    """What CUDA says of the error number ``code`` (``cudaGetErrorString``)."""
    return next((text for kind, text in _ROWS if kind.code == code), "unknown error")


def from_message(message: str) -> FaultKind | None:
    """The row for what MLX says of a failed call of CUDA; None for other texts."""
    call, failed, text = message.partition(" failed: ")
    code = ""
    if not failed:
        call, failed, code = message.partition(" failed with code: ")
    library = _library(call)
    if not failed or library is None:
        return None
    text, code = text.rstrip(". \n"), code.rstrip(". \n")
    if code:
        known = code.isdecimal() and _LIBRARY_CODES.get((library, int(code)))
        return cuda_kind_of(known or -1)
    # cuDNN's names say it, such as
    # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED.
    if library == "cudnn" and ("ALLOC_FAILED" in text or "ALLOCATION_FAILED" in text):
        return cuda_kind_of(2)
    return cuda_kind_of(_CODES.get(text, -1))


def _library(call: str) -> str | None:
    """Whose call ``call`` is: MLX gives its own source text, arguments included."""
    name = call.partition("(")[0].rpartition(" ")[2]
    if not name.isidentifier():
        return None
    found = next((x for x in _LIBRARIES if name.startswith(x)), None)
    # The driver's calls, such as cuLaunchKernel, and not any word that begins so.
    return None if found == "cu" and not name[2:3].isupper() else found
